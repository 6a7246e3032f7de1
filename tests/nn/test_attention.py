"""Attention without a cache, in blocks of queries, against NumPy in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close

from sparseffn_jax.measure.gpus import compile_for, gpus
from sparseffn_jax.measure.programs import TRITON
from sparseffn_jax.nn import attention
from sparseffn_jax.nn.attention import CausalAttention
from sparseffn_jax.ops.plans.choice import refusing

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


class Attention(CausalAttention):
    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.attend(*args, **kwargs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"window": 64}, {"scale": 0.3}])
@pytest.mark.parametrize("padding", [None, 4])
def test_a_cache_that_begins_is_that_of_an_empty_one_without_attending_to_it(
    monkeypatch, dtype, settings, padding
):
    monkeypatch.setattr(attention, "_LEAST_BLOCK", 4)
    arrays, length = [jnp.asarray(x, dtype) for x in draw()], T + 6
    empty = {
        "cached_key": jnp.zeros((B, length, G, K), dtype),
        "cached_value": jnp.zeros((B, length, G, K), dtype),
        "cache_index": jnp.int32(0),
    }
    is_token = None
    if padding is not None:
        is_token = jnp.ones((B, length), jnp.int32).at[0, :padding].set(0)

    def read(begins, arrays):
        mask = is_token[:, :T] if begins and is_token is not None else is_token
        return Attention().apply(
            *({"cache": empty}, *arrays, mask, True, begins),
            **settings, mutable=["cache"],
        )  # fmt: skip

    (quick, quick_cache), (slow, slow_cache) = (read(begins, arrays) for begins in (True, False))
    jax.tree.map(np.testing.assert_array_equal, quick_cache, slow_cache)
    # What a row of padding computes is of no use.
    eps = float(jnp.finfo(dtype).eps)
    quick, slow = (np.asarray(x, np.float32) for x in (quick, slow))
    np.testing.assert_allclose(quick[1], slow[1], rtol=4 * eps, atol=4 * eps)
    np.testing.assert_allclose(quick[0, padding:], slow[0, padding:], rtol=4 * eps, atol=4 * eps)
    weights = f"{T},{length}]"
    assert weights in str(jax.make_jaxpr(functools.partial(read, False))(arrays))
    assert weights not in str(jax.make_jaxpr(functools.partial(read, True))(arrays))


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


@pytest.mark.parametrize("heads", [4, 2])
def test_the_kernel_for_gpus_is_exact_forward_and_backward(heads):
    tokens, width = 256, 32
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, tokens, h, width)) for h in (4, heads, heads)]
    given = [jnp.asarray(x, jnp.float32) for x in arrays]
    weights = jnp.asarray(rng.standard_normal((2, tokens, 4, width)), jnp.float32)

    def loss(attend, *arrays):
        return jnp.vdot(attend(*arrays), weights)

    def plain(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, scale=0.2, is_causal=True)

    kernel = functools.partial(attention.flash_attention, scale=0.2, interpret=True)
    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1, 2)))(*given)
        for f in (kernel, plain)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


# Kernel, tokens, key/value heads, head width, window.
@pytest.mark.usefixtures("kernels_on_gpu")
@pytest.mark.parametrize(
    ("name", "tokens", "heads", "width", "window"),
    [
        ("flash", 384, 4, 64, None),
        ("flash", 384, 2, 80, None),
        ("flash", 256, 1, 128, None),
        ("cudnn", 384, 4, 64, None),
        ("cudnn", 250, 2, 80, None),
        ("cudnn", 334, 1, 128, None),
        ("cudnn", 384, 2, 128, 100),
    ],
)
def test_a_kernel_equals_float32_on_a_gpu(name, tokens, heads, width, window):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, tokens, h, width)) for h in (4, heads, heads)]
    given = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    slope = jnp.asarray(rng.standard_normal((2, tokens, 4 * width)), jnp.bfloat16)

    def gradient(slope, *arrays):
        out, pullback = jax.vjp(functools.partial(attend, window=window), *arrays)
        return out, pullback(slope)

    names = {"flash", "cudnn"} - {name}
    with refusing({("attention", other): "another is tested" for other in names}):
        compiled = jax.jit(gradient).lower(slope, *given).compile()
    assert ("mha_backward" if name == "flash" else "__cudnn$fmha") in compiled.as_text()
    found = compiled(slope, *given)
    exact = [x.astype(jnp.float32) for x in (slope, *given)]
    wanted = jax.jit(gradient)(*exact)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(one, other, "bfloat16")


# Tokens, head width, and whether there is padding or a window.
@pytest.mark.parametrize(
    ("tokens", "width", "settings", "is_flash"),
    [
        (256, 64, {}, True),
        (256, 128, {}, True),
        (256, 16, {}, True),
        (256, 80, {}, True),
        (256, 8, {}, False),
        (250, 64, {}, False),
        (256, 256, {}, False),
        (256, 64, {"window": 100}, False),
        (256, 64, {"window": 256}, True),
    ],
)
def test_a_gpu_runs_the_kernel_where_it_fits(tokens, width, settings, is_flash):
    arrays = [jax.ShapeDtypeStruct((2, tokens, h, width), jnp.bfloat16) for h in (4, 2, 2)]
    gpu = gpus()["h100"]

    def attend_here(*arrays):
        out, pullback = jax.vjp(functools.partial(attend, **settings), *arrays)
        return pullback(out)

    program = compile_for(gpu, attend_here, *arrays)
    assert any(kernel.kind in TRITON for kernel in program.kernels) == is_flash
    with refusing({("attention", "flash"): "the tokens are divided among devices"}):
        program = compile_for(gpu, attend_here, *arrays)
    assert not any(kernel.kind in TRITON for kernel in program.kernels)
