"""Kernels of block-circulant layers: in Pallas's interpreter, as compiled, and where they run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import (
    assert_close,
    circulant,
    circulant_reference,
    draw,
    has_imag,
    phi_of,
    value_and_vjp,
)

import sparseffn_jax as sf
from sparseffn_jax.measure.gpus import compile_for, gpus
from sparseffn_jax.ops import block_circulant, fused_circulant
from sparseffn_jax.ops.filters import Blocks, Filter
from sparseffn_jax.ops.hidden import Activate, Channels, HiddenMaps
from sparseffn_jax.ops.plans.kernels import Target, compiling_for

PLAIN, SILU = Activate("tanh"), Activate("silu")
POLYNOMIAL = Activate("tanh", (0, 1, 2, 4), 1.5)
# Tokens, input and hidden blocks, block size, frequencies, function, maps, biases, groups of
# coefficients. Sides that no tile divides; DC and Nyquist together, alone, and neither.
LAYERS = {
    "all frequencies": (100, 5, 18, 16, range(9), PLAIN, 1, True, 0),
    "gated": (70, 48, 16, 8, (0, 2, 3), SILU, 2, False, 0),
    "gated with biases": (64, 16, 20, 8, (1, 4), SILU, 2, True, 0),
    "polynomial": (40, 16, 16, 4, range(3), POLYNOMIAL, 1, True, 1),
    "gated polynomial": (40, 3, 16, 16, (3, 5), POLYNOMIAL, 2, False, 256),
    "DC alone": (65, 16, 16, 2, (0,), PLAIN, 1, True, 0),
}


def operands_of(name, dtype):
    tokens, p, q, b, frequencies, activate, maps, has_biases, groups = LAYERS[name]
    frequencies = tuple(frequencies)
    sides = len(frequencies), len(has_imag(b, frequencies))
    (x, dz), exact = draw(0, (tokens, p * b), (tokens, q * b), dtype=dtype)
    # Weights of the size of trained ones, so that sums over blocks stay near 1.
    filters, biases = [], []
    for seed in range(1, maps + 1):
        shapes = [(side, p, q) for side in sides]
        filters.append(draw(seed, *shapes, dtype=dtype, scale=(p * b) ** -0.5))
        biases.append(draw(-seed % 97, (q * b,), dtype=dtype, scale=0.5))
    coefficients = draw(5, (len(activate.degrees), groups), dtype=dtype) if groups else None

    def pick(i):
        return (
            [Filter(*filter[i]) for filter in filters],
            [bias[i][0] for bias in biases] if has_biases else [],
            coefficients and coefficients[i][0],
        )

    return Blocks(b, frequencies), activate, (x, *pick(0), dz), (exact[0], *pick(1), exact[1])


def layer_of(blocks, activate, *, interpret):
    """A layer whose map out of the hidden units takes their kept part, as it is."""

    def layer(x, filters, biases, coefficients):
        components = fused_circulant.enter(blocks, interpret, x)
        z = fused_circulant.hidden_components(
            *(components, filters, blocks, activate, Channels(tuple(biases), coefficients)),
            interpret=interpret,
        )
        return fused_circulant.leave(blocks, interpret, z)

    return layer


def kept_part(h, blocks):
    """What of the channels lies in the kept frequencies: the map is its own transpose."""
    b, frequencies = blocks
    spectrum = np.fft.rfft(h.reshape(len(h), -1, b))
    dropped = np.setdiff1d(np.arange(b // 2 + 1), frequencies)
    spectrum[..., dropped] = 0.0
    return np.fft.irfft(spectrum, n=b).reshape(h.shape)


def reference(blocks, activate, x, filters, biases, coefficients, dy):
    """The layer's outputs and the gradients of all that is given, by hand, in float64."""
    us = [circulant(x, *filter, *blocks) for filter in filters]
    us = [u + bias for u, bias in zip(us, biases, strict=True)] if biases else us
    phi, slope, terms = phi_of(activate, us[0], coefficients)
    hidden = phi * us[1] if len(us) == 2 else phi
    dh = kept_part(dy, blocks)
    d_phi = dh * us[1] if len(us) == 2 else dh
    dus = [d_phi * slope, dh * phi][: len(us)]
    bars = [
        circulant_reference(x, *filter, *blocks, du)[1]
        for filter, du in zip(filters, dus, strict=True)
    ]
    by_unit = np.array([(d_phi * term).sum(0) for term in terms])
    shared = coefficients is not None and coefficients.shape[1] == 1
    return kept_part(hidden, blocks), (
        sum(bar[0] for bar in bars),
        [bar[1:] for bar in bars],
        [du.sum(0) for du in dus] if biases else [],
        None if not terms else by_unit.sum(1, keepdims=True) if shared else by_unit,
    )


def assert_equals_float64(name, dtype, *, interpret):
    blocks, activate, (*given, dy), exact = operands_of(name, dtype)
    layer = layer_of(blocks, activate, interpret=interpret)
    y, bars = value_and_vjp(layer, given, dy)
    expected, gradients = reference(blocks, activate, *exact)
    assert y.dtype == dtype
    assert_close(y, expected, dtype, "outputs")
    found, wanted = jax.tree.leaves(bars), jax.tree.leaves(gradients)
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.dtype == dtype
        assert_close(one, other, dtype, f"gradient {i}")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in LAYERS), ("all frequencies", "bfloat16")],
)
def test_equals_float64(name, dtype):
    assert_equals_float64(name, dtype, interpret=True)


@pytest.mark.usefixtures("kernels_on_gpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_float64_on_a_gpu(name, dtype):
    assert_equals_float64(name, dtype, interpret=False)


def test_a_layer_is_the_same_by_this_plan():
    def run(plan):
        branch = sf.SpectralConfig("block_circulant", 96, block_size=8, implementation=plan)
        layer = sf.SparseFFN(sf.SparseFFNConfig(48, 96, spectral=branch), dtype=jnp.bfloat16)
        x = jax.random.normal(jax.random.key(0), (2, 33, 48), jnp.bfloat16)
        variables = jax.jit(layer.init)(jax.random.key(1), x)
        packed = layer.apply(layer.pack(variables, 66), x)
        results = value_and_vjp(layer.apply, (variables, x), jnp.cos(x))
        return jax.tree.leaves((packed, results))

    for one, other in zip(run("fused"), run("dense"), strict=True):
        assert_close(one, other, "bfloat16", factor=2.0)


# Large blocks spill some registers. That is better than to compute products twice, and half as many
# threads take an H200 two thirds of the time of twice as many, which would not spill.
COMPILED = {
    "GPT-2": (768, 3072, 16, False, Activate("gelu_new"), False),
    "gated": (1024, 2816, 8, True, SILU, True),
    "gated, large blocks": (4096, 11008, 16, True, SILU, False),
}


@pytest.mark.usefixtures("optimizations")
@pytest.mark.parametrize("name", COMPILED)
def test_is_compiled_for_hopper(name):
    d_model, d_ff, b, gated, activate, without_spills = COMPILED[name]
    blocks, h100 = Blocks(b, tuple(range(b // 2 + 1))), gpus()["h100"].devices()[0, 0]
    assert fused_circulant.refusal(blocks, activate, jnp.dtype(jnp.bfloat16)) is None
    here = jax.sharding.SingleDeviceSharding(h100)

    def shape(*sides):
        return jax.ShapeDtypeStruct(sides, jnp.bfloat16, sharding=here)

    def gradient(dy, *given):
        y, pullback = jax.vjp(layer_of(blocks, activate, interpret=False), *given)
        return y, pullback(dy)

    p, q, tokens, maps = d_model // b, d_ff // b, 4096, 2 if gated else 1
    filter = Filter(shape(b // 2 + 1, p, q), shape(b // 2 - 1, p, q))
    biases = [] if gated else [shape(d_ff)]
    given = (shape(tokens, d_model), [filter] * maps, biases, None)
    traced = jax.jit(gradient).trace(shape(tokens, d_ff), *given)
    with jax.default_device(h100):
        lowered = traced.lower(lowering_platforms=("cuda",))
    option = "xla_gpu_fail_ptx_compilation_on_register_spilling"
    compiled = lowered.compile(compiler_options={option: without_spills})
    kernels = ("enter_kernel", "circulant_kernel", "circulant_gradients_kernel", "leave_kernel")
    assert all(kernel in compiled.as_text() for kernel in kernels)


@pytest.mark.usefixtures("optimizations")
def test_the_estimate_is_below_that_of_a_dense_layer():
    h100, x = gpus()["h100"], jax.ShapeDtypeStruct((16384, 768), jnp.bfloat16)

    def seconds(**parts):
        config = sf.SparseFFNConfig(768, 3072, "silu", **parts)
        layer = sf.SparseFFN(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)

        def training(variables, x, dy):
            return jax.vjp(layer.apply, variables, x)[1](dy)

        forward = compile_for(h100, layer.apply, variables, x)
        return np.array(
            [h100.seconds(forward), h100.seconds(compile_for(h100, training, variables, x, x))]
        )

    dense = seconds(micro=sf.MicroRefinementConfig(sf.CoreConfig(3072)))
    ours = seconds(spectral=sf.SpectralConfig("block_circulant", 3072, block_size=16))
    # An H200 measured 1.12 and 1.17.
    assert (dense / ours > 1.0).all(), dense / ours


def test_it_is_chosen_where_it_pays():
    blocks = Blocks(16, tuple(range(9)))

    def is_fused(tokens, p=48, q=192, maps=1, dtype="bfloat16", activation="silu", platform="gpu"):
        up, down = (
            Filter(*(jax.ShapeDtypeStruct((f, *sides), dtype) for f in (9, 7)))
            for sides in ((p, q), (q, p))
        )
        weights, activate = HiddenMaps((up,) * maps, down), Activate(activation)
        with compiling_for(Target("9.0", 1, [])):
            return block_circulant.choose(tokens, weights, blocks, activate, platform).is_fused

    assert is_fused(16384)
    assert not is_fused(1)
    # At LLaMA's width products are most of the work, and XLA's are faster.
    assert not is_fused(8192, p=256, q=688, maps=2)
    assert not is_fused(16384, dtype="float32")
    assert not is_fused(16384, activation="gelu")
    assert not is_fused(16384, platform="cpu")


@pytest.mark.parametrize(
    ("size", "activate", "dtype", "reason"),
    [
        (32, SILU, jnp.bfloat16, r"blocks of 2, 4, 8, 16 channels, not 32"),
        (6, SILU, jnp.bfloat16, r"blocks of 2, 4, 8, 16 channels, not 6"),
        (8, SILU, jnp.float32, r"bfloat16 or float16, not float32"),
        (8, Activate("gelu"), jnp.bfloat16, r"does not have the error function"),
    ],
)
def test_what_it_cannot_run_it_refuses(size, activate, dtype, reason):
    refusal = fused_circulant.refusal(Blocks(size, (0, 1)), activate, jnp.dtype(dtype))
    assert refusal is not None
    assert re.search(reason, refusal)
