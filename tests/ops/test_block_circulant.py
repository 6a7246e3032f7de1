import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import (
    assert_close,
    circulant_reference,
    dot_generals,
    draw,
    has_imag,
    value_and_vjp,
)

from sparseffn_jax.ops import block_circulant as operator
from sparseffn_jax.ops import fourier
from sparseffn_jax.ops.filters import Blocks, Filter
from sparseffn_jax.ops.fourier import circulant_matrix, dft_basis
from sparseffn_jax.ops.hidden import Activate, HiddenMaps

PLANS = ("fft", "dft", "split", "dense")

# Odd and even blocks; all frequencies, only DC, only Nyquist, without DC, with gaps.
FILTERS = (
    (1, (0,)),
    (2, (0, 1)),
    (2, (1,)),
    (3, (0, 1)),
    (5, (0, 1, 2)),
    (6, (0, 1, 2, 3)),
    (6, (3,)),
    (8, (0, 1, 2, 3, 4)),
    (8, (0,)),
    (8, (1, 2, 3)),
    (8, (1, 4)),
    (16, tuple(range(9))),
    (16, (0, 3, 8)),
)


def circulant_arguments(b, frequencies, batch=(2, 3), p=3, q=2, dtype="float32"):
    real, imag = (len(frequencies), p, q), (len(has_imag(b, frequencies)), p, q)
    return draw(b, (*batch, p * b), real, imag, (*batch, q * b), dtype=dtype)


def block_circulant(b, frequencies, plan):
    blocks = Blocks(b, tuple(frequencies))

    def run(x, real, imag):
        packed = operator.pack_map(Filter(real, imag), plan, blocks)
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return operator.multiply(rows, packed, plan, blocks).reshape(
            *x.shape[:-1], b * real.shape[2]
        )

    return run


def check_circulant(b, frequencies, plan, dtype="float32", **shapes):
    (*arguments, cotangent), exact = circulant_arguments(b, frequencies, dtype=dtype, **shapes)
    y, bars = value_and_vjp(block_circulant(b, frequencies, plan), arguments, cotangent)
    expected, expected_bars = circulant_reference(*exact[:3], b, frequencies, exact[3])
    assert y.dtype == dtype
    assert_close(y, expected, dtype, "value")
    for name, bar, wanted in zip(("x", "real", "imag"), bars, expected_bars, strict=True):
        assert_close(bar, wanted, dtype, f"gradient of {name}")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("b", "frequencies"), FILTERS)
def test_block_circulant_equals_float64(b, frequencies, plan):
    check_circulant(b, frequencies, plan)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("b", "frequencies"), FILTERS[1::3])
def test_block_circulant_in_half_precision(b, frequencies, plan):
    check_circulant(b, frequencies, plan, "bfloat16")


@pytest.mark.parametrize(
    ("plan", "batch"), [("fft", ()), ("dft", ()), ("dft", (0,)), ("split", (0,)), ("dense", (7,))]
)
def test_block_circulant_takes_any_batch(plan, batch):
    check_circulant(6, (0, 2, 3), plan, batch=batch)


@given(data=st.data())
def test_block_circulant_of_any_shape(data):
    b = data.draw(st.integers(1, 24), "block_size")
    frequencies = data.draw(st.sets(st.integers(0, b // 2), min_size=1), "frequencies")
    check_circulant(
        b,
        tuple(sorted(frequencies)),
        data.draw(st.sampled_from(PLANS), "plan"),
        batch=data.draw(st.sampled_from(((), (1,), (3, 2))), "batch"),
        p=data.draw(st.integers(1, 4), "p"),
        q=data.draw(st.integers(1, 4), "q"),
    )


@pytest.mark.parametrize("plan", PLANS)
def test_block_circulant_under_transformations(plan):
    b, frequencies = 8, (0, 2, 3, 4)
    (x, real, imag, cotangent), exact = circulant_arguments(b, frequencies, batch=(4,))
    _, expected = circulant_reference(*exact[:3], b, frequencies, exact[3])
    function = jax.checkpoint(block_circulant(b, frequencies, plan))

    def loss(x, real, imag, cotangent):
        return jnp.vdot(function(x, real, imag), cotangent)

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    x_bar, real_bar, imag_bar = jax.jit(jax.vmap(gradient, (0, None, None, 0)))(
        x, real, imag, cotangent
    )
    assert_close(x_bar, expected[0])
    assert_close(real_bar.sum(0), expected[1])
    assert_close(imag_bar.sum(0), expected[2])


@pytest.mark.parametrize("plan", ["dft", "dense"])
def test_half_precision_products_stay_in_half_precision(plan):
    # "dense" makes its matrix in float32; what touches the tokens must not.
    (*arguments, cotangent), _ = circulant_arguments(8, (0, 1, 2), batch=(50,), dtype="bfloat16")
    function = block_circulant(8, (0, 1, 2), plan)
    products = dot_generals(lambda g, *a: jax.vjp(function, *a)[1](g), cotangent, *arguments)
    of_tokens = [dot for dot in products if 50 in dot[0].shape or 50 in dot[1].shape]
    assert len(of_tokens) >= 3
    assert {str(side.dtype) for dot in of_tokens for side in dot[:2]} == {"bfloat16"}


@pytest.mark.parametrize("b", [1, 2, 5, 8])
def test_dft_basis_is_orthonormal(b):
    pair, single = dft_basis(b, range(b // 2 + 1))
    basis = np.concatenate([pair.reshape(b, -1), single], axis=1)
    np.testing.assert_allclose(basis.T @ basis, np.eye(b), atol=1e-12)


@pytest.mark.parametrize("placed", [6, 5])
def test_circulant_matrix_is_made_of_circulant_blocks(placed, monkeypatch):
    monkeypatch.setattr(fourier, "_MOST_PLACED", placed)
    (_, real, imag, _), _ = circulant_arguments(6, (0, 1, 3))
    matrix = np.asarray(circulant_matrix(real, imag, 6, (0, 1, 3))).reshape(3, 6, 2, 6)
    for n in range(6):
        for m in range(6):
            np.testing.assert_allclose(matrix[:, n, :, m], matrix[:, 0, :, (m - n) % 6], atol=1e-6)


def test_a_large_block_needs_no_constant_of_its_side_cubed():
    (_, real, imag, _), _ = circulant_arguments(256, (0, 1, 3))
    program = jax.make_jaxpr(lambda *given: circulant_matrix(*given, 256, (0, 1, 3)))(real, imag)
    assert sum(constant.nbytes for constant in program.consts) < 1 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "winograd"}, "no plan 'winograd'.*fft"),
        ({"frequencies": (0, 5)}, "frequency 5 does not exist: block_size=8 has 0 .. 4"),
        ({"frequencies": (1, 0)}, "ascending"),
        ({"frequencies": (-1, 0)}, "non-negative"),
        ({"frequencies": ()}, "frequencies=()"),
        ({"frequencies": (0, 1, 2)}, "real has shape .2, 3, 2., expected .3, 3, 2."),
        ({"frequencies": (0, 4)}, "imag has shape .1, 3, 2., expected .0, 3, 2."),
    ],
)
def test_refuses(change, message):
    (_, real, imag, _), _ = circulant_arguments(8, (0, 1))
    settings = {"frequencies": (0, 1), "implementation": None} | change
    back = Filter(real.mT, imag.mT)
    weights = HiddenMaps((Filter(real, imag),), back)
    blocks = Blocks(8, settings["frequencies"])
    with pytest.raises(ValueError, match=message):
        operator.choose(2, weights, blocks, Activate("silu"), "cpu", settings["implementation"])
