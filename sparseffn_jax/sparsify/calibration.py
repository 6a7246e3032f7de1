"""Calibration text, and the inputs that each layer's FFN receives on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.decoder import Decoder, layers_of

Params = Mapping[str, Any]


def collect_ffn_inputs(
    model: Decoder,
    params: Params,
    tokens: Int[np.ndarray, "n t"],
    batch_size: int,
) -> list[Float[np.ndarray, "nt d"]]:
    """Returns the inputs that each layer's FFN receives on a text.

    Args:
      model: the decoder.
      params: parameters of the decoder.
      tokens: token ids (n, t).
      batch_size: number of rows of ``tokens`` in one forward pass.

    Returns:
      For each layer a float32 array (n * t, d_model) in host memory.
    """

    @jax.jit
    def forward(params: Params, tokens: Array) -> list[Array]:
        out: Any = model.apply({"params": params}, tokens, mutable=["intermediates"])
        return [layer["ffn_input"][0] for layer in layers_of(model, out[1]["intermediates"])]

    parts = [[] for _ in range(model.spec.n_layer)]
    for start in range(0, len(tokens), batch_size):
        for part, x in zip(parts, forward(params, tokens[start : start + batch_size]), strict=True):
            part.append(np.asarray(x, np.float32).reshape(-1, x.shape[-1]))
    return [np.concatenate(part) for part in parts]


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
    if calibration.max() >= model.config.vocab_size:
        raise ValueError(
            f"calibration holds token id {calibration.max()}, but the model has vocab_size="
            f"{model.config.vocab_size}: was it tokenised with another tokenizer?"
        )
    widest = max((layer.d_ff for layer in configs if layer is not None), default=0)
    if calibration.size < 2 * widest:
        raise ValueError(
            f"{calibration.size} calibration tokens are too few to fit {widest} hidden units: "
            f"give at least {2 * widest}, better ten times as many"
        )
