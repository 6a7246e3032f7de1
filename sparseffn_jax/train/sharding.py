"""How parameters are laid out on a mesh of devices, by rules that go by a parameter's path.

The rules are :func:`sparseffn_jax.models.paths.sharding_rules`: each family has its own, beside
those of SparseFFNs and LoRA adapters.

The mesh has three axes. ``data`` holds replicas; ``fsdp`` holds replicas of the computation that
share one copy of the weights (ZeRO, Rajbhandari et al. 2019, 1910.02054); ``tensor`` splits the
computation of a layer itself (Megatron-LM, Shoeybi et al. 2019, 1909.08053): the hidden units of
an FFN and the heads of attention are dealt out, so that a layer needs one sum over the axis, at
its output. Batches are split over ``data`` and ``fsdp``.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparseffn_jax.models.paths import sharding_rules
from sparseffn_jax.nn.paths import Axes

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))
_LARGE = 2**20


@dataclasses.dataclass(frozen=True)
class Replicated:
    """A leaf that every device holds whole.

    Attributes:
      path: the leaf's path, joined by slashes.
      shape: the leaf's shape.
      bytes: how many bytes it takes on each device.
    """

    path: str
    shape: tuple[int, ...]
    bytes: int


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the sizes of a mesh's axes.

    Args:
      text: sizes such as ``"data=2,fsdp=2,tensor=2"``; an axis that is left out has size 1.

    Returns:
      The size of each of the axes ``data``, ``fsdp`` and ``tensor``.

    Raises:
      ValueError: if ``text`` has another form, names another axis or names one twice.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    given = set()
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if name not in AXES or name in given or not equals or not re.fullmatch("[1-9][0-9]*", size):
            raise ValueError(
                f"mesh {text!r} has {part.strip()!r}: expected a size of each axis at most once, "
                f"such as {','.join(f'{axis}=2' for axis in AXES)}"
            )
        given.add(name)
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of ``devices``, by default of all that there are.

    Raises:
      ValueError: if the product of ``sizes`` is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(sizes[axis] for axis in AXES)
    if math.prod(shape) != len(devices):
        given = ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(
            f"mesh {given} takes {math.prod(shape)} devices, but there are {len(devices)}: the "
            "product of its sizes must be their number"
        )
    automatic = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=automatic)


def leaf_sharding(mesh: Mesh, path: Any, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding that the rules give a leaf.

    An axis that does not divide its dimension goes to the largest other dimension that it divides,
    if there is one. A leaf that no rule names is whole on every device.

    Args:
      mesh: a mesh with the axes ``data``, ``fsdp`` and ``tensor``.
      path: the leaf's key path in a tree of parameters, or in an optimizer's state that holds such
        trees.
      shape: the leaf's shape.
    """
    name = path_name(path)
    for pattern, axes in sharding_rules():
        if len(axes) == len(shape) and re.search(rf"(^|/){pattern}$", name):
            return NamedSharding(mesh, _fit(mesh, axes, shape))
    return NamedSharding(mesh, PartitionSpec())


def shardings(mesh: Mesh, tree: Any, *, gathered: bool = False) -> Any:
    """Returns the sharding of every leaf.

    Args:
      mesh: a mesh with the axes ``data``, ``fsdp`` and ``tensor``.
      tree: arrays, or their shapes.
      gathered: whether to give the shardings in which a layer's computation takes its weights,
        which are those of the rules without ``fsdp``.

    Returns:
      A tree like ``tree``.
    """

    def of_leaf(path, leaf):
        stored = leaf_sharding(mesh, path, leaf.shape)
        return _without_fsdp(stored) if gathered else stored

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def replicated_leaves(tree: Any, larger_than: int = _LARGE) -> list[Replicated]:
    """Returns the arrays of more than ``larger_than`` bytes that every device holds whole."""
    return [
        Replicated(path_name(path), leaf.shape, leaf.nbytes)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.nbytes > larger_than and leaf.sharding.is_fully_replicated
    ]


def is_in_block(path: Any) -> bool:
    """Returns whether a leaf belongs to a block: those alone are named by numbers."""
    return any(name.isdigit() for name in path_name(path).split("/"))


def path_name(path: Any) -> str:
    """Joins the dictionary keys in a key path by slashes and leaves all other entries out."""
    return "/".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
    kept = []
    for axes in sharding.spec:
        # JAX unpacks a tuple of one axis.
        named = (axes,) if isinstance(axes, str) else axes or ()
        kept.append(tuple(axis for axis in named if axis != "fsdp") or None)
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _fit(mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    dimensions: list[list[str]] = [[] for _ in shape]

    def takes(i: int, axis: str) -> bool:
        parts = math.prod(mesh.shape[other] for other in (*dimensions[i], axis))
        return shape[i] % parts == 0

    for i, axis in enumerate(axes):
        if axis is None or mesh.shape[axis] == 1:
            continue
        others = sorted((j for j in range(len(shape)) if j != i), key=lambda j: -shape[j])
        place = next((j for j in (i, *others) if takes(j, axis)), None)
        if place is not None:
            dimensions[place].append(axis)
    return PartitionSpec(*(tuple(names) if names else None for names in dimensions))
