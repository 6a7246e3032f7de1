import dataclasses
import json
import math

import numpy as np
import pytest

from sparseffn_jax.train.guard import (
    GuardConfig,
    GuardState,
    Verdict,
    after_restore,
    describe,
    observe,
    upper_limit,
)

CONFIG = GuardConfig(patience=3)


def observe_all(losses, state=None, config=CONFIG):
    state, verdicts = state or GuardState(), []
    for loss in losses:
        state, verdict = observe(config, state, {"loss": loss, "grad_norm": 1.0})
        verdicts.append(verdict)
    return state, verdicts


@pytest.fixture
def settled():
    """A guard that has seen 200 noisy losses around 3."""
    losses = 3.0 + 0.1 * np.random.default_rng(0).normal(size=200)
    state, verdicts = observe_all(map(float, losses))
    assert set(verdicts) == {Verdict.GOOD}
    return state


def by_part(loss=3.0, ffn=1.0, rest=1.0, update=1.0):
    """Returns a step's metrics when more than the feed-forward layers trains."""
    return {
        "loss": loss,
        "grad_norm": math.hypot(ffn, rest),
        "ffn_grad_norm": ffn,
        "rest_grad_norm": rest,
        "update_norm": math.hypot(update, 1.0),
        "ffn_update_norm": update,
        "rest_update_norm": 1.0,
    }


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"loss": math.nan, "grad_norm": 1.0}, Verdict.DIVERGED),
        ({"loss": math.inf, "grad_norm": 1.0}, Verdict.DIVERGED),
        ({"loss": 3.0, "grad_norm": math.nan}, Verdict.DIVERGED),
        (by_part(loss=math.nan), Verdict.DIVERGED),
        (by_part(ffn=math.nan), Verdict.FFN_DIVERGED),
        (by_part(update=math.inf), Verdict.FFN_DIVERGED),
        (by_part(ffn=math.nan, rest=math.nan), Verdict.DIVERGED),
        (by_part(rest=math.inf), Verdict.DIVERGED),
    ],
)
def test_what_is_not_finite_diverges_at_once(metrics, expected):
    state, verdict = observe(CONFIG, GuardState(), metrics)
    assert verdict is expected
    assert math.isfinite(state.loss.mean)


def test_ffns_whose_gradient_explodes_diverge_alone():
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=(200, 2)))
    state = GuardState()
    for ffn, rest in noise:
        state, verdict = observe(CONFIG, state, by_part(ffn=0.3 * ffn, rest=rest))
        assert verdict is Verdict.GOOD
    # That all gradients grow tenfold is not the feed-forward layers' doing.
    state, verdict = observe(CONFIG, state, by_part(ffn=30.0, rest=100.0))
    assert verdict is Verdict.GOOD
    verdicts, bad = [], by_part(ffn=300.0)
    for _ in range(3):
        before = state
        state, verdict = observe(CONFIG, state, bad)
        verdicts.append(verdict)
    assert verdicts == [Verdict.SUSPECT, Verdict.SUSPECT, Verdict.FFN_DIVERGED]
    assert "300 times that of the rest, makes 3" in describe(CONFIG, before, verdict, bad)


def test_state_survives_json(settled):
    assert GuardState.from_dict(json.loads(json.dumps(dataclasses.asdict(settled)))) == settled


def test_the_band_is_mean_plus_deviations(settled):
    assert settled.loss.mean == pytest.approx(3.0, abs=0.05)
    assert math.sqrt(settled.loss.variance) == pytest.approx(0.1, rel=0.4)
    assert upper_limit(CONFIG, settled) == pytest.approx(3.6, abs=0.3)


def test_losses_above_the_band_diverge_after_patience(settled):
    state, verdicts = observe_all([5.0, 5.0, 5.0], settled)
    assert verdicts == [Verdict.SUSPECT, Verdict.SUSPECT, Verdict.DIVERGED]
    assert (state.loss.mean, state.loss.variance) == (settled.loss.mean, settled.loss.variance)
    assert state.loss.outside == 0


def test_a_good_loss_ends_the_row(settled):
    _, verdicts = observe_all([5.0, 5.0, 3.0, 5.0, 5.0], settled)
    assert Verdict.DIVERGED not in verdicts


def test_losses_may_fall(settled):
    _, verdicts = observe_all([2.0] * 20 + [1.0] * 20, settled)
    assert set(verdicts) == {Verdict.GOOD}


def test_a_settled_loss_may_tremble():
    _, verdicts = observe_all([2.0] * 500 + [2.05] * 3)
    assert set(verdicts) == {Verdict.GOOD}


def test_there_is_no_band_at_first():
    _, verdicts = observe_all([3.0, 3.0, 9.0, 9.0, 9.0])
    assert set(verdicts) == {Verdict.GOOD}


def test_restores_lower_the_rate(settled):
    config = GuardConfig(rate_factor=0.5)
    state = after_restore(config, after_restore(config, settled))
    assert (state.restores, state.rate_factor) == (2, 0.25)


def test_description(settled):
    def reason(loss):
        return describe(CONFIG, settled, Verdict.DIVERGED, {"loss": loss, "grad_norm": 1.0})

    assert reason(math.nan) == "loss is nan"
    assert "3 in a row above 3." in reason(5.0)


@pytest.mark.parametrize(
    "values",
    [
        {"patience": 0},
        {"rate_factor": 0.0},
        {"rate_factor": 1.5},
        {"band_deviations": 0.0},
        {"max_restores": -1},
        {"snapshot_every": 0},
    ],
)
def test_settings_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        GuardConfig(**values)
