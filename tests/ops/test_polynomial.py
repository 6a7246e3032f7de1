import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, assert_close, draw, tangent_chebyshev, value_and_vjp

from sparseffn_jax.ops.polynomial import basis, chebyshev

# Full, odd only, even only, without constant, constant only, linear only, high.
DEGREES = ((0, 1, 2, 3, 4), (1, 3, 5), (0, 2, 4), (1, 2), (0,), (1,), tuple(range(9)), (8,))


def reference(u, coefficients, degrees, radius, cotangent):
    groups = coefficients.shape[0]
    grouped, cotangent = (a.reshape(-1, groups, u.shape[-1] // groups) for a in (u, cotangent))
    terms = [tangent_chebyshev(grouped, k, radius) for k in degrees]
    values = np.stack([value for value, _ in terms], axis=-1)
    slopes = np.stack([slope for _, slope in terms], axis=-1)
    y = np.einsum("tgmk,gk->tgm", values, coefficients)
    u_bar = cotangent * np.einsum("tgmk,gk->tgm", slopes, coefficients)
    c_bar = np.einsum("tgmk,tgm->gk", values, cotangent)
    return y.reshape(u.shape), (u_bar.reshape(u.shape), c_bar)


def check(degrees, radius, groups, shape, dtype="float32"):
    # Twice the radius: a good part of the entries lies in the tails.
    (u, cotangent), (u64, cotangent64) = draw(0, shape, shape, dtype=dtype, scale=1.5 * radius)
    (c,), (c64,) = draw(1, (groups, len(degrees)), dtype=dtype)
    y, bars = value_and_vjp(
        lambda u, c: chebyshev(u, c, degrees=degrees, radius=radius), (u, c), cotangent
    )
    expected, expected_bars = reference(u64, c64, degrees, radius, cotangent64)
    assert y.dtype == dtype
    assert_close(y, expected, dtype, "value")
    assert_close(bars[0], expected_bars[0], dtype, "gradient of u")
    assert_close(bars[1], expected_bars[1], dtype, "gradient of the coefficients")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("degrees", DEGREES)
def test_equals_float64(degrees, dtype):
    check(degrees, 2.5, 2, (2, 3, 8), dtype)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (0, 8)])
def test_takes_any_batch(shape):
    check((0, 1, 3), 4.0, 4, shape)


@given(
    degrees=st.sets(st.integers(0, 8), min_size=1),
    radius=st.floats(0.25, 16.0),
    groups=st.integers(1, 3),
    channels=st.integers(1, 4),
    tokens=st.integers(1, 5),
)
def test_equals_float64_for_any_shape(degrees, radius, groups, channels, tokens):
    check(tuple(sorted(degrees)), radius, groups, (tokens, groups * channels))


def test_under_transformations():
    degrees, radius = (0, 1, 2, 4), 1.5
    (u, c, cotangent), exact = draw(3, (4, 6), (3, 4), (4, 6), scale=2.0)
    _, expected = reference(exact[0], exact[1], degrees, radius, exact[2])

    def loss(u, c, cotangent):
        return jnp.vdot(chebyshev(u, c, degrees=degrees, radius=radius), cotangent)

    gradient = jax.vmap(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), (0, None, 0))
    u_bar, c_bar = jax.jit(gradient)(u, c, cotangent)
    assert_close(u_bar, expected[0])
    assert_close(c_bar.sum(0), expected[1])


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_value_and_slope_are_continuous_at_the_radius(degrees, side):
    radius = 3.0
    (c,), _ = draw(4, (1, len(degrees)))
    edge = np.float32(side * radius)
    around = np.array([np.nextafter(edge, 0), edge, np.nextafter(edge, 2 * edge)], np.float32)

    def at(u):
        return chebyshev(u[None], c, degrees=degrees, radius=radius)[0]

    values, slopes = jax.vmap(jax.value_and_grad(at))(jnp.asarray(around))
    scale = float(jnp.abs(c).sum())
    np.testing.assert_allclose(values, values[1], atol=1e-5 * scale)
    # Below the edge the slope is a polynomial's, up to 8**4 steep in its own argument.
    np.testing.assert_allclose(slopes, slopes[1], atol=1e-5 * scale * 8**4 / radius)


@pytest.mark.parametrize("degrees", DEGREES)
def test_tails_are_lines_with_bounded_gradient(degrees):
    radius = 2.0
    (c,), (c64,) = draw(5, (1, len(degrees)))
    outside = np.array([2.001, 2.5, 4.0, 64.0, 1e4], np.float32)
    u = jnp.concatenate([jnp.asarray(-outside), jnp.asarray(outside)])[:, None]
    gradient = jax.vmap(jax.grad(lambda u: chebyshev(u, c, degrees=degrees, radius=radius)[0]))
    slopes = gradient(u)[:, 0]
    assert len({float(slope) for slope in slopes[:5]}) == 1
    assert len({float(slope) for slope in slopes[5:]}) == 1
    bound = sum(abs(ck) * k**2 for k, ck in zip(degrees, c64[0], strict=True)) / radius
    everywhere = jnp.linspace(-1e4, 1e4, 20001)[:, None]
    assert float(jnp.abs(gradient(everywhere)).max()) <= bound * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("degrees", DEGREES)
def test_basis_is_the_activation_and_the_reference(degrees):
    radius = 1.75
    u = np.concatenate([np.linspace(-40, 40, 401), [-radius, radius, -1e4, 1e4]])
    columns = basis(u, degrees, radius)
    expected = np.stack([tangent_chebyshev(u, k, radius)[0] for k in degrees], axis=-1)
    np.testing.assert_allclose(columns, expected, rtol=1e-9, atol=1e-9)
    (c,), (c64,) = draw(6, (1, len(degrees)))
    y = chebyshev(jnp.asarray(u, jnp.float32)[:, None], c, degrees=degrees, radius=radius)
    assert_close(y[:, 0], columns @ c64[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_keeps_only_its_input(dtype):
    (u, c), _ = draw(7, (64, 32), (1, 5), dtype=dtype)
    _, vjp = jax.vjp(lambda u, c: chebyshev(u, c, degrees=range(5), radius=4.0), u, c)
    large = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size >= u.size]
    assert [(leaf.size, str(leaf.dtype)) for leaf in large] == [(u.size, dtype)]


def test_masked_terms_are_not_in_the_program():
    def operations(degrees):
        c = jnp.ones((1, len(degrees)))
        lowered = jax.jit(lambda u: chebyshev(u, c, degrees=degrees, radius=1.0))
        return lowered.lower(jnp.ones((4, 8))).as_text().count(" stablehlo.")

    assert operations((0, 1)) < operations((0, 1, 2)) < operations((0, 1, 2, 3, 4))
    assert operations((0, 2, 4)) < operations((0, 1, 2, 3, 4))


def test_not_a_number_stays_one():
    y = chebyshev(jnp.array([jnp.nan, 1.0]), jnp.ones((1, 2)), degrees=(0, 1), radius=2.0)
    assert bool(jnp.isnan(y[0]))
    assert float(y[1]) == 1.5


@pytest.mark.parametrize(
    ("shape", "degrees", "message"),
    [
        ((1, 2), (0, 1, 2), "coefficients have 2 terms, but 3 degrees are kept"),
        ((3, 2), (0, 1), "3 coefficient groups do not divide 8 channels"),
        ((1, 2), (2, 1), "degrees=.2, 1.: expected non-negative integers, ascending"),
        ((1, 2), (-1, 1), "degrees"),
        ((1, 0), (), "degrees"),
    ],
)
def test_refuses(shape, degrees, message):
    with pytest.raises(ValueError, match=message):
        chebyshev(jnp.ones((2, 8)), jnp.ones(shape), degrees=degrees, radius=1.0)
