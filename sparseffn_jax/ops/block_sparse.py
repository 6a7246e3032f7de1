"""Block-sparse products with a static mask: only the blocks that live are stored and multiplied.

Storage follows the mask's structure, which is known when the program is traced:

- *outer* (whole block rows and columns live): one dense matrix of the live rows and columns, so
  that the product is a plain smaller GEMM;
- *free*: the live blocks, ``(n, bi, bo)``, sorted by output block, then by input block.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseffn_jax.ops import planning


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
) -> Float[Array, "*batch o"]:
    """Multiplies ``x`` by the block-sparse matrix that ``kernel`` and ``mask`` describe.

    Args:
      x: ``(..., mask.shape[0])``.
      kernel: the living weights, of shape ``mask.kernel_shape``.
      mask: static.
      implementation: ``"slice"`` (outer masks: one smaller GEMM), ``"gather"`` (free masks: for
        every output block its input blocks, gathered, and one batched GEMM for all output blocks
        with equally many), ``"masked"`` (a dense GEMM; the reference, and right near density 1),
        or ``None`` to choose.

    Returns:
      ``(..., mask.shape[1])`` in the dtype of ``x``, accumulated in float32.

    Raises:
      ValueError: if shapes do not fit or the forced plan cannot run with this mask.
    """
    if x.shape[-1] != mask.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} channels, but the mask covers {mask.shape[0]}")
    if kernel.shape != mask.kernel_shape:
        raise ValueError(f"kernel has shape {kernel.shape}, the mask needs {mask.kernel_shape}")
    tokens = math.prod(x.shape[:-1])
    costs = planning.block_sparse_costs(tokens, mask.size, math.prod(mask.shape))
    refused = {}
    if mask.is_outer:
        refused["gather"] = (
            "the mask is whole rows and columns, which 'slice' does without a gather"
        )
    else:
        refused["slice"] = "the mask is not made of whole block rows and columns"
    for plan in refused:
        costs.pop(plan)
    problem = (tokens, *mask.shape, *mask.block_shape, mask.size, mask.is_outer, x.dtype.name)
    plan = planning.pick("block_sparse_matmul", implementation, costs, refused, problem)
    return {"slice": _slice, "gather": _gather, "masked": _masked}[plan](x, kernel, mask)


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


def _slice(x, kernel, mask):
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


def _gather(x, kernel, mask):
    bi, bo = mask.block_shape
    batch, tokens = x.shape[:-1], math.prod(x.shape[:-1])
    rows, columns = mask.coordinates()
    per_column = np.bincount(columns, minlength=mask.grid[1])
    first = np.concatenate([[0], np.cumsum(per_column)])
    x = x.reshape(tokens, mask.grid[0], bi)
    # Output blocks with equally many input blocks share one batched GEMM: nothing is padded.
    out = jnp.zeros((mask.grid[1], tokens, bo), x.dtype)
    for count in np.unique(per_column[per_column > 0]):
        group = np.flatnonzero(per_column == count)
        stored = first[group][:, None] + np.arange(count)
        inputs = x[:, rows[stored]].transpose(1, 0, 2, 3).reshape(len(group), tokens, count * bi)
        weights = kernel[stored].reshape(len(group), count * bi, bo)
        y = jnp.matmul(inputs, weights).astype(x.dtype)
        if len(group) < len(out):
            y = out.at[group].set(y, indices_are_sorted=True, unique_indices=True)
        out = y
    return out.transpose(1, 0, 2).reshape(*batch, mask.shape[1])


def _masked(x, kernel, mask):
    return matmul(x, decompress(kernel, mask))


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
