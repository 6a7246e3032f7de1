"""Static block masks say which blocks of a weight matrix live: are stored and multiplied.

How they are stored follows the mask's structure, which is known when the program is traced:

- A *structured* mask has whole block rows and block columns live. What is stored is one dense
  matrix of the live rows and columns, so that the product is a plain smaller GEMM.
- Of any other, *unstructured*, mask the live blocks are stored, ``(n, bi, bo)``, sorted by output
  block and then by input block.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """A mask says which blocks of a weight matrix live; it can be a static argument under jit.

    Attributes:
      block_shape: One block has ``(bi, bo)`` rows (inputs) and columns (outputs).
      blocks: There is one tuple of booleans for each block row; ``True`` keeps the block.

    Raises:
      ValueError: If a field is of another form, or if the mask keeps no block.

    Example:
      >>> mask = BlockMask(block_shape=(2, 3), blocks=((True, False), (True, True)))
      >>> mask.shape, mask.size, mask.density
      ((4, 6), 18, 0.75)
      >>> mask.is_structured, mask.kernel_shape
      (False, (3, 2, 3))
    """

    block_shape: tuple[int, int]
    blocks: tuple[tuple[bool, ...], ...]

    def __post_init__(self):
        object.__setattr__(self, "block_shape", _as_block_shape(self.block_shape))
        object.__setattr__(self, "blocks", _as_blocks(self.blocks))
        if not any(map(any, self.blocks)):
            raise ValueError("the block mask keeps no block: leave the part out instead")

    def __hash__(self):
        return self._hash

    def __getstate__(self):
        # The fields alone: another Python may hash them to another number.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_array(cls, blocks: np.ndarray, block_shape: tuple[int, int]) -> "BlockMask":
        """Builds a mask from a ``(block rows, block columns)`` array of booleans, or of 0 and 1.

        Raises:
          ValueError: If the array is of another form, or if it keeps no block.
        """
        blocks = np.asarray(blocks)
        if not np.isin(blocks, (0, 1)).all():
            raise ValueError("blocks must be booleans, or 0 and 1")
        return cls(block_shape, blocks.astype(bool).tolist())

    @property
    def grid(self) -> tuple[int, int]:
        """Counts the block rows and the block columns."""
        return len(self.blocks), len(self.blocks[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Gives the shape of the weight matrix that the mask covers, ``(inputs, outputs)``."""
        return self.grid[0] * self.block_shape[0], self.grid[1] * self.block_shape[1]

    @property
    def size(self) -> int:
        """Counts the entries that live, each of which is one stored parameter."""
        return sum(map(sum, self.blocks)) * math.prod(self.block_shape)

    @property
    def density(self) -> float:
        """Gives the share of the entries that live, between 0 and 1."""
        return self.size / math.prod(self.shape)

    @functools.cached_property
    def _hash(self) -> int:
        # Every call of a compiled function with a model as its static argument asks for it.
        return hash((self.block_shape, self.blocks))

    @functools.cached_property
    def live_rows(self) -> tuple[int, ...]:
        """Lists the block rows that have a living block, in ascending order."""
        return tuple(i for i, row in enumerate(self.blocks) if any(row))

    @functools.cached_property
    def live_columns(self) -> tuple[int, ...]:
        """Lists the block columns that have a living block, in ascending order."""
        return tuple(j for j, column in enumerate(zip(*self.blocks, strict=True)) if any(column))

    @functools.cached_property
    def is_structured(self) -> bool:
        """Tells whether whole block rows and columns live, so that one smaller GEMM is enough."""
        return sum(map(sum, self.blocks)) == len(self.live_rows) * len(self.live_columns)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Gives the shape of the stored weights, which the module's docstring explains."""
        bi, bo = self.block_shape
        if self.is_structured:
            return len(self.live_rows) * bi, len(self.live_columns) * bo
        return sum(map(sum, self.blocks)), bi, bo

    def compress(self, dense: np.ndarray) -> np.ndarray:
        """Takes a dense matrix of the mask's shape to its stored form and drops what is masked."""
        bi, bo = self.block_shape
        blocks = np.asarray(dense).reshape(self.grid[0], bi, self.grid[1], bo)
        if self.is_structured:
            live = blocks[np.ix_(self.live_rows, range(bi), self.live_columns, range(bo))]
            return live.reshape(self.kernel_shape)
        rows, columns = self.coordinates()
        return blocks.transpose(0, 2, 1, 3)[rows, columns]

    @functools.cached_property
    def stored_in_row(self) -> Mapping[int, tuple[int, ...]]:
        """Maps every live block row to the places of its blocks in the stored order."""
        rows, _ = self.coordinates()
        return {int(i): tuple(np.flatnonzero(rows == i).tolist()) for i in self.live_rows}

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the block rows and block columns of the living blocks, in the stored order."""
        columns, rows = np.nonzero(np.array(self.blocks).T)
        return rows, columns


def decompress(kernel: Float[Array, "..."], mask: BlockMask) -> Float[Array, "i o"]:
    """Returns the dense matrix of stored weights, with zeros where it is masked."""
    bi, bo = mask.block_shape
    dense = jnp.zeros((*mask.grid, bi, bo), kernel.dtype)
    if mask.is_structured:
        rows, columns = np.ix_(mask.live_rows, mask.live_columns)
        live = kernel.reshape(rows.size, bi, columns.size, bo).transpose(0, 2, 1, 3)
    else:
        rows, columns = mask.coordinates()
        live = kernel
    return dense.at[rows, columns].set(live).transpose(0, 2, 1, 3).reshape(mask.shape)


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
