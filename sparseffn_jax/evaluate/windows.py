"""Windows of tokens, on which a model is trained and evaluated."""

from typing import Any

import numpy as np
from jaxtyping import Shaped

from sparseffn_jax.measure.memory import halves


def cut_windows(tokens: Shaped[np.ndarray, " n"], window: int) -> Shaped[np.ndarray, "k w"]:
    """Cuts a row of tokens into windows of ``window + 1``, each sharing one token with the next.

    Every token but the first is then the target of exactly one window. Tokens behind the last full
    window are dropped.
    """
    if len(tokens) <= window:
        return np.empty((0, window + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, window + 1)[::window].copy()


# Attention over more tokens costs more than most texts give back.
DEFAULT_WINDOW = 1024


def check_window(window: int | None, n_positions: int) -> int:
    """Returns the length of a window, by default the smaller of n_positions and 1024.

    Raises:
      ValueError: if the window is empty or has more tokens than the model has positions.
    """
    if window is None:
        return min(n_positions, DEFAULT_WINDOW)
    if not 1 <= window <= n_positions:
        raise ValueError(
            f"window={window} must lie between 1 and the model's n_positions={n_positions}"
        )
    return window


def smaller_batches(params: Any, batch: Any, *more: Any) -> dict[str, tuple[Any, ...]]:
    """Returns the arguments of a forward pass with half of the batch, and half of the window.

    Args:
      params: the model's parameters.
      batch: token ids (b, t + 1).
      *more: arrays (b, t) that belong to them.

    Returns:
      Each by the setting that makes it so, as :class:`~sparseffn_jax.measure.memory.CheckedJit`
      takes them.
    """
    return halves(
        len(batch),
        batch.shape[1] - 1,
        lambda b, t: (params, batch[:b, : t + 1], *(part[:b, :t] for part in more)),
    )
