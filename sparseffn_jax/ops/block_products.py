"""The plans of one block-sparse product: how a stored kernel is packed, and how it is multiplied.

Every plan is a pair of functions of a static :class:`BlockMask`;
:mod:`sparseffn_jax.ops.block_sparse` chooses between them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseffn_jax.ops.masks import BlockMask, decompress

# Activations, as one array or as one for each block of channels.
Pieces = Sequence[Float[Array, "*t _"]]


def join(xs: Pieces) -> Array:
    """Returns pieces side by side, as one array."""
    return xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=-1)


def cut(xs: Pieces, mask: BlockMask) -> tuple[Array, ...]:
    """Returns one piece for every block row; pieces that fit already are returned unchanged."""
    if len(xs) == mask.grid[0] and xs[0].shape[-1] == mask.block_shape[0]:
        return tuple(xs)
    return tuple(jnp.split(join(xs), mask.grid[0], axis=-1))


def _slice(mask, x, kernel):
    bi, bo = mask.block_shape
    batch = x.shape[:-1]
    if len(mask.live_rows) < mask.grid[0]:
        x = x.reshape(*batch, mask.grid[0], bi)
        x = x.at[..., np.array(mask.live_rows), :].get(indices_are_sorted=True, unique_indices=True)
        x = x.reshape(*batch, kernel.shape[0])
    y = x @ kernel
    if len(mask.live_columns) == mask.grid[1]:
        return y
    out = jnp.zeros((*batch, mask.grid[1], bo), y.dtype)
    y = y.reshape(*batch, len(mask.live_columns), bo)
    out = out.at[..., np.array(mask.live_columns), :].set(
        y, indices_are_sorted=True, unique_indices=True
    )
    return out.reshape(*batch, mask.shape[1])


def _by_row(kernel, mask) -> tuple[Array, ...]:
    bi, _ = mask.block_shape
    return tuple(
        kernel[np.array(stored)].transpose(1, 0, 2).reshape(bi, -1)
        for stored in mask.stored_in_row.values()
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(mask, xs, weights):
    """Runs one GEMM for each block row.

    The backward pass is written out, because autodiff would pad every slice and add them up.
    """
    return _rows_forward(mask, xs, weights)[0]


def _rows_forward(mask, xs, weights):
    bo = mask.block_shape[1]
    _, columns = mask.coordinates()
    terms = [[] for _ in range(mask.grid[1])]
    for (row, stored), kernel in zip(mask.stored_in_row.items(), weights, strict=True):
        products = xs[row] @ kernel
        for place, column in enumerate(columns[np.array(stored)]):
            terms[column].append(products[..., place * bo : (place + 1) * bo])
    zeros = jnp.zeros((*xs[0].shape[:-1], bo), xs[0].dtype)
    ys = tuple(functools.reduce(jnp.add, some) if some else zeros for some in terms)
    return ys, (xs, weights)


def _rows_backward(mask, kept, dys):
    xs, weights = kept
    _, columns = mask.coordinates()
    dxs, d_weights = [jnp.zeros_like(x) for x in xs], []
    for (row, stored), kernel in zip(mask.stored_in_row.items(), weights, strict=True):
        d_products = jnp.concatenate([dys[j] for j in columns[np.array(stored)]], axis=-1)
        dxs[row] = d_products @ kernel.T
        d_weights.append(xs[row].T @ d_products)
    return tuple(dxs), tuple(d_weights)


_rows.defvjp(_rows_forward, _rows_backward)


def _columns(mask, xs, kernel):
    rows, columns = mask.coordinates()
    bi, bo = mask.block_shape
    ys = [jnp.zeros((*xs[0].shape[:-1], bo), xs[0].dtype)] * mask.grid[1]
    for column in mask.live_columns:
        (stored,) = np.nonzero(columns == column)
        inputs = jnp.concatenate([xs[i] for i in rows[stored]], axis=-1)
        weights = kernel[stored[0] : stored[-1] + 1].reshape(len(stored) * bi, bo)
        ys[column] = inputs @ weights
    return tuple(ys)


def _groups(mask) -> list[tuple[np.ndarray, np.ndarray]]:
    """Groups block columns that have equally many living blocks.

    Returns the numbers of the columns of each group, and the places of their blocks in the stored
    order.
    """
    _, columns = mask.coordinates()
    per_column = np.bincount(columns, minlength=mask.grid[1])
    first = np.concatenate([[0], np.cumsum(per_column)])
    groups = []
    for count in np.unique(per_column[per_column > 0]):
        group = np.flatnonzero(per_column == count)
        groups.append((group, first[group][:, None] + np.arange(count)))
    return groups


def _by_group(kernel, mask) -> tuple[Array, ...]:
    bi, bo = mask.block_shape
    return tuple(
        kernel[stored].reshape(len(group), stored.shape[1] * bi, bo)
        for group, stored in _groups(mask)
    )


def _gather(mask, x, weights):
    bi, bo = mask.block_shape
    batch, tokens = x.shape[:-1], math.prod(x.shape[:-1])
    rows, _ = mask.coordinates()
    x = x.reshape(tokens, mask.grid[0], bi)
    # Output blocks with equally many input blocks share one batched GEMM: nothing is padded.
    out = jnp.zeros((mask.grid[1], tokens, bo), x.dtype)
    for (group, stored), kernel in zip(_groups(mask), weights, strict=True):
        inputs = x[:, rows[stored]].transpose(1, 0, 2, 3)
        inputs = inputs.reshape(len(group), tokens, stored.shape[1] * bi)
        y = inputs @ kernel
        if len(group) < len(out):
            y = out.at[group].set(y, indices_are_sorted=True, unique_indices=True)
        out = y
    return out.transpose(1, 0, 2).reshape(*batch, mask.shape[1])


def _masked(mask, x, matrix):
    del mask
    return x @ matrix


def _as_stored(kernel, mask):
    del mask
    return kernel


class Plan(NamedTuple):
    """One way to run a block-sparse product.

    Attributes:
      pack: takes stored kernel and mask and returns what ``apply`` needs; one call serves any
        number of products.
      apply: takes mask, activations and packed kernel and returns the product.
      is_unrolled: whether the plan runs one GEMM for each block row or column, on activations that
        are cut into blocks.
    """

    pack: Callable[..., Any]
    apply: Callable[..., Any]
    is_unrolled: bool = False


PLANS = {
    "slice": Plan(_as_stored, _slice),
    "rows": Plan(_by_row, _rows, is_unrolled=True),
    "columns": Plan(_as_stored, _columns, is_unrolled=True),
    "gather": Plan(_by_group, _gather),
    "masked": Plan(decompress, _masked),
}
