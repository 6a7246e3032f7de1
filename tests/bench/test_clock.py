"""The prices of a plan: what is measured, how often, and what follows for a whole model."""

import numpy as np
import pytest
from tiny_models import VOCAB, make_model

import sparseffn_jax as sf
from sparseffn_jax.bench import clock as clocks
from sparseffn_jax.bench.clock import FFNClock, ModelClock
from sparseffn_jax.measure.timing import PairedTimes

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
    # With --train both are gradients: of two layers' kernels, and of the activations.
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
    with pytest.raises(ValueError, match=r"without any FFN the model would be 1\.67 times"):
        whole.ffn_budget(1.7)


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
