"""The Monarch FFN against its definition, and its closed-form start against random others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, draw

from sparseffn_jax.bench.monarch import MonarchConfig, MonarchFFN, fit_monarch
from sparseffn_jax.sparsify.dense import DenseFFN, Linear
from sparseffn_jax.sparsify.streams import LayerActivations

D, M = 16, 48
MAPS = ("up", "down")
FITTING = {"d_model": D, "d_ff": M, "activation": "relu", "blocks": 4, "rank": 2}


def gelu_new(x):
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def matrix(part, n, r):
    """The dense matrix of a map, block by block: ``axes_ij filter_ij``."""
    axes, filter = (np.asarray(part[name], np.float64) for name in ("axes", "filter"))
    rows = []
    for i in range(n):
        blocks = [
            axes[i][:, j * r : (j + 1) * r] @ filter[j][i * r : (i + 1) * r] for j in range(n)
        ]
        rows.append(np.concatenate(blocks, axis=1))
    return np.concatenate(rows)


def reference(params, config, x):
    u = x @ matrix(params["up"], config.blocks, config.rank) + params["up_bias"]
    down = matrix(params["down"], config.blocks, config.rank)
    return gelu_new(u) @ down + params["bias"]


def test_is_low_rank_in_every_block():
    config = MonarchConfig(D, M, "gelu_new", blocks=4, rank=2)
    (x,), (x64,) = draw(0, (2, 5, D))
    layer = MonarchFFN(config)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    assert_close(layer.apply({"params": params}, x), reference(params, config, x64))
    weights = sum(params[part][name].size for part in ("up", "down") for name in params[part])
    assert weights / (2 * D * M) == pytest.approx(config.flops_ratio)


@pytest.fixture(scope="module")
def dense():
    rng = np.random.default_rng(0)
    up = Linear(rng.standard_normal((D, M)) / 4.0, rng.standard_normal(M) / 4.0)
    down = Linear(rng.standard_normal((M, D)) / 4.0, rng.standard_normal(D) / 4.0)
    return DenseFFN((up,), down, "gelu_new")


def error(dense, config, params, x):
    target, output = dense(x), reference(params, config, x.astype(np.float64))
    return np.sum((target - output) ** 2) / np.sum((target - target.mean(0)) ** 2)


def seen(dense, x):
    return LayerActivations(x, np.asarray(dense(x)))


def test_a_gated_one_without_biases_loses_nothing_at_full_rank():
    rng = np.random.default_rng(0)
    gate, up, down = (
        Linear(rng.standard_normal(shape) / 4.0, np.zeros(shape[1]))
        for shape in ((D, M), (D, M), (M, D))
    )
    dense = DenseFFN((gate, up), down, "gelu_new")
    x = rng.standard_normal((2000, D)).astype(np.float32)
    config = MonarchConfig(D, M, "gelu_new", blocks=4, rank=4, gated=True, bias=False)
    params = fit_monarch(dense, config, seen(dense, x))
    layer = MonarchFFN(config)
    fresh = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)
    wanted = (gelu_new(x @ gate.weight) * (x @ up.weight)) @ down.weight
    output = layer.apply({"params": params}, x)
    assert np.sum((output - wanted) ** 2) / np.sum(wanted**2) < 1e-3


def test_full_rank_loses_nothing(dense):
    x = np.random.default_rng(1).standard_normal((2000, D)).astype(np.float32)
    config = MonarchConfig(D, M, "gelu_new", blocks=4, rank=4)
    assert error(dense, config, fit_monarch(dense, config, seen(dense, x)), x) < 1e-3


def test_the_start_is_the_better_the_higher_the_rank(dense):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((2000, D)) @ rng.standard_normal((D, D)) / 4.0).astype(np.float32)
    errors = []
    for rank in (1, 2, 3):
        config = MonarchConfig(D, M, "gelu_new", blocks=4, rank=rank)
        errors.append(error(dense, config, fit_monarch(dense, config, seen(dense, x)), x))
    assert errors[0] < 1.0
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": 3}, "blocks=3 do not divide d_model=16"),
        ({"blocks": 16, "d_ff": 40}, "blocks=16 do not divide d_ff=40"),
        ({"rank": 5}, "rank=5 must lie between 1 and 4"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        MonarchConfig(
            **({"d_model": D, "d_ff": M, "activation": "relu", "blocks": 4, "rank": 2} | change)
        )


def test_half_precision():
    config = MonarchConfig(D, M, "gelu_new", blocks=4, rank=2)
    x = jnp.ones((3, D), jnp.bfloat16)
    layer = MonarchFFN(config, jnp.bfloat16)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}
