"""What kernels that are written by hand share: how they are called, and what they compute.

They are written in Pallas and compiled by Triton.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from sparseffn_jax.ops.activations import get_activation
from sparseffn_jax.ops.hidden import Activate
from sparseffn_jax.ops.plans.kernels import triton, triton_refusal
from sparseffn_jax.ops.polynomial import (
    MultiplyAdd,
    multiply_and_add,
    slope,
    value,
    weighted_terms,
)

# That of Hopper's GPUs, for whose registers and shared memory the tiles were chosen: with those of
# low-rank layers the compiler spills for an A100, and refuses some ranks for a B200.
_CAPABILITIES = ("9.0",)


class Tile(NamedTuple):
    """What a kernel takes at a time, and how.

    Attributes:
      rows: number of tokens.
      units: number of hidden units.
      warps: groups of 32 threads that share the work.
      stages: how many tiles are loaded ahead.
    """

    rows: int
    units: int
    warps: int
    stages: int


def refusal(activate: Activate, dtype: Any) -> str | None:
    """Returns the reason why no such kernel can run, or ``None`` if one may.

    Args:
      activate: the elementwise function of the hidden units.
      dtype: dtype of the operands.
    """
    if not activate.degrees and activate.activation == "gelu":
        return "Triton does not have the error function of an exact GELU"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 or float16, not {dtype}"
    return triton_refusal(_CAPABILITIES)


def call(
    kernel: Callable[..., None],
    tile: Tile,
    grid: tuple[int, ...],
    operands: Any,
    out: Any,
    *,
    interpret: bool,
) -> Any:
    """Runs a kernel.

    Args:
      kernel: function of the operands, with references in the place of arrays, and of references to
        each of the outputs. Profiles, and what reads compiled programs, find it by its name.
      tile: what it takes at a time, and how.
      grid: number of programs along each axis.
      operands: tuple of trees of arrays.
      out: shape and dtype of the output, or a sequence of them.
      interpret: whether to run in Pallas's interpreter, which needs no GPU.

    Returns:
      The output, or a sequence of them.
    """
    leaves, structure = jax.tree.flatten(operands)

    def body(*refs: Any) -> None:
        kernel(*jax.tree.unflatten(structure, refs[: len(leaves)]), *refs[len(leaves) :])

    body.__name__ = body.__qualname__ = getattr(kernel, "func", kernel).__name__
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=grid,
        interpret=interpret,
        name=body.__name__,
        compiler_params=triton().CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    )(*leaves)


def round_up(side: int, multiple: int) -> int:
    """Returns the smallest multiple that is no smaller than a side."""
    return multiple * -(-side // multiple)


def pad(array: Array, *sides: int) -> Array:
    """Returns the array with zeros behind it, up to the given length of each side."""
    return jnp.pad(array, [(0, to - side) for to, side in zip(sides, array.shape, strict=True)])


def dot(a: Array, b: Array, over: tuple[int, int] = (1, 0)) -> Array:
    """Multiplies matrices, summing over an axis of each; the result is in float32."""
    axes = (((over[0],), (over[1],)), ((), ()))
    # Whatever precision the user asks of products in float32, these are in half precision.
    return jax.lax.dot_general(
        a, b, axes, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )


class Arithmetic(NamedTuple):
    """How kernels compute what is elementwise, in float32.

    Attributes:
      multiply_add: ``a * b + c`` of arrays and numbers that broadcast against each other.
      tanh: the hyperbolic tangent.
    """

    multiply_add: MultiplyAdd
    tanh: Callable[[Array], Array]


def arithmetic(dtype: Any, *, interpret: bool) -> Arithmetic:
    """Returns the arithmetic of kernels.

    On a GPU a sum of a product is one instruction, which Triton does not make of two operations,
    and so is a hyperbolic tangent whose relative error of 2^-11 bfloat16 does not show. Hidden
    units took almost four times as many instructions without them.

    Args:
      dtype: dtype of the operands.
      interpret: whether the kernels run in Pallas's interpreter, which has no such instructions.
    """
    if interpret:
        return Arithmetic(multiply_and_add, jnp.tanh)
    return Arithmetic(
        _fused_multiply_add, triton().approx_tanh if dtype == jnp.bfloat16 else jnp.tanh
    )


def _fused_multiply_add(a: Any, b: Any, c: Any) -> Array:
    arrays = jnp.broadcast_arrays(*(jnp.asarray(each, jnp.float32) for each in (a, b, c)))
    (result,) = triton().elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=arrays,
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)],
    )
    return result


# Value and slope of the activations that a hyperbolic tangent gives; a sigmoid is
# (1 + tanh(u / 2)) / 2.


def _gelu_by_tanh(u: Array, by: Arithmetic) -> tuple[Array, Array]:
    scale, cubic = math.sqrt(2.0 / math.pi), 0.044715
    square, half = u * u, 0.5 * u
    t = by.tanh(u * by.multiply_add(square, scale * cubic, scale))
    inner = half * by.multiply_add(square, 3.0 * scale * cubic, scale)
    slope = by.multiply_add(inner, by.multiply_add(-t, t, 1.0), by.multiply_add(0.5, t, 0.5))
    return by.multiply_add(half, t, half), slope


def _silu(u: Array, by: Arithmetic, scale: float = 1.0) -> tuple[Array, Array]:
    sigmoid = by.multiply_add(0.5, by.tanh(0.5 * scale * u), 0.5)
    y = u * sigmoid
    return y, by.multiply_add(scale * y, 1.0 - sigmoid, sigmoid)


def _sigmoid(u: Array, by: Arithmetic) -> tuple[Array, Array]:
    y = by.multiply_add(0.5, by.tanh(0.5 * u), 0.5)
    return y, by.multiply_add(-y, y, y)


def _tanh(u: Array, by: Arithmetic) -> tuple[Array, Array]:
    y = by.tanh(u)
    return y, by.multiply_add(-y, y, 1.0)


_BY_TANH: Mapping[str, Callable[[Array, Arithmetic], tuple[Array, Array]]] = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), _gelu_by_tanh),
    **dict.fromkeys(("silu", "swish"), _silu),
    "quick_gelu": functools.partial(_silu, scale=1.702),
    "sigmoid": _sigmoid,
    "tanh": _tanh,
}


def hidden_units(
    activate: Activate,
    us: Sequence[Array],
    coefficients: Mapping[int, Array] | None,
    by: Arithmetic,
) -> Array:
    """Returns hidden units from their pre-activations by each map, all in float32.

    Args:
      activate: the elementwise function.
      us: pre-activations by each map into the hidden units, with their biases.
      coefficients: those of a polynomial, by their degrees, which broadcast against the
        pre-activations; ``None`` for a plain activation.
      by: how to compute them.
    """
    if coefficients is not None:
        phi = value(us[0], coefficients, activate.radius, by.multiply_add)
    elif (by_tanh := _BY_TANH.get(activate.activation)) is not None:
        phi, _ = by_tanh(us[0], by)
    else:
        phi = get_activation(activate.activation)(us[0])
    return phi if len(us) == 1 else phi * us[1]


def derivatives(
    activate: Activate,
    us: Sequence[Array],
    coefficients: Mapping[int, Array] | None,
    dh: Array,
    by: Arithmetic,
) -> tuple[Array, list[Array], list[Array]]:
    """Returns hidden units, gradients of pre-activations, and those of coefficients by token.

    Args:
      activate: the elementwise function.
      us: pre-activations by each map into the hidden units, with their biases.
      coefficients: those of a polynomial, by their degrees; ``None`` for a plain activation.
      dh: gradient of the hidden units, in float32.
      by: how to compute them.
    """
    d_phi = dh if len(us) == 1 else dh * us[1]
    terms: list[Array] = []
    if coefficients is not None:
        phi = value(us[0], coefficients, activate.radius, by.multiply_add)
        du = d_phi * slope(us[0], coefficients, activate.radius, by.multiply_add)
        terms = weighted_terms(activate.degrees, activate.radius, d_phi, us[0], by.multiply_add)
    elif (by_tanh := _BY_TANH.get(activate.activation)) is not None:
        phi, steepness = by_tanh(us[0], by)
        du = d_phi * steepness
    else:
        phi, pullback = jax.vjp(get_activation(activate.activation), us[0])
        (du,) = pullback(d_phi)
    if len(us) == 1:
        return phi, [du], terms
    return phi * us[1], [du, dh * phi], terms
