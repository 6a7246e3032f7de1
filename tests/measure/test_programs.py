"""What is read from compiled programs: counts by hand, XLA's own, and those of the jaxpr."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseffn_jax.measure.flops import count_flops
from sparseffn_jax.measure.programs import read_kernels, read_program

W, V, X = (jnp.ones(shape) for shape in ((32, 64), (64, 48), (128, 32)))


def text_of(name: str) -> str:
    return (Path(__file__).parent / "hlo" / f"{name}.txt").read_text(encoding="utf-8")


def two_layers(w, v, x):
    return jnp.sum(jnp.square(jnp.tanh(x @ w) @ v), 0)


def in_a_loop(w, x):
    return jax.lax.scan(lambda h, one: (jnp.tanh(h @ one), None), x, w)[0]


PROGRAMS = {
    "two layers": (two_layers, (W, V, X)),
    "their gradient": (jax.grad(lambda *args: jnp.sum(two_layers(*args))), (W, V, X)),
    "a loop": (in_a_loop, (jnp.ones((5, 32, 32)), X)),
    "nested loops": (
        lambda w, x: jax.lax.fori_loop(0, 3, lambda _, h: in_a_loop(w, h), x),
        (jnp.ones((5, 32, 32)), X),
    ),
    "a batch of products": (lambda a: jnp.einsum("bij,bjk->bik", a, a), (jnp.ones((4, 8, 8)),)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_operations_are_those_of_the_jaxpr(name):
    function, args = PROGRAMS[name]
    program = read_program(jax.jit(function).lower(*args).compile())
    expected = count_flops(function, *args)
    assert sum(k.times * k.matrix_flops for k in program.kernels) == expected.dot
    # The compiler may simplify what is not a product, and compute some of it twice.
    assert program.flops == pytest.approx(expected.total, rel=0.02)
    assert {kernel.dtype for kernel in program.kernels if kernel.matrix_flops} == {"float32"}


def test_operations_and_bytes_are_those_of_cost_analysis():
    compiled = jax.jit(lambda x, w: x @ w).lower(X, W).compile()
    program, analysis = read_program(compiled), compiled.cost_analysis()
    assert program.flops == analysis["flops"] == 2 * 128 * 32 * 64
    assert program.bytes_moved == analysis["bytes accessed"]
    assert program.bytes_moved == X.nbytes + W.nbytes + 4 * 128 * 64
    assert program.launches == 1


def test_a_loop_counts_as_often_as_it_runs_and_copies_of_weights_are_seen():
    # As XLA compiles it for a GPU: stacked weights, each of which is copied to its place.
    copy, product, gather = read_kernels(text_of("loop"))
    assert [k.times for k in (copy, product, gather)] == [12, 12, 1]
    # Of the stacked weights a turn reads one layer's.
    one = 2 * 32 * 32
    assert (copy.bytes_read, copy.bytes_written, copy.inputs_moved) == (one + 4, one, one)
    assert product.matrix_flops == 2 * 64 * 32 * 32
    assert product.bytes_read == 2 * (64 * 32 + 32 * 32)
    assert (product.dtype, product.scope) == ("bfloat16", "jit(f)/dot")
    # What the loop computes is no input of the program, though it began as one.
    assert product.inputs_moved == 0
    assert gather.is_collective
    assert (gather.kind, gather.bytes_written) == ("all-gather", 2 * 256 * 32)


def test_turns_that_nobody_has_counted_ask_each_time_whether_to_go_on():
    unknown = text_of("loop").replace('"known_trip_count":{"n":"12"}', "")
    compare, copy, product, gather = read_kernels(unknown)
    assert (compare.matrix_flops, compare.times) == (0, 1)
    assert [k.times for k in (copy, product, gather)] == [1, 1, 1]


def test_a_library_call_counts_its_product_and_not_its_scratch_memory():
    (kernel,) = read_kernels(text_of("library_call"))
    assert kernel.kind == "__cublas$gemm"
    assert kernel.matrix_flops == 2 * 16 * 8 * 4
    assert (kernel.bytes_read, kernel.bytes_written) == (4 * (16 * 8 + 8 * 4), 4 * 16 * 4)


def test_of_branches_the_one_that_moves_most_counts():
    first, second = read_kernels(text_of("branches"))
    assert (first.kind, second.kind) == ("negate", "exponential")
    assert (first.other_flops, first.bytes_read, first.bytes_written) == (8, 4 * 8, 4 * 8)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_kernels("HloModule nothing\n")


def test_what_is_written_in_place_counts_once():
    def put(cache, row):
        return jax.lax.dynamic_update_slice(cache, row, (3, 0))

    cache, row = np.zeros((1024, 16), np.float32), np.ones((1, 16), np.float32)
    program = read_program(jax.jit(put, donate_argnums=0).lower(cache, row).compile())
    assert program.bytes_moved < 10 * row.nbytes
