"""Block-sparse linear maps with a static mask: only the blocks that live are multiplied.

:func:`choose` picks a plan, :func:`pack` brings stored weights into the form that the plan
multiplies by, and :func:`apply` runs a hidden layer between two such maps.
:func:`block_sparse_matmul` runs one map alone. :mod:`sparseffn_jax.ops.masks` describes how
weights are stored.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from sparseffn_jax.ops.block_products import PLANS, Pieces, cut, join
from sparseffn_jax.ops.hidden import (
    Activate,
    Channels,
    HiddenMaps,
    HiddenPlan,
    MapPlan,
    Packed,
    by_platform,
    over_tokens,
)
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.ops.plans import costs
from sparseffn_jax.ops.plans.choice import pick
from sparseffn_jax.ops.plans.costs import Platform

# The plan of a map without a mask.
_PLAIN = "plain"


def hidden_layer(
    x: Float[Array, "*batch i"],
    weights: HiddenMaps,
    masks: HiddenMaps,
    activate: Activate,
    channels: Channels,
    *,
    implementation: str | None = None,
    packed: Packed | None = None,
) -> Float[Array, "*batch o"]:
    """Runs a hidden layer between block-sparse maps, with a plan for each platform.

    Args:
      x: inputs (..., d_in).
      weights: the stored kernel of each map, in the dtype of ``x``.
      masks: the :class:`BlockMask` of each map; ``None`` stands for a dense map.
      activate: the elementwise function that is applied to the hidden units.
      channels: biases of ``activate``.
      implementation: name of the plan to run, or ``None``; :func:`block_sparse_matmul` lists the
        names.
      packed: kernels that :func:`pack` returned earlier, by the layout of their plan. A plan whose
        layout is missing has its kernels packed by this call.

    Returns:
      The outputs (..., d_out), in the dtype of ``x``.

    Raises:
      ValueError: if shapes do not fit the masks, or the forced plan cannot run with one of them.
    """

    def run(plan: HiddenPlan, x: Array, weights: HiddenMaps, channels: Channels) -> Array:
        ready = (packed or {}).get(plan.layout)
        return apply(x, ready or pack(weights, plan, masks), plan, masks, activate, channels)

    return by_platform(
        lambda platform: choose(math.prod(x.shape[:-1]), weights, masks, platform, implementation),
        run,
        *(x, weights, channels),
    )


def choose(
    tokens: int,
    weights: HiddenMaps,
    masks: HiddenMaps,
    platform: Platform,
    implementation: str | None = None,
) -> HiddenPlan:
    """Picks the plans for a hidden layer between block-sparse maps.

    Args:
      tokens: number of rows of the input.
      weights: the stored kernel of each map, or arrays of the same shapes and dtype.
      masks: the :class:`BlockMask` of each map; ``None`` stands for a dense map.
      platform: the platform that the program is compiled for.
      implementation: name of the plan to force, or ``None`` to take the cheapest;
        :func:`block_sparse_matmul` lists the names.

    Returns:
      The plan of each map, with the tile of tokens that suits the platform.

    Raises:
      ValueError: if a kernel does not fit its mask, or the forced plan cannot run with one of the
        masks.
    """

    def plan(kernel: Array, mask: BlockMask | None) -> str:
        return _PLAIN if mask is None else _pick(tokens, kernel, mask, platform, implementation)

    up = tuple(plan(kernel, mask) for kernel, mask in zip(weights.up, masks.up, strict=True))
    down = plan(weights.down, masks.down)
    width = weights.down.shape[0] if masks.down is None else masks.down.shape[0]
    token_bytes = width * weights.down.dtype.itemsize
    return HiddenPlan(up, down, _tile(tokens, token_bytes, platform, (*up, down)))


def pack(weights: HiddenMaps, plan: HiddenPlan, masks: HiddenMaps) -> HiddenMaps:
    """Returns the arrays that each map multiplies by under a plan, in the dtype of its kernel.

    Args:
      weights: the stored kernel of each map.
      plan: a plan that :func:`choose` picked.
      masks: the :class:`BlockMask` of each map; ``None`` stands for a dense map.
    """
    maps = zip(weights.up, plan.up, masks.up, strict=True)
    return HiddenMaps(
        tuple(pack_map(*each) for each in maps),
        pack_map(weights.down, plan.down, masks.down),
    )


def apply(
    x: Float[Array, "*batch i"],
    packed: HiddenMaps,
    plan: HiddenPlan,
    masks: HiddenMaps,
    activate: Activate,
    channels: Channels,
) -> Float[Array, "*batch o"]:
    """Applies block-sparse maps, an elementwise function and another block-sparse map.

    Where both maps run as several GEMMs, the first map hands its hidden units to the second one in
    blocks, without joining them. They are computed in tiles of tokens which the backward pass
    recomputes, so that nothing as wide as the hidden layer is kept.

    Args:
      x: inputs (..., d_in).
      packed: weights that :func:`pack` returned for ``plan``.
      plan: a plan that :func:`choose` picked.
      masks: the :class:`BlockMask` of each map; ``None`` stands for a dense map.
      activate: the elementwise function that is applied to the hidden units.
      channels: biases of ``activate``.

    Returns:
      The outputs (..., d_out), in the dtype of ``x``.

    Raises:
      ValueError: if the number of channels of ``x`` is not the one that the masks cover.
    """
    for mask in masks.up:
        _check_channels(x, mask)
    width = packed.down.shape[0] if masks.down is None else masks.down.shape[0]

    def rows(x: Array) -> Array:
        maps = zip(packed.up, plan.up, masks.up, strict=True)
        us = list(zip(*(_products([x], *each) for each in maps), strict=True))
        side = width // len(us)
        parts = [
            jax.tree.map(lambda leaf, start=start: leaf[..., start : start + side], channels)
            for start in range(0, width, side)
        ]
        hidden = [activate(u, part) for u, part in zip(us, parts, strict=True)]
        return join(_products(hidden, packed.down, plan.down, masks.down))

    if any(map(_is_unrolled, (*plan.up, plan.down))):
        y = over_tokens(rows, x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), plan.tile)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    return rows(x)


def block_sparse_matmul(
    x: Float[Array, "*batch i"],
    kernel: Float[Array, "..."],
    mask: BlockMask,
    *,
    implementation: str | None = None,
    packed: Packed | None = None,
) -> Float[Array, "*batch o"]:
    """Multiplies ``x`` by the block-sparse matrix that ``kernel`` and ``mask`` describe.

    The plans are:

    - ``"slice"``, for structured masks, runs one smaller GEMM;
    - ``"rows"``, for unstructured masks, runs one GEMM for every input block and sums the products
      that meet in an output block;
    - ``"columns"``, for unstructured masks, runs one GEMM for every output block, whose input
      blocks are laid side by side;
    - ``"gather"``, for unstructured masks, batches the GEMMs of all output blocks that have equally
      many input blocks;
    - ``"masked"`` runs one dense GEMM; it is the reference, and the best plan near density 1.

    ``"rows"`` and ``"columns"`` take the tokens tile by tile.

    Args:
      x: inputs ``(..., mask.shape[0])``.
      kernel: the living weights, of shape ``mask.kernel_shape``.
      mask: the blocks that live; static.
      implementation: name of the plan to force, or ``None`` to take the cheapest.
      packed: kernels that :func:`pack_map` returned earlier, by the layout of their plan. If the
        layout of the plan is missing, this call packs the kernel.

    Returns:
      The outputs ``(..., mask.shape[1])``, in the dtype of ``x``, accumulated in float32.

    Raises:
      ValueError: if the shapes do not fit, or the forced plan cannot run with this mask.
    """
    tokens = math.prod(x.shape[:-1])

    def run(plan: MapPlan, x: Array, kernel: Array) -> Array:
        ready = (packed or {}).get(plan.layout)
        return multiply(
            x, pack_map(kernel, plan.name, mask) if ready is None else ready, plan, mask
        )

    return by_platform(
        lambda platform: choose_map(tokens, kernel, mask, platform, implementation),
        run,
        *(x, kernel),
    )


def choose_map(
    tokens: int,
    kernel: Float[Array, "..."],
    mask: BlockMask,
    platform: Platform,
    implementation: str | None = None,
) -> MapPlan:
    """Picks the plan of one map.

    Args:
      tokens: number of rows of the input.
      kernel: the stored kernel, or an array of its shape and dtype.
      mask: the blocks that live.
      platform: the platform that the program is compiled for.
      implementation: name of the plan to force, or ``None`` to take the cheapest.

    Raises:
      ValueError: if the kernel does not fit the mask, or the forced plan cannot run with it.
    """
    plan = _pick(tokens, kernel, mask, platform, implementation)
    return MapPlan(plan, _tile(tokens, mask.shape[1] * kernel.dtype.itemsize, platform, (plan,)))


def pack_map(kernel: Float[Array, "..."], plan: str, mask: BlockMask | None) -> Any:
    """Returns the arrays that one map multiplies by under a plan, in the dtype of its kernel.

    Args:
      kernel: the stored kernel.
      plan: name of the plan.
      mask: the blocks that live; ``None`` stands for a dense map.
    """
    return kernel if mask is None else PLANS[plan].pack(kernel, mask)


def multiply(
    x: Float[Array, "*batch i"], packed: Any, plan: MapPlan, mask: BlockMask
) -> Float[Array, "*batch o"]:
    """Applies one map, with weights that were packed for its plan.

    Args:
      x: inputs ``(..., mask.shape[0])``.
      packed: arrays that :func:`pack_map` returned for the same plan.
      plan: a plan that :func:`choose_map` picked.
      mask: the blocks that live.

    Returns:
      The outputs ``(..., mask.shape[1])``, in the dtype of ``x``.

    Raises:
      ValueError: if the number of channels of ``x`` is not the one that the mask covers.
    """
    _check_channels(x, mask)

    def rows(x: Array) -> Array:
        return join(_products([x], packed, plan.name, mask))

    if not _is_unrolled(plan.name):
        return rows(x)
    y = over_tokens(rows, x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), plan.tile)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _pick(
    tokens: int,
    kernel: Array,
    mask: BlockMask,
    platform: Platform,
    implementation: str | None,
) -> str:
    if kernel.shape != mask.kernel_shape:
        raise ValueError(f"kernel has shape {kernel.shape}, the mask needs {mask.kernel_shape}")
    live = (len(mask.live_rows), len(mask.live_columns))
    estimates = costs.block_sparse_costs(
        tokens, mask.shape, mask.block_shape, mask.size, live, platform
    )
    refused = {}
    if mask.is_structured:
        for plan in ("rows", "columns", "gather"):
            refused[plan] = "the mask is whole rows and columns, which 'slice' does in one GEMM"
    else:
        refused["slice"] = "the mask is not made of whole block rows and columns"
        if kernel.dtype.itemsize < 4:
            refused["rows"] = f"{kernel.dtype.name} would round the products before they are summed"
    for plan in refused:
        estimates.pop(plan)
    problem = (
        *(tokens, *mask.shape, *mask.block_shape),
        *(mask.size, mask.is_structured, kernel.dtype.name),
    )
    return pick("block_sparse_matmul", implementation, estimates, refused, problem, platform)


def _tile(tokens: int, token_bytes: int, platform: Platform, plans: Sequence[str]) -> int | None:
    """Returns how many tokens to take at a time; all of them if no plan runs many small GEMMs."""
    if not any(map(_is_unrolled, plans)):
        return None
    return costs.token_tile("block_sparse", tokens, token_bytes, platform)


def _is_unrolled(plan: str) -> bool:
    return plan != _PLAIN and PLANS[plan].is_unrolled


def _products(xs: Pieces, packed: Any, plan: str, mask: BlockMask | None) -> Pieces:
    if mask is None:
        return [join(xs) @ packed]
    how = PLANS[plan]
    if how.is_unrolled:
        return how.apply(mask, cut(xs, mask), packed)
    return [how.apply(mask, join(xs), packed)]


def _check_channels(x: Array, mask: BlockMask | None) -> None:
    if mask is not None and x.shape[-1] != mask.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} channels, but the mask covers {mask.shape[0]}")
