import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import alive, assert_close, dense_of, dot_generals, draw, value_and_vjp

from sparseffn_jax.ops import block_sparse
from sparseffn_jax.ops.block_sparse import block_sparse_matmul
from sparseffn_jax.ops.hidden import Activate, Channels, HiddenMaps
from sparseffn_jax.ops.masks import BlockMask, decompress
from sparseffn_jax.ops.plans import costs

STRUCTURED = {
    "full": ["111", "111"],
    "rows": ["111", "000", "111"],
    "columns": ["1010", "1010"],
    "rows and columns": ["0110", "0000", "0110", "0000"],
    "one block": ["00", "01"],
}
UNSTRUCTURED = {
    "diagonal": ["100", "010", "001"],
    "balanced": ["1100", "0110", "0011", "1001"],
    "unbalanced columns": ["1110", "0110", "0010"],
    "dead column": ["1001", "1000", "0001"],
    "dead row": ["101", "000", "010"],
}
MASKS = STRUCTURED | UNSTRUCTURED


def mask_of(rows, block_shape=(3, 2)):
    return BlockMask(block_shape, tuple(tuple(digit == "1" for digit in row) for row in rows))


UNROLLED = ("rows", "columns")


def plans_of(mask):
    return (*(("slice",) if mask.is_structured else (*UNROLLED, "gather")), "masked", None)


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
    mask = mask_of(MASKS[name], (16, 8))
    for plan in set(plans_of(mask)) - {"rows", None}:
        check(mask, plan, "bfloat16")


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


def hidden_layer(x, weights, masks, channels, implementation=None):
    plan = block_sparse.choose(len(x), weights, masks, "cpu", implementation)
    packed = block_sparse.pack(weights, plan, masks)
    return block_sparse.apply(x, packed, plan, masks, Activate("tanh"), channels)


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("down", ["unstructured", "structured", "dense", "other blocks"])
@pytest.mark.parametrize("up", ["unstructured", "structured", "dense"])
def test_a_gated_ffn_equals_float64(up, down, tile, monkeypatch):
    monkeypatch.setattr(costs, "token_tile", lambda *_: tile)
    # Here many small products are what the cost model takes, though it would not.
    monkeypatch.setattr(costs, "_COPIED", 0.0)
    for constant in ("_ADDED", "_CALL"):
        monkeypatch.setattr(costs, constant, {"cpu": 0.0, "gpu": 0.0})
    up_mask = {
        "unstructured": mask_of(["1010", "0111", "0100"], (4, 6)),
        "structured": mask_of(["1010", "0000", "1010"], (4, 6)),
        "dense": None,
    }[up]
    down_mask = {
        "unstructured": mask_of(["110", "001", "101", "100"], (6, 4)),
        "structured": mask_of(["101", "000", "101", "000"], (6, 4)),
        "dense": None,
        "other blocks": mask_of(["110", "001", "101"], (8, 4)),
    }[down]
    kernel_shapes = [
        (12, 24) if mask is None else mask.kernel_shape for mask in (up_mask, down_mask)
    ]
    if down_mask is None:
        kernel_shapes[1] = (24, 12)
    shapes = (2, 20, 12), kernel_shapes[0], kernel_shapes[0], (24,), kernel_shapes[1], (2, 20, 12)
    (*arguments, cotangent), exact = draw(0, *shapes, scale=0.3)

    def layer(x, gate, up, bias, down):
        return hidden_layer(
            x.reshape(40, 12),
            HiddenMaps((gate, up), down),
            HiddenMaps((up_mask, up_mask), down_mask),
            Channels((bias, jnp.zeros_like(bias))),
        ).reshape(x.shape)

    def dense(kernel, mask):
        return kernel if mask is None else dense_of(kernel, mask)

    x, gate, up, bias, last, dy = exact
    gate, up, last = dense(gate, up_mask), dense(up, up_mask), dense(last, down_mask)
    phi, linear = np.tanh(x @ gate + bias), x @ up
    d_hidden = dy @ last.T
    d_gate, d_up = d_hidden * linear * (1 - phi**2), d_hidden * phi
    y, (dx, *d_weights) = value_and_vjp(layer, arguments, cotangent)
    assert_close(y, phi * linear @ last, what="value")
    assert_close(dx, d_gate @ gate.T + d_up @ up.T, what="gradient of x")
    assert_close(d_weights[2], d_gate.sum((0, 1)), what="gradient of the bias")
    for gradient, inputs, outputs, mask in (
        (d_weights[0], x, d_gate, up_mask),
        (d_weights[1], x, d_up, up_mask),
        (d_weights[3], phi * linear, dy, down_mask),
    ):
        expected = np.einsum("bti,bto->io", inputs, outputs)
        if mask is not None:
            expected *= alive(mask)
        assert_close(dense(np.asarray(gradient, np.float64), mask), expected, what="weights")


def test_a_block_sparse_ffn_keeps_no_hidden_activations():
    mask, back = mask_of(["1010", "0111"], (8, 16)), mask_of(["10", "11", "01", "10"], (16, 8))

    def layer(x, kernel, down):
        return hidden_layer(
            x,
            HiddenMaps((kernel,), down),
            HiddenMaps((mask,), back),
            Channels(),
            "rows",
        )

    arguments = [jnp.ones(shape) for shape in ((32, 16), mask.kernel_shape, back.kernel_shape)]
    _, vjp = jax.vjp(layer, *arguments)
    assert max(leaf.size for leaf in jax.tree.leaves(vjp)) <= 32 * 16


def test_slice_multiplies_only_the_smaller_matrix():
    mask = mask_of(STRUCTURED["rows and columns"])
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


@pytest.mark.parametrize("plan", [*UNROLLED, "gather"])
@pytest.mark.parametrize("name", UNSTRUCTURED)
def test_only_living_blocks_are_multiplied(name, plan):
    mask = mask_of(UNSTRUCTURED[name])
    x, kernel = jnp.ones((7, mask.shape[0])), jnp.ones(mask.kernel_shape)

    def product(x, kernel):
        return block_sparse_matmul(x, kernel, mask, implementation=plan)

    def value_and_gradients(x, kernel):
        y, vjp = jax.vjp(product, x, kernel)
        return y, vjp(y)

    assert multiply_adds(product, x, kernel) == 7 * mask.size
    assert multiply_adds(value_and_gradients, x, kernel) == 3 * 7 * mask.size


def multiply_adds(function, *arguments):
    return sum(count for *_, count in dot_generals(function, *arguments))


@pytest.mark.parametrize("name", ["rows and columns", "unbalanced columns"])
def test_half_precision_products_stay_in_half_precision(name):
    mask = mask_of(MASKS[name])
    for plan in set(plans_of(mask)) - {"rows"}:
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
    structured, scattered = mask_of(STRUCTURED["rows"]), mask_of(UNSTRUCTURED["diagonal"])
    x = jnp.ones((2, 9))
    with pytest.raises(ValueError, match=r"cannot run as 'gather' here: .*whole rows and columns"):
        block_sparse_matmul(
            x, jnp.ones(structured.kernel_shape), structured, implementation="gather"
        )
    with pytest.raises(ValueError, match=r"cannot run as 'slice' here: .*not made of whole"):
        block_sparse_matmul(x, jnp.ones(scattered.kernel_shape), scattered, implementation="slice")
    half = jnp.ones(scattered.kernel_shape, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"cannot run as 'rows' here: bfloat16 would round"):
        block_sparse_matmul(x.astype(jnp.bfloat16), half, scattered, implementation="rows")
    with pytest.raises(ValueError, match="no plan 'csr': use one of rows, columns, gather, masked"):
        block_sparse_matmul(x, jnp.ones(scattered.kernel_shape), scattered, implementation="csr")


def test_refuses_shapes_that_do_not_fit():
    mask = mask_of(UNSTRUCTURED["diagonal"])
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
