"""Block-sparse products with a static mask: only the blocks that live are stored and multiplied.

Storage follows the mask's structure, which is known when the program is traced:

- *outer* (whole block rows and columns live): one dense matrix of the live rows and columns, so
  that the product is a plain smaller GEMM;
- *free*: the live blocks, ``(n, bi, bo)``, sorted by output block, then by input block.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseffn_jax.ops import planning
from sparseffn_jax.ops.tiling import over_tokens

# Activations, as one array or as one for each block of channels.
Pieces = Sequence[Float[Array, "*t c"]]


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Which blocks of a weight matrix live; hashable, so that it can be static under jit.

    Attributes:
      block_shape: ``(bi, bo)``, the rows (inputs) and columns (outputs) of one block.
      blocks: one tuple of booleans for each block row; ``True`` keeps the block.
    """

    block_shape: tuple[int, int]
    blocks: tuple[tuple[bool, ...], ...]

    def __post_init__(self):
        object.__setattr__(self, "block_shape", _as_block_shape(self.block_shape))
        object.__setattr__(self, "blocks", _as_blocks(self.blocks))
        if not any(map(any, self.blocks)):
            raise ValueError("the block mask keeps no block: leave the part out instead")

    @classmethod
    def from_array(cls, blocks: np.ndarray, block_shape: tuple[int, int]) -> "BlockMask":
        """Builds a mask from a two-dimensional array of booleans, or of 0 and 1, one a block."""
        blocks = np.asarray(blocks)
        if not np.isin(blocks, (0, 1)).all():
            raise ValueError("blocks must be booleans, or 0 and 1")
        return cls(block_shape, blocks.astype(bool).tolist())

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return len(self.blocks), len(self.blocks[0])

    @property
    def shape(self) -> tuple[int, int]:
        """``(inputs, outputs)`` of the weight matrix that the mask covers."""
        return self.grid[0] * self.block_shape[0], self.grid[1] * self.block_shape[1]

    @property
    def size(self) -> int:
        """Entries that live: the number of parameters stored."""
        return sum(map(sum, self.blocks)) * math.prod(self.block_shape)

    @property
    def density(self) -> float:
        """Share of the entries that live."""
        return self.size / math.prod(self.shape)

    @functools.cached_property
    def live_rows(self) -> tuple[int, ...]:
        """Block rows with a living block."""
        return tuple(i for i, row in enumerate(self.blocks) if any(row))

    @functools.cached_property
    def live_columns(self) -> tuple[int, ...]:
        """Block columns with a living block."""
        return tuple(j for j, column in enumerate(zip(*self.blocks, strict=True)) if any(column))

    @functools.cached_property
    def is_outer(self) -> bool:
        """Whether the mask is whole rows and columns, so that a smaller GEMM does it."""
        return sum(map(sum, self.blocks)) == len(self.live_rows) * len(self.live_columns)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the stored weights; see the module's docstring."""
        bi, bo = self.block_shape
        if self.is_outer:
            return len(self.live_rows) * bi, len(self.live_columns) * bo
        return sum(map(sum, self.blocks)), bi, bo

    def compress(self, dense: np.ndarray) -> np.ndarray:
        """Takes a dense ``shape`` matrix to its stored form; what is masked is dropped."""
        bi, bo = self.block_shape
        blocks = np.asarray(dense).reshape(self.grid[0], bi, self.grid[1], bo)
        if self.is_outer:
            live = blocks[np.ix_(self.live_rows, range(bi), self.live_columns, range(bo))]
            return live.reshape(self.kernel_shape)
        rows, columns = self.coordinates()
        return blocks.transpose(0, 2, 1, 3)[rows, columns]

    @functools.cached_property
    def stored_in_row(self) -> Mapping[int, tuple[int, ...]]:
        """For every live block row the places of its blocks in the stored order."""
        rows, _ = self.coordinates()
        return {int(i): tuple(np.flatnonzero(rows == i).tolist()) for i in self.live_rows}

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns block row and block column of every living block, in the stored order."""
        columns, rows = np.nonzero(np.array(self.blocks).T)
        return rows, columns


def block_sparse_matmul(
    x: Float[Array, "*batch i"],
    kernel: Float[Array, "..."],
    mask: BlockMask,
    *,
    implementation: str | None = None,
    lay_out: planning.LayOut = planning.lay_out_anew,
) -> Float[Array, "*batch o"]:
    """Multiplies ``x`` by the block-sparse matrix that ``kernel`` and ``mask`` describe.

    Args:
      x: ``(..., mask.shape[0])``.
      kernel: the living weights, of shape ``mask.kernel_shape``.
      mask: static.
      implementation: ``"slice"`` (outer masks: one smaller GEMM), and for free masks ``"rows"``
        (one GEMM for every input block, whose products are summed where they meet in an output
        block), ``"columns"`` (one GEMM for every output block, on its input blocks side by side)
        or ``"gather"`` (the same, all output blocks with equally many in one batched GEMM), or
        ``"masked"`` (a dense GEMM; the reference, and right near density 1), or ``None`` to
        choose. Plans of many GEMMs run in tiles of tokens.
      lay_out: gives the weights; may keep them from call to call.

    Returns:
      ``(..., mask.shape[1])`` in the dtype of ``x``, accumulated in float32.

    Raises:
      ValueError: if shapes do not fit or the forced plan cannot run with this mask.
    """
    tokens = math.prod(x.shape[:-1])
    product = _product(
        tokens, x.shape[-1], kernel, mask, implementation, x.dtype, lay_out, "kernel"
    )
    return _apply([product], lambda x: product.run([x]), x, mask.shape[1])


def block_sparse_ffn(
    x: Float[Array, "*batch i"],
    expand: Sequence[Float[Array, "..."]],
    activate: Callable[[Sequence[Array], Any], Array],
    channel: Any,
    contract: Float[Array, "..."],
    *,
    expand_mask: BlockMask | None = None,
    contract_mask: BlockMask | None = None,
    implementation: str | None = None,
    lay_out: planning.LayOut = planning.lay_out_anew,
) -> Float[Array, "*batch o"]:
    """Applies block-sparse maps, an elementwise function and another block-sparse map.

    Where both maps run as many GEMMs, hidden units stay in the blocks that the one makes and the
    other takes, in tiles of tokens which the backward pass recomputes: nothing as wide as the
    hidden layer is kept.

    Args:
      x: ``(..., d_in)``.
      expand: weights of the maps to the m hidden channels; two for a gated layer.
      activate: called with one array of hidden channels, all or a block of them, for each map of
        ``expand``, and the same channels of ``channel``.
      channel: a tree of arrays whose last axis is m.
      contract: weights of the map from the hidden channels.
      expand_mask: of ``expand``; ``None`` is a dense map.
      contract_mask: of ``contract``; ``None`` is a dense map.
      implementation: as in :func:`block_sparse_matmul`.
      lay_out: gives every map's weights; may keep them from call to call.

    Returns:
      ``(..., d_out)`` in the dtype of ``x``.

    Raises:
      ValueError: if shapes do not fit or the forced plan cannot run with one of the masks.
    """
    tokens = math.prod(x.shape[:-1])
    width = contract.shape[0] if contract_mask is None else contract_mask.shape[0]
    first = [
        _product(
            tokens,
            x.shape[-1],
            kernel,
            expand_mask,
            implementation,
            x.dtype,
            lay_out,
            f"expand_{i}",
        )
        for i, kernel in enumerate(expand)
    ]
    last = _product(
        tokens, width, contract, contract_mask, implementation, x.dtype, lay_out, "contract"
    )

    def rows(x: Array) -> Pieces:
        us = list(zip(*(product.run([x]) for product in first), strict=True))
        side = width // len(us)
        channels = [
            jax.tree.map(lambda leaf, start=start: leaf[..., start : start + side], channel)
            for start in range(0, width, side)
        ]
        return last.run([activate(u, part) for u, part in zip(us, channels, strict=True)])

    return _apply([*first, last], rows, x, width)


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product with its plan picked and its weights laid out for it.

    Attributes:
      run: of a tile's activations.
      is_unrolled: whether it is a GEMM for each block row or column.
    """

    run: Callable[[Pieces], Pieces]
    is_unrolled: bool = False


def _product(tokens, channels, kernel, mask, implementation, dtype, lay_out, name) -> _Product:
    if mask is None:
        weights = lay_out(f"{name}_dense", lambda: kernel)
        return _Product(lambda xs: [matmul(_join(xs), weights)])
    if channels != mask.shape[0]:
        raise ValueError(f"x has {channels} channels, but the mask covers {mask.shape[0]}")
    if kernel.shape != mask.kernel_shape:
        raise ValueError(f"kernel has shape {kernel.shape}, the mask needs {mask.kernel_shape}")
    costs = planning.block_sparse_costs(
        tokens,
        mask.shape,
        mask.block_shape,
        mask.size,
        (len(mask.live_rows), len(mask.live_columns)),
    )
    refused = {}
    if mask.is_outer:
        for plan in ("rows", "columns", "gather"):
            refused[plan] = "the mask is whole rows and columns, which 'slice' does in one GEMM"
    else:
        refused["slice"] = "the mask is not made of whole block rows and columns"
        if dtype.itemsize < 4:
            refused["rows"] = f"{dtype.name} would round the products before they are summed"
    for plan in refused:
        costs.pop(plan)
    problem = (tokens, *mask.shape, *mask.block_shape, mask.size, mask.is_outer, dtype.name)
    plan = planning.pick("block_sparse_matmul", implementation, costs, refused, problem)
    how = _PLANS[plan]
    weights = lay_out(f"{name}_{plan}", lambda: how.lay_out(kernel, mask))
    if how.is_unrolled:
        return _Product(lambda xs: how.apply(mask, _cut(xs, mask), weights), is_unrolled=True)
    return _Product(lambda xs: [how.apply(mask, _join(xs), weights)])


def _apply(products, rows: Callable[[Array], Pieces], x: Array, width: int) -> Array:
    """Runs products on all tokens, or in tiles where some are of many small GEMMs."""
    if not any(product.is_unrolled for product in products):
        return _join(rows(x))
    tile = planning.token_tile("block_sparse", width * x.dtype.itemsize)
    y = over_tokens(lambda x: _join(rows(x)), x.reshape(-1, x.shape[-1]), tile)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _join(xs: Pieces) -> Array:
    return xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=-1)


def _cut(xs: Pieces, mask: BlockMask) -> tuple[Array, ...]:
    """Returns one piece for every block row; pieces that are so already stay as they are."""
    if len(xs) == mask.grid[0] and xs[0].shape[-1] == mask.block_shape[0]:
        return tuple(xs)
    return tuple(jnp.split(_join(xs), mask.grid[0], axis=-1))


def decompress(kernel: Float[Array, "..."], mask: BlockMask) -> Float[Array, "i o"]:
    """Returns the dense matrix, zeros where masked."""
    bi, bo = mask.block_shape
    dense = jnp.zeros((*mask.grid, bi, bo), kernel.dtype)
    if mask.is_outer:
        rows, columns = np.ix_(mask.live_rows, mask.live_columns)
        live = kernel.reshape(rows.size, bi, columns.size, bo).transpose(0, 2, 1, 3)
    else:
        rows, columns = mask.coordinates()
        live = kernel
    return dense.at[rows, columns].set(live).transpose(0, 2, 1, 3).reshape(mask.shape)


def matmul(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]) -> Float[Array, "*batch o"]:
    """Returns ``x @ kernel`` in the dtype of ``x``, accumulated in float32 where that is narrower.

    XLA accumulates half-precision products in float32 by itself. Asking for a float32 result and
    casting it would say the same of the forward pass, but then the cotangent is cast up too, and
    both products of the backward pass run in float32.
    """
    return jnp.matmul(x, kernel).astype(x.dtype)


def _slice(mask, x, kernel):
    bi, bo = mask.block_shape
    batch = x.shape[:-1]
    if len(mask.live_rows) < mask.grid[0]:
        x = x.reshape(*batch, mask.grid[0], bi)
        x = x.at[..., np.array(mask.live_rows), :].get(indices_are_sorted=True, unique_indices=True)
        x = x.reshape(*batch, kernel.shape[0])
    y = matmul(x, kernel)
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
    """One GEMM a block row. Its own transpose: autodiff would pad every slice and add them up."""
    bo = mask.block_shape[1]
    _, columns = mask.coordinates()
    terms = [[] for _ in range(mask.grid[1])]
    for (row, stored), kernel in zip(mask.stored_in_row.items(), weights, strict=True):
        products = matmul(xs[row], kernel)
        for place, column in enumerate(columns[np.array(stored)]):
            terms[column].append(products[..., place * bo : (place + 1) * bo])
    zeros = jnp.zeros((*xs[0].shape[:-1], bo), xs[0].dtype)
    return tuple(functools.reduce(jnp.add, some) if some else zeros for some in terms)


def _rows_forward(mask, xs, weights):
    return _rows(mask, xs, weights), (xs, weights)


def _rows_backward(mask, kept, dys):
    xs, weights = kept
    _, columns = mask.coordinates()
    dxs, d_weights = [jnp.zeros_like(x) for x in xs], []
    for (row, stored), kernel in zip(mask.stored_in_row.items(), weights, strict=True):
        d_products = jnp.concatenate([dys[j] for j in columns[np.array(stored)]], axis=-1)
        dxs[row] = matmul(d_products, kernel.T)
        d_weights.append(matmul(xs[row].T, d_products))
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
        ys[column] = matmul(inputs, weights)
    return tuple(ys)


def _groups(mask) -> list[tuple[np.ndarray, np.ndarray]]:
    """Block columns with equally many blocks, and these blocks' places in the stored order."""
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
        y = jnp.matmul(inputs, kernel).astype(x.dtype)
        if len(group) < len(out):
            y = out.at[group].set(y, indices_are_sorted=True, unique_indices=True)
        out = y
    return out.transpose(1, 0, 2).reshape(*batch, mask.shape[1])


def _masked(mask, x, matrix):
    del mask
    return matmul(x, matrix)


def _as_stored(kernel, mask):
    del mask
    return kernel


class _Plan(NamedTuple):
    """How a block-sparse product runs.

    Attributes:
      lay_out: of kernel and mask; what may be done once.
      apply: of the mask, activations and what ``lay_out`` gave.
      is_unrolled: whether it is a GEMM for each block row or column, on activations in blocks.
    """

    lay_out: Callable[..., Any]
    apply: Callable[..., Any]
    is_unrolled: bool = False


_PLANS = {
    "slice": _Plan(_as_stored, _slice),
    "rows": _Plan(_by_row, _rows, is_unrolled=True),
    "columns": _Plan(_as_stored, _columns, is_unrolled=True),
    "gather": _Plan(_by_group, _gather),
    "masked": _Plan(decompress, _masked),
}


def _as_block_shape(block_shape) -> tuple[int, int]:
    sides = tuple(block_shape) if isinstance(block_shape, list | tuple) else ()
    whole = all(isinstance(s, int | np.integer) and not isinstance(s, bool) for s in sides)
    if len(sides) != 2 or not whole or min(sides) < 1:
        raise ValueError(f"block_shape={block_shape!r}: expected two positive integers")
    return int(sides[0]), int(sides[1])


def _as_blocks(blocks) -> tuple[tuple[bool, ...], ...]:
    # An array of objects: rows of unequal lengths make it one-dimensional, and types survive.
    array = np.asarray(blocks, object)
    booleans = all(isinstance(block, bool | np.bool_) for block in array.flat)
    if array.ndim != 2 or not array.size or not booleans:
        raise ValueError(
            "the blocks of a mask must be rows of booleans, all of one and the same length"
        )
    return tuple(map(tuple, array.astype(bool).tolist()))
