"""Kernels that XLA's partitioner cannot look into, divided among the devices of a mesh.

The partitioner would have every device run such a kernel on all of its operands. A rule in the
form of an einsum says what the kernel does with the axes of its operands: those that it may divide
are dealt out as the operands lie, and where one of them is summed over, the devices' sums are added
up (Shardy's sharding rules, https://openxla.org/shardy/sharding_representation).
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from sparseffn_jax.ops.plans.kernels import devices, parts


def divided(
    kernel: Callable[..., Sequence[Array]],
    rule: str,
    may_divide: Collection[str],
    *operands: Array,
) -> Sequence[Array]:
    """Runs a kernel, which several devices share if the program is for several.

    Args:
      kernel: function of arrays that returns a sequence of arrays. It sees the part of its operands
        that a device has, so that sides of axes that it ``may_divide`` may be smaller there.
      rule: names of the axes of all operands and results, such as ``"t r, r u -> t u"``. Results
        are sums over axes that they lack.
      may_divide: names of the axes that may be divided; of the others each device gets all.
      *operands: arrays.

    Returns:
      What ``kernel`` returns.
    """
    if devices() == 1:
        return kernel(*operands)
    inputs, outputs = (
        [each.split() for each in side.split(",")] for side in rule.split("->", maxsplit=1)
    )
    # The program is compiled, and with it the parts, after the block that asks for them.
    asked = parts()

    def partition(mesh: Any, given: Sequence[Any], _: Any) -> Any:
        of_axis: dict[str, tuple[str, ...]] = {}
        for axes, array in zip(inputs, given, strict=True):
            for axis, names in zip(axes, array.sharding.spec, strict=False):
                if axis in may_divide and names is not None and axis not in of_axis:
                    taken = {name for other in of_axis.values() for name in other}
                    named = (names,) if isinstance(names, str) else names
                    of_axis[axis] = tuple(name for name in named if name not in taken)

        def sharding(axes: Sequence[str]) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(of_axis.get(axis) or None for axis in axes)))

        def on_one(*operands: Array) -> Sequence[Array]:
            return [
                jax.lax.psum(result, summed) if (summed := _missing(of_axis, axes)) else result
                for result, axes in zip(kernel(*operands), outputs, strict=True)
            ]

        shardings = tuple(map(sharding, inputs))
        if asked is not None:
            local = [
                jax.ShapeDtypeStruct(each.shard_shape(array.shape), array.dtype)
                for each, array in zip(shardings, given, strict=True)
            ]
            asked.append(jax.make_jaxpr(kernel)(*local))
        return mesh, on_one, [sharding(axes) for axes in outputs], shardings

    # A mapped program runs the kernel as it is: JAX cannot map over what it divides.
    @custom_vmap
    def run(*operands: Array) -> list[Array]:
        operation = custom_partitioning(lambda *operands: list(kernel(*operands)))
        operation.def_partition(partition, sharding_rule=rule)
        return operation(*operands)

    @run.def_vmap
    def _(_: int, is_mapped: Sequence[bool], *operands: Array) -> Any:
        axes = [0 if mapped else None for mapped in is_mapped]
        results = jax.vmap(lambda *operands: list(kernel(*operands)), axes)(*operands)
        return results, [True] * len(results)

    return run(*operands)


def _missing(of_axis: dict[str, tuple[str, ...]], axes: Sequence[str]) -> tuple[str, ...]:
    """Returns the mesh's axes that divide what a result lacks."""
    return tuple(name for axis, names in of_axis.items() if axis not in axes for name in names)
