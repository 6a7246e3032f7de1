"""Turns weights into what PyTorch's models hold, by name and layout, and takes apart what is fused.

Most names and layouts are matched one by one, by a family's :class:`NameMap`. Here is what is
between several of our weights and one of PyTorch's.
"""

import functools
from typing import Any

import jax
import numpy as np

from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.weights import Tensor, Weights
from sparseffn_jax.models.names import Fusion, NameMap, fill, generalise


def split_fused(weights: Weights, names: NameMap, config: Any) -> Weights:
    """Returns a checkpoint's weights with those that are several in one as single ones.

    Args:
      weights: the weights, by the checkpoint's names.
      names: the names of the model's family.
      config: the model's config.

    Raises:
      CheckpointError: if a fused weight has another number of rows than the config says.
    """
    fusions = {fusion.name: fusion for fusion in names.fusions}
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        whole = name if name.startswith(names.prefix) else names.prefix + name
        pattern, numbers = generalise(whole)
        if (fusion := fusions.get(pattern)) is None:
            tensors[name] = tensor
        else:
            parts = (fill(part, numbers) for part in fusion.parts)
            tensors |= zip(parts, split_rows(name, tensor, fusion.rows(config)), strict=True)
    return Weights(weights.where, tensors)


def split_rows(name: str, tensor: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
    """Returns a matrix in parts of so many rows.

    Raises:
      CheckpointError: if it has another number of rows.
    """
    if len(tensor.shape) != 2 or tensor.shape[0] != sum(rows):
        raise CheckpointError(
            f"{tensor.where} holds {name} with shape {str(tensor.shape)[:100]}, but the config "
            f"makes it {' + '.join(map(str, rows))} rows: they belong to different models"
        )
    ends = np.cumsum(rows)

    def read(start: int, end: int) -> np.ndarray | jax.Array:
        # A copy, so that the whole is let go.
        return tensor.read()[start:end].copy()

    return [
        Tensor(
            tensor.where,
            (count, tensor.shape[1]),
            tensor.dtype,
            functools.partial(read, int(end) - count, int(end)),
        )
        for count, end in zip(rows, ends, strict=True)
    ]


def to_pytorch(weights: Weights, names: NameMap) -> dict[str, Tensor]:
    """Returns a model's weights under PyTorch's names and in its layouts.

    Args:
      weights: the weights by their paths in the parameter tree.
      names: the names of the model's family.
    """
    stored = {}
    for path, tensor in weights.tensors.items():
        name, transposed = names.to_name(path)
        stored[name] = _transpose(tensor) if transposed else tensor
    for fusion in names.fusions:
        _fuse(stored, fusion)
    return stored


def _transpose(tensor: Tensor) -> Tensor:
    def read() -> np.ndarray:
        return np.asarray(tensor.read()).T

    return Tensor(tensor.where, tensor.shape[::-1], tensor.dtype, read)


def _fuse(stored: dict[str, Tensor], fusion: Fusion) -> None:
    """Puts the parts of a fusion together in all layers that have them."""
    for name in list(stored):
        pattern, numbers = generalise(name)
        if pattern != fusion.parts[0]:
            continue
        parts = [stored.pop(fill(part, numbers)) for part in fusion.parts]
        rows = sum(part.shape[0] for part in parts)
        stored[fill(fusion.name, numbers)] = Tensor(
            parts[0].where,
            (rows, parts[0].shape[1]),
            parts[0].dtype,
            lambda parts=parts: np.concatenate([np.asarray(part.read()) for part in parts]),
        )
