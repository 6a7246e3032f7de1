"""Token tiles: a wide hidden layer computed piece by piece, so that it never leaves the cache.

A layer that does little arithmetic is bound by how often its hidden activations go to memory and
back. In tiles they stay in cache; in the backward pass every tile recomputes them from its inputs,
so that a layer keeps nothing for it but what it was given (Chen et al. 2016, 1604.06174).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

# Rows of a tile come in multiples of this: what vector units and GEMM kernels like.
_ROWS = 16


_KEPT = "kept"


def kept(x: Array) -> Array:
    """Marks what :func:`over_tokens` keeps for the backward pass, because it is narrow."""
    return checkpoint_name(x, _KEPT)


def over_tokens(
    function: Callable[[Float[Array, "t i"]], Float[Array, "t o"]],
    x: Float[Array, "T i"],
    tile: int | None,
) -> Float[Array, "T o"]:
    """Applies a function that maps every row by itself, tile by tile, recomputed in backward.

    Args:
      function: of a tile's rows; may close over arrays, which get their gradients. What it marks
        by :func:`kept` is not recomputed.
      x: all rows.
      tile: the most rows in a tile; ``None`` takes all rows at once.
    """
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    function = jax.checkpoint(function, policy=policy)
    tokens, channels = x.shape
    if tile is None or tokens <= tile:
        return function(x)
    count, rows = _tiles(tokens, tile)
    padded = jnp.pad(x, ((0, count * rows - tokens), (0, 0)))
    y = jax.lax.map(function, padded.reshape(count, rows, channels))
    return y.reshape(count * rows, y.shape[-1])[:tokens]


def _tiles(tokens: int, tile: int) -> tuple[int, int]:
    """Returns how many tiles to take, and of how many rows."""
    fewest = -(-tokens // tile)
    # Padding copies all rows twice: tiles a little smaller that need none are cheaper.
    for count in range(fewest, 2 * fewest):
        if tokens % (count * _ROWS) == 0:
            return count, tokens // count
    return fewest, _ROWS * -(-tokens // (fewest * _ROWS))
