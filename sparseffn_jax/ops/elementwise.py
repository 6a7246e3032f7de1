"""Elementwise functions of many activations and few parameters.

What is particular about them is the parameters' gradient: a sum over all tokens of a product that
nobody else needs. XLA's CPU compiler fuses product and sum into one scalar chain of additions,
which takes several times as long as the layer's GEMMs; here the product is folded elementwise to a
quarter and the rest is summed by a GEMM with ones.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The most slices that are added up in one elementwise pass: more take long to compile.
_FOLDS = 4


@jax.custom_vjp
def add_bias(u: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns ``u + bias``, with a backward pass that sums the gradient of the bias fast.

    Args:
      u: activations of any shape.
      bias: an array that broadcasts against ``u``: an axis along which it is constant has length 1,
        or is missing if it is a leading one.
    """
    return u + bias


def _add_bias_forward(u, bias):
    return u + bias, bias


def _add_bias_backward(bias, dy):
    # In float32, as XLA adds up half precision.
    db = sum_to(bias.shape, lambda dy: dy.astype(jnp.float32), dy)
    return dy, db.astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def sum_to(shape: Sequence[int], term: Callable[..., Any], *arrays: Float[Array, "..."]) -> Any:
    """Returns ``term(*arrays)``, summed to a shape that broadcasts against the arrays.

    Args:
      shape: shape of the result. Axes of length 1, and leading axes that it lacks, are summed over.
      term: elementwise function of the arrays, which may return a tree; it is traced on slices of
        the arrays.
      *arrays: arrays of one and the same shape.
    """
    full, target = arrays[0].shape, tuple(shape)
    padded = (1,) * (len(full) - len(target)) + target
    summed = tuple(axis for axis, side in enumerate(padded) if side == 1)
    together = not summed or summed[-1] - summed[0] == len(summed) - 1
    at_an_end = not summed or summed[0] == 0 or summed[-1] == len(full) - 1

    def plain(*arrays: Array) -> Any:
        terms = term(*arrays)
        return jax.tree.map(lambda x: jnp.sum(x, axis=summed).reshape(target), terms)

    if not (summed and together and at_an_end):
        return plain(*arrays)

    def folded(*arrays: Array) -> Any:
        folds = _fold(term, arrays, summed)
        return jax.tree.map(lambda x: _sum_by_gemm(x, full, summed).reshape(target), folds)

    return jax.lax.platform_dependent(*arrays, cpu=folded, default=plain)


def _fold(term: Callable[..., Any], arrays: Sequence[Array], summed: tuple[int, ...]) -> Any:
    """Sums the terms over leading or trailing axes in part, elementwise."""
    full = arrays[0].shape
    if summed[-1] < len(full) - 1:
        arrays = tuple(array.reshape(-1, *full[len(summed) :]) for array in arrays)
    # The first axis, because what is left of it are the longest contiguous stretches.
    slices = zip(*(_slices(array, summed[0]) for array in arrays), strict=True)
    terms = list(itertools.starmap(term, slices))
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), terms)


def _sum_by_gemm(folded: Array, full: tuple[int, ...], summed: tuple[int, ...]) -> Array:
    """Sums what :func:`_fold` has left of the axes by a GEMM with ones."""
    if summed[-1] == len(full) - 1:
        rest = folded @ jnp.ones((folded.shape[-1], 1), folded.dtype)
        return rest.sum(axis=summed)
    rows = folded.reshape(len(folded), math.prod(folded.shape[1:]))
    return jnp.ones((1, len(rows)), rows.dtype) @ rows


def _slices(array: Array, axis: int) -> list[Array]:
    """Cuts an axis into at most four slices of equal length."""
    side, count = array.shape[axis], math.gcd(array.shape[axis], _FOLDS)
    if axis == array.ndim - 1:
        return jnp.split(array, count, axis)
    # Every fourth row, not a stretch of them: devices that share the rows keep their own.
    shape = (*array.shape[:axis], side // count, count, *array.shape[axis + 1 :])
    return [
        jax.lax.index_in_dim(array.reshape(shape), i, axis + 1, keepdims=False)
        for i in range(count)
    ]
