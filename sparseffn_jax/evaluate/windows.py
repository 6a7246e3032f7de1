"""Windows of tokens, on which a model is trained and evaluated."""

import numpy as np
from jaxtyping import Int


def cut_windows(tokens: Int[np.ndarray, " n"], window: int) -> Int[np.ndarray, "k w"]:
    """Cuts a row of tokens into windows of ``window + 1``, each sharing one token with the next.

    Every token but the first is then the target of exactly one window. Tokens behind the last full
    window are dropped.
    """
    count = max(0, (len(tokens) - 1) // window)
    starts = window * np.arange(count)[:, None]
    return tokens[starts + np.arange(window + 1)[None, :]]


def check_window(window: int | None, n_positions: int) -> int:
    """Returns the length of a window, which is by default the model's number of positions.

    Raises:
      ValueError: if the window is empty or has more tokens than the model has positions.
    """
    if window is None:
        return n_positions
    if not 1 <= window <= n_positions:
        raise ValueError(
            f"window={window} must lie between 1 and the model's n_positions={n_positions}"
        )
    return window
