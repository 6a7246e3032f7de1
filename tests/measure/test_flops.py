"""Operations counted in the jaxpr against counts by hand, and against the config's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.measure.costs import flops_per_token, training_flops_per_token
from sparseffn_jax.measure.flops import FlopCount, count_flops
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.ops.polynomial import chebyshev

X = jax.ShapeDtypeStruct((4, 4), jnp.float32)
PRODUCT = 2 * 4**3


@jax.custom_vjp
def squared(x):
    return x @ x


squared.defvjp(lambda x: (x @ x, x), lambda x, bar: (bar @ x.T + x.T @ bar,))


PROGRAMS = {
    "plain": (lambda x: x @ x, 1),
    "jit": (jax.jit(lambda x: x @ x), 1),
    "custom vjp": (squared, 1),
    "custom vjp, backward": (jax.grad(lambda x: jnp.sum(squared(x))), 2),
    "vmap": (lambda x: jax.vmap(lambda row: row @ x)(x), 1),
    "map": (lambda x: jax.lax.map(lambda row: row[None] @ x, x), 1),
    "fori": (lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x), 5),
    "scan": (lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, None, length=7)[0], 7),
    "while": (
        lambda x: jax.lax.while_loop(
            lambda carry: carry[0] < 6, lambda carry: (carry[0] + 1, carry[1] @ x), (2, x)
        )[1],
        4,
    ),
    "cond": (lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y, x), 2),
    # Forward; then its recomputation and two products with the cotangent.
    "remat": (jax.value_and_grad(lambda x: jnp.sum(jax.checkpoint(lambda y: (y @ y) ** 2)(x))), 4),
    # What is not asked for is not computed.
    "dead": (lambda x: (x @ x, x)[1], 0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_products(name):
    function, products = PROGRAMS[name]
    assert count_flops(function, X).dot == products * PRODUCT


def test_devices_count_apart():
    count = count_flops(jax.pmap(lambda x: x @ x), jnp.ones((1, 4, 4)))
    assert count.dot == PRODUCT


def test_complex_products_convolutions_and_transforms():
    z = jax.ShapeDtypeStruct((4, 4), jnp.complex64)
    assert count_flops(lambda z: z @ z, z).dot == 4 * PRODUCT
    image = jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((5, 3, 3, 3), jnp.float32)
    convolved = count_flops(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME"), image, kernel
    )
    assert convolved.dot == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
    rows = jax.ShapeDtypeStruct((3, 8), jnp.float32)
    assert count_flops(jnp.fft.fft, rows).fft == 3 * 5 * 8 * 3
    assert count_flops(lambda x: jnp.fft.irfft(jnp.fft.rfft(x)), rows).fft == 3 * 5 * 8 * 3


def test_elementwise_and_bytes():
    count = count_flops(lambda x: jnp.sum(jnp.tanh(x) * x + 1.0), X)
    # tanh, times, plus; and the sum reads 16 numbers.
    assert (count.elementwise, count.dot, count.fft) == (4 * 16, 0, 0)
    assert count_flops(lambda x: x.astype(jnp.int32) + 1, X).elementwise == 0
    assert count_flops(lambda x: x @ x, X).bytes_moved == 3 * 16 * 4
    assert count_flops(lambda x: x.at[0].add(x[1]), X).elementwise == 4
    assert FlopCount(1, 2, 3, 4) * 2 + FlopCount(1) == FlopCount(3, 4, 6, 8)
    assert FlopCount(1, 2, 3, 4).total == 6


def test_a_trip_count_that_depends_on_data_is_refused():
    with pytest.raises(ValueError, match="trip count depends on data"):
        count_flops(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ y, x), X)


D, M, TOKENS = 32, 128, 16


def unstructured_mask(shape, block, density):
    grid = (shape[0] // block, shape[1] // block)
    blocks = np.random.default_rng(0).random(grid) < density
    return BlockMask.from_array(blocks | np.eye(*grid, dtype=bool), (block, block))


def low_rank(rank, width=M, **parts):
    spectral = SpectralConfig("low_rank", width, rank, implementation="two_gemms")
    return SparseFFNConfig(D, M, spectral=spectral, **parts)


def unstructured_core(density, plan):
    core = CoreConfig(
        M,
        unstructured_mask((D, M), 8, density),
        unstructured_mask((M, D), 8, density),
        implementation=plan,
    )
    return SparseFFNConfig(D, M, micro=MicroRefinementConfig(core))


GRID = {
    "dense": SparseFFNConfig(D, M, micro=MicroRefinementConfig(CoreConfig(M))),
    "narrow": SparseFFNConfig(D, M, micro=MicroRefinementConfig(CoreConfig(48))),
    "low rank 4": low_rank(4),
    "low rank 16": low_rank(16, width=96),
    "low rank and core": low_rank(
        8, width=64, micro=MicroRefinementConfig(CoreConfig(32)), polynomial=PolynomialConfig(4)
    ),
    "low rank bypass": low_rank(8, width=0, micro=MicroRefinementConfig(CoreConfig(32))),
    "unstructured core 1/4": unstructured_core(0.25, "gather"),
    "unstructured core 1/2": unstructured_core(0.5, "rows"),
    "unstructured core 1/8": unstructured_core(0.125, "columns"),
    "corrections": low_rank(
        4,
        micro=MicroRefinementConfig(
            corrections=(unstructured_mask((D, D), 8, 0.3),), implementation="gather"
        ),
    ),
}


def program_counts(config):
    """What a token costs in the jaxpr: forward, and forward and backward."""
    layer = SparseFFN(config)
    x = jax.ShapeDtypeStruct((TOKENS, D), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)

    def training(params, x, cotangent):
        y, vjp = jax.vjp(layer.apply, params, x)
        return y, vjp(cotangent)

    return count_flops(layer.apply, params, x), count_flops(training, params, x, x)


@pytest.mark.parametrize("name", GRID)
def test_the_config_counts_the_programs_products(name):
    config = GRID[name]
    forward, training = program_counts(config)
    for count, parts in (
        (forward, flops_per_token(config)),
        (training, training_flops_per_token(config)),
    ):
        # Gradients of biases end in small products, which the config leaves out.
        assert count.dot == pytest.approx(TOKENS * (parts["spectral"] + parts["micro"]), rel=0.02)


@pytest.mark.parametrize("width", [0, M])
@pytest.mark.parametrize("mask", [None, (True, True, False, False, True)])
def test_the_config_counts_the_products_of_a_block_circulant_map(mask, width):
    spectral = SpectralConfig(
        "block_circulant", width, block_size=8, frequency_mask=mask, implementation="dft"
    )
    config = SparseFFNConfig(D, M, spectral=spectral)
    for count, parts in zip(
        program_counts(config),
        (flops_per_token(config), training_flops_per_token(config)),
        strict=True,
    ):
        assert count.dot == pytest.approx(TOKENS * parts["spectral"], rel=0.02)


def test_training_recomputes_and_differentiates_the_polynomial():
    config = low_rank(4, polynomial=PolynomialConfig(4))
    forward_units = 3 * 4
    # Forward, again, by the input; the four terms of the recurrence, and five weighted sums.
    training_units = 3 * forward_units + 2 * 4 + 2 * 5
    assert flops_per_token(config)["polynomial"] == forward_units * M
    assert training_flops_per_token(config)["polynomial"] == training_units * M

    def polynomial(u, coefficients):
        return chebyshev(u, coefficients, degrees=range(5), radius=2.0)

    def training(u, coefficients, cotangent):
        y, vjp = jax.vjp(polynomial, u, coefficients)
        # As the branch recomputes it.
        return y, polynomial(u, coefficients), vjp(cotangent)

    u, coefficients = jnp.ones((TOKENS, M)), jnp.ones((1, 5))
    forward = count_flops(polynomial, u, coefficients).elementwise
    ratio = count_flops(training, u, coefficients, u).elementwise / forward
    # The forward pass also has tails, which add less to the others.
    assert 0.75 < ratio / (training_units / forward_units) <= 1
