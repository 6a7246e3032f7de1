"""Elementwise functions of many activations and few parameters.

What is particular about them is the parameters' gradient: a sum over all tokens of a product that
nobody else needs. XLA's CPU compiler fuses product and sum into one scalar chain of additions,
which takes several times as long as the layer's GEMMs; here the product is folded elementwise to a
sixteenth and the rest is summed by a GEMM with ones.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The most slices that are added up in one elementwise pass.
_FOLDS = 16


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


def sum_to(
    shape: Sequence[int], term: Callable[..., Array], *arrays: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns ``term(*arrays)``, summed to a shape that broadcasts against the arrays.

    Args:
      shape: shape of the result. Axes of length 1, and leading axes that it lacks, are summed over.
      term: elementwise function of the arrays; it is traced on slices of them.
      *arrays: arrays of one and the same shape.
    """
    full, target = arrays[0].shape, tuple(shape)
    padded = (1,) * (len(full) - len(target)) + target
    summed = tuple(axis for axis, side in enumerate(padded) if side == 1)
    if not summed:
        return term(*arrays).reshape(target)
    together = summed[-1] - summed[0] == len(summed) - 1
    at_an_end = summed[0] == 0 or summed[-1] == len(full) - 1

    def plain(*arrays: Array) -> Array:
        return jnp.sum(term(*arrays), axis=summed).reshape(target)

    if not (together and at_an_end):
        return plain(*arrays)

    def folded(*arrays: Array) -> Array:
        return _fold(term, arrays, summed).reshape(target)

    return jax.lax.platform_dependent(*arrays, cpu=folded, default=plain)


def _fold(term: Callable[..., Array], arrays: Sequence[Array], summed: tuple[int, ...]) -> Array:
    """Sums over leading or trailing axes, first elementwise and then by a GEMM with ones."""
    full = arrays[0].shape
    is_last = summed[-1] == len(full) - 1
    if not is_last:
        arrays = tuple(array.reshape(-1, *full[len(summed) :]) for array in arrays)
    # The first axis, because what is left of it are the longest contiguous stretches.
    slices = zip(*(_slices(array, summed[0]) for array in arrays), strict=True)
    folded = functools.reduce(jnp.add, itertools.starmap(term, slices))
    if is_last:
        rest = folded @ jnp.ones((folded.shape[-1], 1), folded.dtype)
        return rest.sum(axis=summed)
    rows = folded.reshape(len(folded), math.prod(folded.shape[1:]))
    return jnp.ones((1, len(rows)), rows.dtype) @ rows


def _slices(array: Array, axis: int) -> list[Array]:
    """Cuts an axis into at most sixteen slices of equal length."""
    side, count = array.shape[axis], math.gcd(array.shape[axis], _FOLDS)
    if axis == array.ndim - 1:
        return jnp.split(array, count, axis)
    # Every sixteenth row, not a stretch of them: devices that share the rows keep their own.
    shape = (*array.shape[:axis], side // count, count, *array.shape[axis + 1 :])
    return [
        jax.lax.index_in_dim(array.reshape(shape), i, axis + 1, keepdims=False)
        for i in range(count)
    ]
