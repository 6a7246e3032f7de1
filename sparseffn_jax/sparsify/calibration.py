"""Checks of calibration text."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.decoder import Decoder


def check_calibration(
    model: Decoder,
    configs: Sequence[SparseFFNConfig | None],
    calibration: Int[np.ndarray, "n t"],
) -> None:
    """Checks that the calibration text fits the model and is long enough.

    Args:
      model: the decoder.
      configs: the configuration of each layer; ``None`` for a layer that stays dense.
      calibration: token ids (n, t).

    Raises:
      ValueError: if the text does not fit the model, or is too short.
    """
    if calibration.ndim != 2 or calibration.shape[1] > model.spec.n_positions:
        raise ValueError(
            f"calibration has shape {calibration.shape}: expected (windows, tokens) with at most "
            f"n_positions={model.spec.n_positions} tokens"
        )
    wrong = calibration[(calibration < 0) | (calibration >= model.config.vocab_size)]
    if wrong.size:
        raise ValueError(
            f"calibration holds token id {wrong[0]}, but the model has vocab_size="
            f"{model.config.vocab_size}: was it tokenised with another tokenizer?"
        )
    widest = max((layer.d_ff for layer in configs if layer is not None), default=0)
    if calibration.size < 2 * widest:
        raise ValueError(
            f"{calibration.size} calibration tokens are too few to fit {widest} hidden units: "
            f"give at least {2 * widest}, better ten times as many"
        )
