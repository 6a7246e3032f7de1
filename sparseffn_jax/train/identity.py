"""What a run is of, beside its settings and its text: its model, what it starts from, its teacher.

All of it is short, as a checkpoint keeps it, so that a run does not go on as another.
"""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseffn_jax.checkpoints.configs import config_json
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.train import processes
from sparseffn_jax.train.sharding import path_name

# Most elements of one leaf that a fingerprint reads.
_SAMPLED = 1024


def identify(model: Any, params: Any, teacher: tuple[Any, Any] | None) -> dict[str, str]:
    """Returns what a resumed run must have in common with the run that it goes on from.

    How the model computes that may change, on which devices and with or without remat, is not in
    it.

    Args:
      model: the model, whose ``dtype`` is that of the computation.
      params: the parameters that the run starts from, without adapters.
      teacher: the model and parameters that it distils from, if it does.

    Returns:
      The dtype's name; and SHA-256 in hexadecimal of the model, its parameters and the teacher.
    """
    same = {"model": _hash(_describe(model)), "dtype": _precision(model)}
    same["parameters"] = fingerprint(params)
    if teacher is not None:
        theirs, their_params = teacher
        parts = _describe(theirs), _precision(theirs), fingerprint(their_params)
        same["teacher"] = _hash(" ".join(parts))
    return same


def fingerprint(params: Any) -> str:
    """Returns a SHA-256 over each leaf's path, shape, dtype and some of its elements.

    The elements, at most 1024 of a leaf, lie on a grid over all of it; no leaf is copied as a
    whole. Where the leaves lie does not matter.
    """
    text = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        text.update(f"{path_name(path)} {leaf.shape} {leaf.dtype.name}\n".encode())
        text.update(_sample(leaf).tobytes())
    return text.hexdigest()


def _sample(leaf: Any) -> np.ndarray:
    along = math.floor(_SAMPLED ** (1 / max(leaf.ndim, 1)))
    strides = [max(1, math.ceil(size / along)) for size in leaf.shape]
    if not isinstance(leaf, jax.Array):
        return leaf[tuple(slice(None, None, stride) for stride in strides)]
    sample = jax.lax.slice(leaf, [0] * leaf.ndim, leaf.shape, strides)
    return np.asarray(sample if leaf.is_fully_addressable else processes.to_every_process(sample))


def _describe(model: Any) -> str:
    if not isinstance(model, Decoder):
        return type(model).__name__
    # An FFN of the user's own says nothing of itself that is the same in the next process.
    ffns = tuple(ffn if isinstance(ffn, SparseFFNConfig) else None for ffn in model.ffns)
    values = json.loads(config_json(model.clone(ffns=ffns), ()))
    for name in ("transformers_version", "_name_or_path"):
        values.pop(name, None)
    return json.dumps(values, sort_keys=True)


def _precision(model: Any) -> str:
    dtype = getattr(model, "dtype", None)
    return "unknown" if dtype is None else jnp.dtype(dtype).name


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
