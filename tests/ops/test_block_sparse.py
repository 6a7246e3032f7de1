import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import alive, assert_close, dense_of, dot_generals, draw, value_and_vjp

from sparseffn_jax.ops.block_sparse import BlockMask, block_sparse_matmul, decompress

OUTER = {
    "full": ["111", "111"],
    "rows": ["111", "000", "111"],
    "columns": ["1010", "1010"],
    "rows and columns": ["0110", "0000", "0110", "0000"],
    "one block": ["00", "01"],
}
FREE = {
    "diagonal": ["100", "010", "001"],
    "balanced": ["1100", "0110", "0011", "1001"],
    "unbalanced columns": ["1110", "0110", "0010"],
    "dead column": ["1001", "1000", "0001"],
    "dead row": ["101", "000", "010"],
}
MASKS = OUTER | FREE


def mask_of(rows, block_shape=(3, 2)):
    return BlockMask(block_shape, tuple(tuple(digit == "1" for digit in row) for row in rows))


def plans_of(mask):
    return ("slice" if mask.is_outer else "gather", "masked", None)


def check(mask, plan, dtype="float32", batch=(2, 3)):
    shapes = (*batch, mask.shape[0]), mask.kernel_shape, (*batch, mask.shape[1])
    (x, kernel, cotangent), (x64, kernel64, cotangent64) = draw(0, *shapes, dtype=dtype)
    y, (x_bar, kernel_bar) = value_and_vjp(
        lambda x, kernel: block_sparse_matmul(x, kernel, mask, implementation=plan),
        (x, kernel),
        cotangent,
    )
    dense = dense_of(kernel64, mask)
    dense_bar = x64.reshape(-1, mask.shape[0]).T @ cotangent64.reshape(-1, mask.shape[1])
    assert y.dtype == dtype
    assert_close(y, x64 @ dense, dtype, "value")
    assert_close(x_bar, cotangent64 @ dense.T, dtype, "gradient of x")
    assert_close(dense_of(np.asarray(kernel_bar, np.float64), mask), dense_bar * alive(mask), dtype)


@pytest.mark.parametrize("name", MASKS)
def test_equals_float64(name):
    for plan in plans_of(mask_of(MASKS[name])):
        check(mask_of(MASKS[name]), plan)


@pytest.mark.parametrize("name", MASKS)
def test_equals_float64_in_half_precision(name):
    for plan in plans_of(mask_of(MASKS[name], (16, 8)))[:2]:
        check(mask_of(MASKS[name], (16, 8)), plan, "bfloat16")


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("name", ["rows and columns", "dead column"])
def test_takes_any_batch(name, batch):
    for plan in plans_of(mask_of(MASKS[name])):
        check(mask_of(MASKS[name]), plan, batch=batch)


@st.composite
def masks(draw_from):
    rows, columns = draw_from(st.integers(1, 5)), draw_from(st.integers(1, 5))
    blocks = draw_from(
        st.lists(
            st.lists(st.booleans(), min_size=columns, max_size=columns),
            min_size=rows,
            max_size=rows,
        ).filter(lambda blocks: any(map(any, blocks)))
    )
    return BlockMask((draw_from(st.integers(1, 4)), draw_from(st.integers(1, 4))), blocks)


@given(mask=masks(), data=st.data())
def test_equals_float64_for_any_mask(mask, data):
    check(mask, data.draw(st.sampled_from(plans_of(mask))), batch=data.draw(st.just((3,))))


@given(mask=masks())
def test_storage(mask):
    dense = np.random.default_rng(0).standard_normal(mask.shape)
    stored = mask.compress(dense)
    assert stored.shape == mask.kernel_shape
    assert stored.size == mask.size == alive(mask).sum()
    assert mask.density == pytest.approx(alive(mask).mean())
    np.testing.assert_array_equal(dense_of(stored, mask), dense * alive(mask))
    np.testing.assert_allclose(decompress(jnp.asarray(stored), mask), dense * alive(mask), 1e-6)
    assert mask == BlockMask.from_array(np.array(mask.blocks), mask.block_shape)
    assert hash(mask) == hash(dataclasses.replace(mask))


@pytest.mark.parametrize("name", ["rows and columns", "unbalanced columns"])
def test_under_transformations(name):
    mask = mask_of(MASKS[name])
    for plan in plans_of(mask):
        shapes = (4, mask.shape[0]), mask.kernel_shape, (4, mask.shape[1])
        (x, kernel, cotangent), (x64, kernel64, cotangent64) = draw(0, *shapes)

        def loss(x, kernel, cotangent, plan=plan):
            return jnp.vdot(block_sparse_matmul(x, kernel, mask, implementation=plan), cotangent)

        gradient = jax.vmap(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), (0, None, 0))
        x_bar, kernel_bar = jax.jit(gradient)(x, kernel, cotangent)
        assert_close(x_bar, cotangent64 @ dense_of(kernel64, mask).T)
        summed = dense_of(np.asarray(kernel_bar, np.float64).sum(0), mask)
        assert_close(summed, x64.T @ cotangent64 * alive(mask))


def test_slice_multiplies_only_the_smaller_matrix():
    mask = mask_of(OUTER["rows and columns"])
    x, kernel = jnp.ones((7, mask.shape[0])), jnp.ones(mask.kernel_shape)
    (dot,) = dot_generals(lambda x, k: block_sparse_matmul(x, k, mask), x, kernel)
    lhs, rhs, multiply_adds = dot
    assert (lhs.shape, rhs.shape) == ((7, 6), (6, 4))
    assert multiply_adds == 7 * mask.size
    backward = dot_generals(
        lambda x, k: jax.grad(lambda *a: block_sparse_matmul(*a, mask).sum(), (0, 1))(x, k),
        x,
        kernel,
    )
    assert sum(count for *_, count in backward) == 3 * 7 * mask.size


@pytest.mark.parametrize("name", FREE)
def test_gather_multiplies_only_living_blocks(name):
    mask = mask_of(FREE[name])
    x, kernel = jnp.ones((7, mask.shape[0])), jnp.ones(mask.kernel_shape)
    products = dot_generals(
        lambda x, k: block_sparse_matmul(x, k, mask, implementation="gather"), x, kernel
    )
    assert sum(count for *_, count in products) == 7 * mask.size


@pytest.mark.parametrize("name", ["rows and columns", "unbalanced columns"])
def test_half_precision_products_stay_in_half_precision(name):
    mask = mask_of(MASKS[name])
    for plan in plans_of(mask):
        x = jnp.ones((7, mask.shape[0]), jnp.bfloat16)
        kernel = jnp.ones(mask.kernel_shape, jnp.bfloat16)

        def gradients(x, kernel, plan=plan):
            y, vjp = jax.vjp(
                lambda *a: block_sparse_matmul(*a, mask, implementation=plan), x, kernel
            )
            return vjp(y)

        products = dot_generals(gradients, x, kernel)
        assert {str(side.dtype) for dot in products for side in dot[:2]} == {"bfloat16"}


def test_refuses_a_plan_that_cannot_run():
    outer, free = mask_of(OUTER["rows"]), mask_of(FREE["diagonal"])
    x = jnp.ones((2, 9))
    with pytest.raises(ValueError, match=r"cannot run as 'gather' here: .*whole rows and columns"):
        block_sparse_matmul(x, jnp.ones(outer.kernel_shape), outer, implementation="gather")
    with pytest.raises(ValueError, match=r"cannot run as 'slice' here: .*not made of whole"):
        block_sparse_matmul(x, jnp.ones(free.kernel_shape), free, implementation="slice")
    with pytest.raises(ValueError, match="no plan 'csr': use one of gather, masked"):
        block_sparse_matmul(x, jnp.ones(free.kernel_shape), free, implementation="csr")


def test_refuses_shapes_that_do_not_fit():
    mask = mask_of(FREE["diagonal"])
    with pytest.raises(ValueError, match="x has 8 channels, but the mask covers 9"):
        block_sparse_matmul(jnp.ones((2, 8)), jnp.ones(mask.kernel_shape), mask)
    with pytest.raises(ValueError, match=r"kernel has shape .9, 6., the mask needs .3, 3, 2."):
        block_sparse_matmul(jnp.ones((2, 9)), jnp.ones(mask.shape), mask)


@pytest.mark.parametrize("side", [0, -1, 2.0, "2", True, None])
def test_refuses_a_wrong_block_shape(side):
    with pytest.raises(ValueError, match="expected two positive integers"):
        BlockMask((2, side), ((True,),))


@pytest.mark.parametrize("block_shape", [(2,), (2, 2, 2), "22", 2, None, ()])
def test_refuses_a_block_shape_that_is_no_pair(block_shape):
    with pytest.raises(ValueError, match="expected two positive integers"):
        BlockMask(block_shape, ((True,),))


@pytest.mark.parametrize(
    "blocks", [(), ((),), ((True,), (True, False)), ((1, 0),), ("10",), True, None, (True, False)]
)
def test_refuses_wrong_blocks(blocks):
    with pytest.raises(ValueError, match="rows of booleans"):
        BlockMask((2, 2), blocks)


def test_refuses_an_empty_mask():
    with pytest.raises(ValueError, match="keeps no block: leave the part out"):
        BlockMask((2, 2), ((False, False),))


def test_from_array_takes_zeros_and_ones_only():
    mask = BlockMask.from_array(np.array([[1, 0], [1, 1]]), (np.int64(2), 4))
    assert mask == BlockMask((2, 4), ((True, False), (True, True)))
    assert json.dumps(mask.block_shape) == "[2, 4]"
    with pytest.raises(ValueError, match="booleans, or 0 and 1"):
        BlockMask.from_array(np.array([[0.3, 2.0]]), (2, 2))
    with pytest.raises(ValueError, match="rows of booleans"):
        BlockMask.from_array(np.ones(3), (2, 2))
