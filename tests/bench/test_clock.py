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

    def time_stacks(baseline, candidate, x, *, repeats, least_seconds):
        timed.append((baseline(x), candidate(x), x.shape, repeats))
        assert least_seconds > 0.0
        return PairedTimes((4.0, 6.0), (1.0, 1.5))

    monkeypatch.setattr(clocks, "time_stacks", time_stacks)
    clock = FFNClock(model[0], 24, train=train, repeats=3)
    assert [clock.pair(CONFIG).speedup for _ in range(2)] == [4.0, 4.0]
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

    def time_pair(dense, sparse, **_):
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

    def time_pair(dense, sparse, **_):
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


def pairs_of(times, noise=0.0, repeats=40):
    """Returns pairs of runs that took so long, the dense one's time being 1."""
    rng = np.random.default_rng(0)
    return {
        size: PairedTimes((1.0,) * repeats, tuple(time * np.exp(rng.normal(0, noise, repeats))))
        for size, time in times.items()
    }


def test_prices_of_a_core_and_a_bypass_add_up():
    true = {(w, r): 0.1 + w / 80 + (r > 0) / 20 + r / 50 for w in (8, 16, 64) for r in (0, 4, 8)}
    measured = pairs_of({size: true[size] for size in [(8, 0), (16, 0), (8, 4), (64, 8)]})
    assert smooth_prices(measured, list(true)) == pytest.approx(true)


def test_a_width_that_suits_the_machine_is_cheap_with_a_bypass_and_without():
    widths = range(16, 385, 16)

    def time(width, rank):
        return (0.9 if width % 64 == 0 else 1.1) * width / 400 + rank / 240

    timed = [(w, 0) for w in widths] + [(16, 8), (384, 8)]
    exact = smooth_prices(
        pairs_of({s: time(*s) for s in timed}), [(w, r) for w in widths for r in (0, 8)]
    )
    for size, price in exact.items():
        assert price == pytest.approx(time(*size), rel=0.03)

    # The step of a width whose times scatter widely around the same median counts for less.
    pairs = pairs_of({s: time(*s) for s in timed})
    scattered = tuple(time(128, 0) * np.array([0.6, 0.7, 1.0, 1.3, 1.4]))
    pairs[128, 0] = PairedTimes((1.0,) * 5, scattered)
    prices = smooth_prices(pairs, list(exact))
    assert 1.05 * exact[128, 0] < prices[128, 0] < 1.15 * exact[128, 0]
    assert prices[144, 0] == pytest.approx(exact[144, 0], rel=0.03)


def test_noise_of_the_clock_makes_no_size_cheap():
    widths, ranks = range(16, 385, 16), (0, 8, 16, 24)
    true = {(w, r): 0.1 + w / 480 + (0.02 + r / 240) * (r > 0) for w in widths for r in ranks}
    measured = pairs_of(true, noise=0.3, repeats=7)
    noisy = {size: 1.0 / pair.speedup for size, pair in measured.items()}
    prices = smooth_prices(measured, list(true))

    def worst(times):
        return max(abs(np.log(times[size] / time)) for size, time in true.items())

    assert worst(prices) < 0.5 * worst(noisy)


def test_the_prices_of_all_sizes_come_from_some_of_them(model, monkeypatch):
    spec, timed = model[0].spec, []

    def pair(_, config):
        width, rank = config.micro.core.width, config.spectral.rank if config.spectral else 0
        timed.append((width, rank))
        return PairedTimes((100.0,) * 3, (width + 2.0 * rank,) * 3)

    monkeypatch.setattr(FFNClock, "pair", pair)
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
