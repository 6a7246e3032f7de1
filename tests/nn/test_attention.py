"""Attention without a cache, in blocks of queries, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseffn_jax.nn import attention
from sparseffn_jax.nn.attention import CausalAttention

B, T, H, G, K = 2, 11, 6, 3, 4


def reference(query, key, value, mask, scale):
    groups = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x, groups, axis=2) for x in (key, value))
    logits = np.where(mask, scale * np.einsum("bthk,bshk->bhts", query, key), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshk->bthk", weights, value).reshape(B, T, -1)


def draw():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, T, heads, K)) for heads in (H, G, G)]


def attend(query, key, value, padding=None, **settings):
    return CausalAttention().apply(
        {}, query, key, value, padding, True, False, method="attend", **settings
    )


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"scale": 0.3}])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_of_queries_are_exact(monkeypatch, size, settings, padded):
    monkeypatch.setattr(attention, "_LEAST_BLOCK", size)
    arrays = draw()
    behind = np.arange(T)[:, None] - np.arange(T)
    mask = np.broadcast_to((behind >= 0) & (behind < settings.get("window", T)), (B, 1, T, T))
    padding = None
    if padded:
        # The last token only: every row of queries still sees a key.
        padding = np.ones((B, T), np.int32)
        padding[1, -1] = 0
        mask = mask & padding[:, None, None, :].astype(bool)
        # What a padded token itself computes is of no use.
        mask = mask | np.eye(T, dtype=bool)
    got = attend(*(jnp.asarray(x, jnp.float32) for x in arrays), padding, **settings)
    wanted = reference(*arrays, mask, settings.get("scale", K**-0.5))
    real = slice(None, -1) if padded else slice(None)
    np.testing.assert_allclose(got[:, real], wanted[:, real], rtol=1e-5, atol=1e-6)


def test_rows_of_padding_stay_finite_and_gradients_are_those_of_one_block(monkeypatch):
    arrays = [jnp.asarray(x, jnp.float32) for x in draw()]
    padding = jnp.ones((B, T), jnp.int32).at[0, :5].set(0)

    def loss(arrays):
        return jnp.sum(jnp.sin(attend(*arrays, padding))[:, 5:])

    gradients = []
    for size in (3, 64):
        monkeypatch.setattr(attention, "_LEAST_BLOCK", size)
        gradients.append(jax.grad(loss)(arrays))
    assert all(np.isfinite(part).all() for part in gradients[0])
    for blocks, whole in zip(*gradients, strict=True):
        np.testing.assert_allclose(blocks, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_reduced_precision_computes_in_float32(dtype):
    arrays = [jnp.asarray(x, dtype) for x in draw()]
    exact = reference(*(np.asarray(x, np.float64) for x in arrays), np.tri(T, dtype=bool), K**-0.5)
    got = attend(*arrays)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=jnp.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_no_weights_are_stored_for_the_backward_pass(dtype):
    shapes = [(1, 512, heads, 8) for heads in (2, 1, 1)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    def residuals(*arrays):
        return jax.vjp(lambda *a: attend(*a), *arrays)[1]

    saved = jax.tree.leaves(jax.eval_shape(residuals, *arrays))
    floats = [leaf.size for leaf in saved if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert max(floats) <= 2 * 512 * 8
