import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseffn_jax.config import CoreConfig, MicroRefinementConfig, SparseFFNConfig, SpectralConfig
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.sparsify.closed_form import Moments
from sparseffn_jax.sparsify.dense import DenseFFN, Linear
from sparseffn_jax.sparsify.fit import fit_layer
from sparseffn_jax.sparsify.streams import LayerActivations

D, CURVED, STRAIGHT, RANK = 8, 6, 10, 3


@pytest.fixture
def partly_linear():
    """An FFN some of whose units are linear on all inputs, of few directions but loud."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(D, RANK)) @ rng.normal(size=(RANK, STRAIGHT))
    up = np.hstack([rng.normal(size=(D, CURVED)), 0.2 * directions])
    # GELU of a number above 6 is the number itself.
    bias = np.append(np.zeros(CURVED), np.full(STRAIGHT, 12.0))
    down = (
        rng.normal(size=(CURVED + STRAIGHT, D))
        * np.append(np.ones(CURVED), [9.0] * STRAIGHT)[:, None]
    )
    dense = DenseFFN((Linear(up, bias),), Linear(down, rng.normal(size=D)), "gelu_new")
    x = rng.normal(size=(3000, D)).astype(np.float32)
    return dense, x, np.asarray(dense(jnp.asarray(x)))


def test_units_are_chosen_given_what_the_bypass_explains(partly_linear):
    dense, x, target = partly_linear
    config = SparseFFNConfig(
        D,
        CURVED + STRAIGHT,
        spectral=SpectralConfig("low_rank", rank=RANK),
        micro=MicroRefinementConfig(CoreConfig(CURVED)),
    )
    config, params = fit_layer(dense, config, LayerActivations(x, target))
    np.testing.assert_allclose(
        params["core"]["up"]["kernel"], dense.up_maps[0].weight[:, :CURVED], rtol=1e-6
    )
    output = jax.jit(SparseFFN(config).apply)({"params": params}, x)
    error = np.sum((output - target) ** 2) / np.sum((target - target.mean(0)) ** 2)
    assert error < 1e-6


def test_moments_without_components_are_those_without_the_mapped_features():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(500, 6)) + 1.0, rng.normal(size=(500, 2))
    x[:, 3:] += x[:, :3]
    axes = rng.normal(size=(3, 2))
    rows, given = np.array([3, 5, 0, 1, 2]), slice(2, None)
    ours = Moments.of([(x, y)]).select(rows).without(slice(0, 2), given, axes)
    mapped = Moments.of([(np.hstack([x[:, [3, 5]], x[:, :3] @ axes]), y)])
    theirs = mapped.without(slice(0, 2), given)
    for actual, expected in zip(vars(ours).values(), vars(theirs).values(), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
