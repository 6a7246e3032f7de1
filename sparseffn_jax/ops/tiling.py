"""Token tiles: a wide hidden layer computed piece by piece, so that it never leaves the cache.

A layer that does little arithmetic is bound by how often its hidden activations go to memory and
back. In tiles they stay in cache; in the backward pass every tile recomputes them from its inputs,
so that a layer keeps nothing for it but what it was given (Chen et al. 2016, 1604.06174).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Rows of a tile come in multiples of this: what vector units and GEMM kernels like.
_ROWS = 16


def over_tokens(
    function: Callable[[Float[Array, "t i"]], Float[Array, "t o"]],
    x: Float[Array, "T i"],
    tile: int | None,
) -> Float[Array, "T o"]:
    """Applies a function that maps every row by itself, tile by tile, recomputed in backward.

    Args:
      function: of a tile's rows; may close over arrays, which get their gradients.
      x: all rows.
      tile: the most rows in a tile; ``None`` takes all rows at once.
    """
    function = jax.checkpoint(function)
    tokens, channels = x.shape
    if tile is None or tokens <= tile:
        return function(x)
    count = -(-tokens // tile)
    rows = _ROWS * -(-tokens // (count * _ROWS))
    padded = jnp.pad(x, ((0, count * rows - tokens), (0, 0)))
    y = jax.lax.map(function, padded.reshape(count, rows, channels))
    return y.reshape(count * rows, y.shape[-1])[:tokens]
