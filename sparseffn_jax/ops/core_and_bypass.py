"""A dense core beside a low-rank bypass of the same inputs, whose outputs add up.

Both read x, and both write outputs that are added. Joined, they are two products instead of five:
one by all maps of x side by side, one of hidden units and components side by side by all maps out
of them. Neither the inputs nor the sum then goes to memory more often than in a dense FFN. To put
the weights side by side costs a copy of them, which a call of few tokens saves only if
:func:`pack` has made it. On a CPU hidden units are copied too, to stand beside the components.

:func:`choose` picks a plan, :func:`pack` brings weights into the form that the plan multiplies by,
and :func:`apply` runs the layer.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseffn_jax.ops import low_rank
from sparseffn_jax.ops.hidden import Activate, Channels, HiddenMaps, MapPlan, Packed, by_platform
from sparseffn_jax.ops.plans import costs
from sparseffn_jax.ops.plans.choice import pick
from sparseffn_jax.ops.plans.costs import Platform

_JOINED = "joined"


class Weights(NamedTuple):
    """The weights of both, apart.

    Attributes:
      core: the kernel (d_in, width) of each map into the hidden units, and the kernel (width,
        d_out) out of them.
      bypass: the factors of the bypass or, once they are packed for a plan, the matrices that it
        multiplies by in turn.
    """

    core: HiddenMaps
    bypass: Any


class Joined(NamedTuple):
    """Weights side by side.

    Attributes:
      first: kernels into the hidden units, and the bypass's axes: (d_in, maps * width + rank).
      second: the kernel out of the hidden units above the bypass's filter: (width + rank, d_out).
    """

    first: Float[Array, "i s"]
    second: Float[Array, "m o"]


def layer(
    x: Float[Array, "*batch i"],
    weights: Weights,
    activate: Activate,
    channels: Channels,
    *,
    implementation: str | None = None,
    packed: Packed | None = None,
) -> Float[Array, "*batch o"]:
    """Runs a core beside a bypass, with a plan for each platform.

    Args:
      x: inputs (..., d_in).
      weights: the weights, in the dtype of ``x``.
      activate: the elementwise function that is applied to the hidden units.
      channels: biases and coefficients of ``activate``.
      implementation: name of the plan to run, or ``None``; :func:`choose` lists the names.
      packed: weights that :func:`pack` returned earlier, by the layout of their plan. They are used
        if theirs is the cheapest plan where weights are packed already; otherwise this call packs
        its own.

    Returns:
      The outputs (..., d_out), in the dtype of ``x``, accumulated in float32.

    Raises:
      ValueError: if there is no such plan.
    """
    packed, tokens = packed or {}, math.prod(x.shape[:-1])

    def plan_for(platform: Platform) -> MapPlan:
        if packed:
            plan = choose(tokens, weights, platform, implementation, is_packed=True)
            if plan.layout in packed:
                return plan
        return choose(tokens, weights, platform, implementation)

    def run(plan: MapPlan, x: Array, weights: Weights, channels: Channels) -> Array:
        ready = packed.get(plan.layout)
        matrices = pack(weights, plan) if ready is None else ready
        return apply(x, matrices, weights.bypass.axes.shape[1], activate, channels)

    return by_platform(plan_for, run, *(x, weights, channels))


def choose(
    tokens: int,
    weights: Weights,
    platform: Platform,
    implementation: str | None = None,
    *,
    is_packed: bool = False,
) -> MapPlan:
    """Picks the plan.

    Args:
      tokens: number of rows of the input.
      weights: the weights, or arrays of the same shapes and dtype.
      platform: the platform that the program is compiled for.
      implementation: name of the plan to force: ``"joined"`` multiplies by both parts' weights side
        by side, ``"two_gemms"`` and ``"merged"`` run the bypass by itself, by one factor after the
        other or by their product. ``None`` takes the cheapest.
      is_packed: whether the weights are packed before the call, which need not pay for it.

    Raises:
      ValueError: if there is no such plan.
    """
    (d_in, rank), d_out = weights.bypass.axes.shape, weights.bypass.filter.shape[1]
    width, maps = len(weights.core.down), len(weights.core.up)
    dtype = weights.bypass.axes.dtype.name
    problem = (tokens, d_in, maps, width, rank, d_out, dtype, is_packed)
    estimates = costs.core_and_bypass_costs(
        *(tokens, d_in, maps, width, rank, d_out), is_packed=is_packed, platform=platform
    )
    return MapPlan(pick("core_and_bypass", implementation, estimates, None, problem, platform))


def pack(weights: Weights, plan: MapPlan) -> Weights | Joined:
    """Returns the matrices that ``plan`` multiplies by.

    Args:
      weights: the weights.
      plan: a plan that :func:`choose` picked.
    """
    (up, down), (axes, filter) = weights
    if plan.name == _JOINED:
        return Joined(jnp.concatenate([*up, axes], axis=1), jnp.concatenate([down, filter]))
    return Weights(weights.core, low_rank.pack_map(weights.bypass, plan.name))


def apply(
    x: Float[Array, "*batch i"],
    packed: Weights | Joined,
    rank: int,
    activate: Activate,
    channels: Channels,
) -> Float[Array, "*batch o"]:
    """Applies a core and a bypass, and adds their outputs.

    Args:
      x: inputs (..., d_in).
      packed: weights that :func:`pack` returned.
      rank: number of components of the bypass.
      activate: the elementwise function that is applied to the hidden units.
      channels: biases and coefficients of ``activate``.

    Returns:
      The outputs (..., d_out), in the dtype of ``x``, accumulated in float32.
    """
    if isinstance(packed, Joined):
        return _joined(x, packed, rank, activate, channels)
    (up, down), bypass = packed
    with jax.named_scope("spectral_bypass"):
        y = low_rank.multiply(x, bypass)
    with jax.named_scope("core"):
        return y + activate([x @ kernel for kernel in up], channels) @ down


def _joined(x: Array, packed: Joined, rank: int, activate: Activate, channels: Channels) -> Array:
    width, columns = len(packed.second) - rank, packed.first.shape[1] - rank
    with jax.named_scope("core_and_bypass"):
        first = x @ packed.first
        if x.size == x.shape[-1]:
            # XLA computes a product with one token within what joins its parts, one thread for each
            # of its columns: 24 of the 35 us that a narrow layer took an H200.
            first = jax.lax.optimization_barrier(first)
        *us, components = jnp.split(first, list(range(width, columns + 1, width)), axis=-1)
        hidden = activate(us, channels)
        return jnp.concatenate([hidden, components], axis=-1) @ packed.second
