"""The prices of a plan: what is measured, how often, and what follows for a whole model."""

import numpy as np
import pytest
from tiny_models import VOCAB, make_model

import sparseffn_jax as sf
from sparseffn_jax.bench import clock as clocks
from sparseffn_jax.bench.clock import FFNClock, ModelClock, smooth_prices
from sparseffn_jax.measure.timing import PairedTimes
from sparseffn_jax.sparsify.planning import config_of

CONFIG = sf.SparseFFNConfig(32, 88, "silu", gated=True, bias=False,
                            spectral=sf.SpectralConfig("low_rank", rank=4),
                            micro=sf.MicroRefinementConfig(sf.CoreConfig(8)))  # fmt: skip


@pytest.fixture
def model():
    return make_model("llama")


@pytest.mark.parametrize("train", [False, True])
def test_every_size_is_timed_once_beside_dense_on_the_same_tokens(model, monkeypatch, train):
    timed = []

    def time_stacks(baseline, candidate, x, *, repeats):
        timed.append((baseline(x), candidate(x), x.shape, repeats))
        return PairedTimes((4.0, 6.0), (1.0, 1.5))

    monkeypatch.setattr(clocks, "time_stacks", time_stacks)
    clock = FFNClock(model[0], 24, train=train, repeats=3)
    assert [clock.ratio(config) for config in (None, CONFIG, CONFIG)] == [1.0, 0.25, 0.25]
    ((dense, sparse, shape, repeats),) = timed
    assert (shape, repeats) == ((24, 32), 3)
    # In training both are gradients: of two layers' kernels, and of the activations.
    assert isinstance(dense, tuple) == isinstance(sparse, tuple) == train
    assert clock.speedup([CONFIG, None]) == 4.0
    assert len(timed) == 2


def test_what_is_left_to_the_ffns_of_a_faster_model(model, monkeypatch):
    windows = np.zeros((2, 13), np.int32)
    clock = FFNClock(model[0], 24)
    monkeypatch.setattr(clock, "dense_seconds", lambda: 2.0)
    monkeypatch.setattr(clocks, "time_in_turn", lambda *_, **__: [(9.0, 10.0, 11.0)])
    whole = ModelClock(*model, windows, clock)
    # The whole takes 5 dense FFNs, 2 of which are the FFNs.
    assert whole.ffn_budget(1.25) == pytest.approx(1.0)


def test_a_planned_model_is_timed_with_its_own_ffns(model, monkeypatch):
    windows = np.random.default_rng(0).integers(VOCAB, size=(2, 13))
    losses = []

    def time_pair(dense, sparse, *, repeats):
        losses.extend([dense(), sparse()])
        return PairedTimes((3.0,), (2.0,))

    monkeypatch.setattr(clocks, "time_pair", time_pair)
    clock = FFNClock(model[0], 24, repeats=1)
    assert ModelClock(*model, windows, clock).speedup([None, CONFIG]) == 1.5
    dense, sparse = losses
    assert dense == pytest.approx(sf.evaluate_loss(*model, windows, batch_size=2))
    assert sparse != dense


def test_a_planned_model_is_trained_with_its_own_ffns(model, monkeypatch):
    windows = np.random.default_rng(0).integers(VOCAB, size=(2, 13))
    losses = []

    def time_pair(dense, sparse, *, repeats):
        losses.extend(float(run()["loss"]) for run in (dense, sparse, dense))
        return PairedTimes((3.0,), (2.0,))

    monkeypatch.setattr(clocks, "time_pair", time_pair)
    clock = FFNClock(model[0], 24, train=True, repeats=1)
    whole = ModelClock(*model, windows, clock, train=True, repeats=1)
    assert whole.speedup([None, CONFIG]) == 1.5
    dense, sparse, later = losses
    # The steps that were timed before have trained on these very windows.
    fresh = sf.evaluate_loss(*model, windows, batch_size=2)
    assert later < dense < fresh
    # The sparse model's first step, by other FFNs.
    assert sparse != pytest.approx(fresh, rel=1e-6)


def test_prices_of_a_core_and_a_bypass_add_up():
    true = {(w, r): 0.1 + w / 80 + (r > 0) / 20 + r / 50 for w in (8, 16, 64) for r in (0, 4, 8)}
    measured = {size: true[size] for size in [(8, 0), (16, 0), (8, 4), (64, 8)]}
    assert smooth_prices(measured, list(true)) == pytest.approx(true)


def test_noise_of_the_clock_makes_no_size_cheap():
    rng = np.random.default_rng(0)
    widths, ranks = range(16, 385, 16), (0, 8, 16, 24)
    true = {(w, r): 0.1 + w / 480 + (0.02 + r / 240) * (r > 0) for w in widths for r in ranks}
    noisy = {size: time * float(np.exp(rng.normal(0, 0.15))) for size, time in true.items()}
    prices = smooth_prices(noisy, list(true))
    for (width, rank), price in prices.items():
        assert price < prices.get((width + 16, rank), np.inf)
        assert price < prices.get((width, rank + 8), np.inf)

    def worst(times):
        return max(abs(np.log(times[size] / time)) for size, time in true.items())

    assert worst(prices) < 0.5 * worst(noisy)


def test_the_prices_of_all_sizes_come_from_some_of_them(model, monkeypatch):
    spec, timed = model[0].spec, []

    def ratio(_, config):
        width, rank = config.micro.core.width, config.spectral.rank if config.spectral else 0
        timed.append((width, rank))
        return width / 100 + rank / 50

    monkeypatch.setattr(FFNClock, "ratio", ratio)
    sizes = [(88, 0)] + [(w, r) for r in (0, 4, 8) for w in range(8, 81 - 2 * r, 8)]
    seen = []
    configs = [config_of(spec, size) for size in sizes]
    prices = FFNClock(model[0], 24).prices(configs, lambda *counts: seen.append(counts))
    assert set(timed) == {(w, 0) for w in range(8, 81, 8)} | {
        (8, 4), (40, 4), (72, 4), (8, 8), (40, 8), (64, 8)}  # fmt: skip
    assert seen[-1] == (16, 16)
    assert prices[None] == 1.0
    wanted = {config_of(spec, (w, r)): w / 100 + r / 50 for w, r in sizes[1:]}
    assert prices == pytest.approx({None: 1.0, **wanted})
