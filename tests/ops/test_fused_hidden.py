"""The kernel that keeps hidden units on the chip: in Pallas's interpreter, and as compiled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import DTYPES, assert_close, draw, phi_of

from sparseffn_jax.measure.flops import count_kernels
from sparseffn_jax.measure.gpus import gpus
from sparseffn_jax.ops import fused_hidden
from sparseffn_jax.ops.hidden import Activate, Channels

PLAIN, SILU = Activate("tanh"), Activate("silu")
POLYNOMIAL = Activate("tanh", (0, 1, 2, 4), 1.5)
# Tokens, ranks into the hidden units, hidden units, rank out of them, function, biases, groups of
# coefficients. Sides that no tile divides; ranks in one piece and in several.
LAYERS = {
    "plain": (100, (24,), 96, 40, PLAIN, True, 0),
    "gated": (300, (16, 40), 100, 48, SILU, False, 0),
    "gated with biases": (64, (16, 16), 64, 16, SILU, True, 0),
    "polynomial": (70, (20,), 64, 17, POLYNOMIAL, True, 1),
    "gated polynomial": (600, (16, 16), 72, 16, POLYNOMIAL, False, 72),
    "wide": (64, (300,), 64, 150, PLAIN, False, 0),
}


def reference(activate, components, filters, axes, biases, coefficients, dz):
    """The layer's outputs and the gradients of all that is given, by hand, in float64."""
    us = [c @ f for c, f in zip(components, filters, strict=True)]
    us = [u + bias for u, bias in zip(us, biases, strict=True)] if biases else us
    phi, slope, terms = phi_of(activate, us[0], coefficients)
    hidden = phi * us[1] if len(us) == 2 else phi
    dh = dz @ axes.T
    d_phi = dh * us[1] if len(us) == 2 else dh
    dus = [d_phi * slope, dh * phi][: len(us)]
    by_unit = np.array([(d_phi * term).sum(0) for term in terms])
    shared = coefficients is not None and coefficients.shape[1] == 1
    return hidden @ axes, (
        [du @ f.T for du, f in zip(dus, filters, strict=True)],
        [c.T @ du for c, du in zip(components, dus, strict=True)],
        hidden.T @ dz,
        [du.sum(0) for du in dus] if biases else [],
        None if not terms else by_unit.sum(1, keepdims=True) if shared else by_unit,
    )


def operands_of(name, dtype):
    tokens, ranks, units, rank, activate, has_biases, groups = LAYERS[name]
    maps, terms = len(ranks), len(activate.degrees)
    shapes = [
        *((tokens, r) for r in ranks),
        *((r, units) for r in ranks),
        (units, rank),
        *([(units,)] * maps if has_biases else []),
        *([(terms, groups)] if groups else []),
        (tokens, rank),
    ]
    arrays = []
    for seed, shape in enumerate(shapes):
        # Weights of the size of trained ones, so that sums over ranks stay near 1.
        is_weight = maps <= seed <= 2 * maps
        (array,), _ = draw(seed, shape, dtype=dtype, scale=shape[0] ** -0.5 if is_weight else 1.0)
        arrays.append(array)

    def grouped(arrays):
        *rest, dz = arrays
        biases = rest[2 * maps + 1 : 3 * maps + 1] if has_biases else []
        coefficients = rest[-1] if groups else None
        return rest[:maps], rest[maps : 2 * maps], rest[2 * maps], biases, coefficients, dz

    exact = grouped([np.asarray(array, np.float64) for array in arrays])
    return activate, grouped(arrays), exact


def assert_equals_float64(name, dtype, *, interpret):
    activate, (*given, dz), exact = operands_of(name, dtype)

    def layer(components, filters, axes, biases, coefficients):
        channels = Channels(tuple(biases), coefficients)
        return fused_hidden.hidden_layer(
            components, filters, axes, activate, channels, interpret=interpret
        )

    z, pullback = jax.vjp(layer, *given)
    expected, gradients = reference(activate, *exact)
    assert z.dtype == dtype
    assert_close(z, expected, dtype, "outputs")
    found = jax.tree.leaves(pullback(dz))
    wanted = jax.tree.leaves(gradients)
    assert len(found) == len(wanted)
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.dtype == dtype
        assert_close(one, other, dtype, f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_float64(name, dtype):
    assert_equals_float64(name, dtype, interpret=True)


@pytest.mark.usefixtures("kernels_on_gpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_float64_on_a_gpu(name, dtype):
    assert_equals_float64(name, dtype, interpret=False)


def abstract(tokens, ranks, units, rank, activate, *, bias, groups=1):
    here = jax.sharding.SingleDeviceSharding(gpus()["h100"].devices()[0, 0])

    def shape(*sides):
        return jax.ShapeDtypeStruct(sides, jnp.bfloat16, sharding=here)

    biases = tuple(shape(units) for _ in ranks) if bias else ()
    coefficients = shape(len(activate.degrees), groups) if activate.degrees else None
    return (
        [shape(tokens, r) for r in ranks],
        [shape(r, units) for r in ranks],
        shape(units, rank),
        biases,
        coefficients,
    ), shape(tokens, rank)


def gradient_of(activate):
    def gradient(dz, *given):
        def layer(components, filters, axes, biases, coefficients):
            channels = Channels(tuple(biases), coefficients)
            return fused_hidden.hidden_layer(components, filters, axes, activate, channels)

        z, pullback = jax.vjp(layer, *given)
        return z, pullback(dz)

    return gradient


# The largest ranks at each size of the tiles, and ranks in odd pieces.
COMPILED = {
    "one piece": (16384, (64,), 3072, 64, Activate("gelu_new"), True, 1),
    "GPT-2": (16384, (144,), 3072, 144, Activate("gelu_new"), True, 1),
    "few tokens": (2048, (256,), 3072, 256, Activate("gelu_new"), True, 1),
    "LLaMA": (8192, (160, 160), 11008, 160, SILU, False, 1),
    "gated, small": (16384, (64, 64), 3072, 64, SILU, False, 1),
    "polynomial": (16384, (128,), 3072, 128, Activate("silu", (0, 1, 2, 3, 4), 3.0), True, 3072),
    "gated polynomial": (8192, (64, 64), 3072, 64, Activate("silu", (1, 2, 4), 3.0), False, 1),
}


# An H200 takes less time with these than with tiles whose sums fit its registers. Compilers before
# that of JAX 0.11 also spill some of a polynomial's.
SPILLING = {"GPT-2", "few tokens", "LLaMA"}
if jax.__version_info__ < (0, 11):
    SPILLING |= {"polynomial", "gated polynomial"}


@pytest.mark.usefixtures("optimizations")
@pytest.mark.parametrize("name", COMPILED)
def test_is_compiled_for_hopper(name):
    tokens, ranks, units, rank, activate, bias, groups = COMPILED[name]
    assert fused_hidden.refusal([*ranks, rank], activate, jnp.bfloat16) is None
    given, dz = abstract(tokens, ranks, units, rank, activate, bias=bias, groups=groups)
    traced = jax.jit(gradient_of(activate)).trace(dz, *given)
    with jax.default_device(gpus()["h100"].devices()[0, 0]):
        lowered = traced.lower(lowering_platforms=("cuda",))
    # The compiler fails where registers do not hold what a kernel adds up.
    option = "xla_gpu_fail_ptx_compilation_on_register_spilling"
    compiled = lowered.compile(compiler_options={option: name not in SPILLING})
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    kernels = ("forward_kernel", "components_kernel", "weights_kernel")
    assert all(name in text for name in kernels)
    assert memory is not None
    # Each of several shares of the tokens has gradients of the weights; they are few tokens' worth.
    assert memory.temp_size_in_bytes < 8192 * units * 2 + 2**20


def test_operations_of_the_kernels_are_those_of_its_products():
    tokens, ranks, units, rank, activate, bias, groups = COMPILED["GPT-2"]
    given, dz = abstract(tokens, ranks, units, rank, activate, bias=bias, groups=groups)
    counts = count_kernels(jax.jit(gradient_of(activate)).trace(dz, *given).jaxpr)
    one = 2 * tokens * units * rank
    products = {name: count.dot / one for (name, _), count in counts.items()}
    # Tokens are added until all multiprocessors have shares of the same size.
    assert products.pop("weights_kernel") == pytest.approx(4, rel=0.02)
    assert products == {"forward_kernel": 2, "components_kernel": 3}


@pytest.mark.parametrize(
    ("ranks", "activate", "dtype", "reason"),
    [
        ((256, 272), SILU, jnp.bfloat16, r"ranks add up to 528, .* hold 512"),
        ((128, 144), POLYNOMIAL, jnp.bfloat16, r"ranks add up to 272, .* hold 256"),
        ((64, 64, 80), POLYNOMIAL, jnp.bfloat16, r"ranks add up to 208, .* hold 192"),
        ((64, 64), SILU, jnp.float32, r"bfloat16 or float16, not float32"),
        ((64, 64), Activate("gelu"), jnp.bfloat16, r"does not have the error function"),
    ],
)
def test_what_it_cannot_run_it_refuses(ranks, activate, dtype, reason):
    refusal = fused_hidden.refusal(ranks, activate, jnp.dtype(dtype))
    assert refusal is not None
    assert re.search(reason, refusal)
