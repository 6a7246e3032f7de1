import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import DTYPES, assert_close, draw, value_and_vjp

from sparseffn_jax.ops.elementwise import add_bias, sum_to

# Sums over leading axes, trailing axes, all, none, and an axis in the middle; slices that divide
# evenly, by less than sixteen, and not at all.
CASES = (
    ((48, 6), (6,)),
    ((40, 6), (1, 6)),
    ((7, 6), (6,)),
    ((2, 9, 6), (6,)),
    ((4, 6, 32), (4, 6, 1)),
    ((4, 6, 5), (4, 6, 1)),
    ((16, 6, 32), (1, 1, 1)),
    ((48, 6), (1,)),
    ((48, 1), (1,)),
    ((5, 3, 8), (5, 3, 8)),
    ((32, 3, 8), (3, 1)),
    ((0, 6), (6,)),
)


def expected_sum(shape, full):
    padded = (1,) * (full.ndim - len(shape)) + shape
    axes = tuple(axis for axis, side in enumerate(padded) if side == 1)
    return full.sum(axes).reshape(shape)


@pytest.mark.parametrize(("full", "shape"), CASES)
def test_sums_equal_numpy(full, shape):
    (a, b), (a64, b64) = draw(0, full, full)
    total = jax.jit(lambda a, b: sum_to(shape, lambda a, b: a * b + a, a, b))(a, b)
    assert_close(total, expected_sum(shape, a64 * b64 + a64))


def test_other_platforms_get_a_plain_sum():
    a = jnp.arange(96.0).reshape(48, 2)
    traced = jax.jit(lambda a: sum_to((2,), jnp.sin, a)).trace(a)
    assert "dot_general" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "dot_general" not in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("full", "shape"), CASES)
def test_bias_and_its_gradient(full, shape, dtype):
    (u, bias, cotangent), (u64, bias64, cotangent64) = draw(1, full, shape, full, dtype=dtype)
    y, (du, db) = value_and_vjp(add_bias, (u, bias), cotangent)
    assert y.dtype == du.dtype == db.dtype == dtype
    assert_close(y, u64 + bias64, dtype)
    assert_close(du, cotangent64, dtype)
    assert_close(db, expected_sum(shape, cotangent64), dtype)


def test_a_long_sum_in_half_precision_keeps_its_digits():
    cotangent = jnp.ones((4096, 1), jnp.bfloat16)
    _, (_, db) = value_and_vjp(add_bias, (cotangent, jnp.zeros(1, jnp.bfloat16)), cotangent)
    np.testing.assert_array_equal(db, np.array([4096.0]))
