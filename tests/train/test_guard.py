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
        state, verdict = observe(config, state, loss, 1.0)
        verdicts.append(verdict)
    return state, verdicts


@pytest.fixture
def settled():
    """A guard that has seen 200 noisy losses around 3."""
    losses = 3.0 + 0.1 * np.random.default_rng(0).normal(size=200)
    state, verdicts = observe_all(map(float, losses))
    assert set(verdicts) == {Verdict.GOOD}
    return state


@pytest.mark.parametrize("numbers", [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan)])
def test_what_is_not_finite_diverges_at_once(numbers):
    state, verdict = observe(CONFIG, GuardState(), *numbers)
    assert verdict is Verdict.DIVERGED
    assert math.isfinite(state.mean)


def test_the_band_is_mean_plus_deviations(settled):
    assert settled.mean == pytest.approx(3.0, abs=0.05)
    assert math.sqrt(settled.variance) == pytest.approx(0.1, rel=0.4)
    assert upper_limit(CONFIG, settled) == pytest.approx(3.6, abs=0.3)


def test_losses_above_the_band_diverge_after_patience(settled):
    state, verdicts = observe_all([5.0, 5.0, 5.0], settled)
    assert verdicts == [Verdict.SUSPECT, Verdict.SUSPECT, Verdict.DIVERGED]
    assert (state.mean, state.variance) == (settled.mean, settled.variance)
    assert state.outside == 0


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
    assert describe(CONFIG, settled, {"loss": math.nan, "grad_norm": 1.0}) == "loss is nan"
    assert "3 in a row above 3." in describe(CONFIG, settled, {"loss": 5.0, "grad_norm": 1.0})


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
