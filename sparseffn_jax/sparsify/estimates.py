"""Estimated damages of all sizes of all layers, kept in a file: they take most of a plan's time."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.untrusted import read_json
from sparseffn_jax.measure.records import write_json
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.sparsify.planning import Grid, Size, estimate_layers


def kept_estimates(
    file: Path,
    model: Decoder,
    params: Mapping[str, Any],
    tokens: Int[np.ndarray, "n t"],
    fisher: Sequence[Float[np.ndarray, "d d"]],
    grid: Grid,
    *,
    batch_size: int = 4,
    on_layer: Callable[[int, int], None] | None = None,
) -> list[dict[Size, float]]:
    """Returns what :func:`estimate_layers` yields, and keeps it: a stopped call goes on.

    Args:
      file: JSON file; what it holds of another model, text or grid is replaced.
      model: a decoder whose layers are all dense.
      params: its parameters, in memory or loaded on demand.
      tokens: token ids (n, t) of calibration text.
      fisher: Fisher matrix of each layer's outputs.
      grid: the sizes.
      batch_size: number of windows in one forward pass; it changes the result by rounding alone.
      on_layer: function that is called with the numbers of layers done and to be done.
    """
    of = {
        "fisher": _digest(fisher),
        "tokens": _digest(tokens),
        "grid": [list(sizes) for sizes in grid],
    }
    damages = _read(file, of)
    args = model, params, tokens, fisher, grid
    for layer in estimate_layers(*args, batch_size=batch_size, first=len(damages)):
        damages.append(layer)
        rows = [[[*size, x] for size, x in layer.items()] for layer in damages]
        write_json(file, {"of": of, "damages": rows})
        if on_layer is not None:
            on_layer(len(damages), model.spec.n_layer)
    return damages


def _digest(arrays: Iterable[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _read(file: Path, of: Mapping[str, Any]) -> list[dict[Size, float]]:
    try:
        stored = read_json(file)
        if stored["of"] != of:
            return []
        return [{(width, rank): x for width, rank, x in layer} for layer in stored["damages"]]
    except (FileNotFoundError, CheckpointError, KeyError, TypeError, ValueError):
        # Nothing is lost but the time to estimate again.
        return []
