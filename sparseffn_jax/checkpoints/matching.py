"""Checks stored tensors' names, shapes and dtypes against a model's parameter tree."""

import dataclasses
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from sparseffn_jax.checkpoints.errors import CheckpointError, one_line, some
from sparseffn_jax.checkpoints.weights import DTYPES, Tensor, Weights
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.models.names import NameMap

_LONGEST_SHAPE = 100


@dataclasses.dataclass(frozen=True)
class Match:
    """Where stored tensors belong in a model's parameter tree.

    Attributes:
      leaves: the shape of each of the model's parameters, by path joined by dots.
      places: for each stored tensor, by name, its path, and whether it is stored transposed. A
        path that is not in ``leaves`` is that of a tensor to pass over.
    """

    leaves: Mapping[str, tuple[int, ...]]
    places: Mapping[str, tuple[str, bool]]


def match(weights: Weights, model: Decoder, where: str, *, are_leaves: bool = False) -> Match:
    """Finds the place of every tensor.

    Args:
      weights: the tensors.
      model: the model that they should belong to.
      where: what names the model's config in an error.
      are_leaves: whether the names are paths already, instead of a checkpoint's names.

    Raises:
      CheckpointError: if the config cannot be honoured, if a tensor is missing, there twice or not
        the model's, or if one has another shape or is not a floating-point array.
    """
    leaves = expected_leaves(model, where)
    names = model.names
    places = {
        name: (name, False) if are_leaves else names.to_path(name) for name in weights.tensors
    }
    _check_names(weights.where, places, leaves, names)
    for name, tensor in weights.tensors.items():
        path, transposed = places[name]
        if path in leaves:
            check_leaf(name, tensor, leaves[path][::-1] if transposed else leaves[path])
    return Match(leaves, places)


def expected_leaves(model: Decoder, where: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of a model's parameters, by path joined by dots.

    Raises:
      CheckpointError: if the model's config, which ``where`` names, cannot be honoured.
    """
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    try:
        shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    # JAX has several errors for sizes beyond its own.
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {one_line(error)}") from error
    leaves = flatten_dict(shapes["params"], sep=".")
    leaves = typing.cast(dict[str, jax.ShapeDtypeStruct], leaves)
    return {path: leaf.shape for path, leaf in leaves.items()}


def _check_names(
    where: str,
    places: Mapping[str, tuple[str, bool]],
    leaves: Mapping[str, tuple[int, ...]],
    names: NameMap,
) -> None:
    found = {path: name for name, (path, _) in places.items()}
    if twice := [name for name, (path, _) in places.items() if found[path] != name]:
        raise CheckpointError(f"{where} holds twice, under two names: {some(twice)}")
    if missing := [path for path in leaves if path not in found]:
        both = [(path, names.to_name(path)[0]) for path in missing]
        known = [path if path == name else f"{path} ({name} in PyTorch)" for path, name in both]
        raise CheckpointError(
            f"{where} lacks {len(missing)} of the model's {len(leaves)} weights: {some(known)}. "
            "It is incomplete, or of another model than the config says"
        )
    if extra := [
        name for path, name in found.items() if path not in leaves and not names.is_optional(path)
    ]:
        raise CheckpointError(
            f"{where} holds {len(extra)} weights that the model has no place for: {some(extra)}. "
            "It is of another model than the config says"
        )


def check_leaf(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Checks that a tensor has this shape, as stored, and a dtype that parameters can have.

    Raises:
      CheckpointError: if it has not.
    """
    if tensor.shape != shape:
        # A damaged file can name thousands of sides.
        raise CheckpointError(
            f"{tensor.where} holds {name} with shape {str(tensor.shape)[:_LONGEST_SHAPE]}, but the "
            f"config makes it {shape}: they belong to different models"
        )
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{tensor.where} holds {name} as {tensor.dtype}: quantised checkpoints are not "
            f"read; take one in {', '.join(DTYPES)}"
        )
