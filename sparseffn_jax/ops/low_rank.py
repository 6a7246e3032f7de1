"""Low-rank linear maps ``(x axes) filter``, which keep few axes of the activations.

With axes from the second moments of the activations this is the Karhunen-Loeve transform: a
spectral map whose transform is learned from data, where Fourier's is fixed. It takes two plain
GEMMs.

:func:`choose` picks a plan, :func:`pack` brings weights into the form that the plan multiplies by,
and :func:`apply` runs a hidden layer between two such maps. :func:`low_rank_matmul` runs one map
alone.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseffn_jax.ops import fused_hidden
from sparseffn_jax.ops.hidden import (
    Activate,
    Channels,
    HiddenMaps,
    HiddenPlan,
    MapPlan,
    Packed,
    by_platform,
    kept,
    over_tokens,
)
from sparseffn_jax.ops.plans import costs
from sparseffn_jax.ops.plans.choice import pick
from sparseffn_jax.ops.plans.costs import Platform
from sparseffn_jax.ops.plans.kernels import devices

_FUSED = "fused"


class Factors(NamedTuple):
    """The weights of one map.

    Attributes:
      axes: (d_in, rank); the axes of the kept components, as columns.
      filter: (rank, d_out); the weight of each component in each output.
    """

    axes: Float[Array, "i r"]
    filter: Float[Array, "r o"]


def hidden_layer(
    x: Float[Array, "*batch i"],
    weights: HiddenMaps,
    activate: Activate,
    channels: Channels,
    *,
    implementation: str | None = None,
    packed: Packed | None = None,
) -> Float[Array, "*batch o"]:
    """Runs a hidden layer between low-rank maps, with a plan for each platform.

    Args:
      x: inputs (..., d_in).
      weights: the :class:`Factors` of each map, in the dtype of ``x``.
      activate: the elementwise function that is applied to the hidden units.
      channels: biases and coefficients of ``activate``.
      implementation: name of the plan to run, or ``None``; :func:`choose` lists the names.
      packed: weights that :func:`pack` returned earlier, by the layout of their plan. A plan whose
        layout is missing has its weights packed by this call.

    Returns:
      The outputs (..., d_out), in the dtype of ``x``, accumulated in float32.

    Raises:
      ValueError: if there is no such plan.
    """

    def run(plan: HiddenPlan, x: Array, weights: HiddenMaps, channels: Channels) -> Array:
        ready = (packed or {}).get(plan.layout)
        return apply(x, ready or pack(weights, plan), plan, activate, channels)

    return by_platform(
        lambda platform: choose(
            math.prod(x.shape[:-1]), weights, activate, platform, implementation
        ),
        run,
        *(x, weights, channels),
    )


def choose(
    tokens: int,
    weights: HiddenMaps,
    activate: Activate,
    platform: Platform,
    implementation: str | None = None,
) -> HiddenPlan:
    """Picks the plans for a hidden layer between low-rank maps.

    Args:
      tokens: number of rows of the input.
      weights: the :class:`Factors` of each map, or arrays of the same shapes and dtype.
      activate: the elementwise function of the hidden units.
      platform: the platform that the program is compiled for.
      implementation: name of the plan to force: ``"two_gemms"`` multiplies by one factor after the
        other, ``"merged"`` by the product of both, ``"fused"`` runs everything as wide as the
        hidden units in one kernel of its own, which on CPU is interpreted. ``None`` takes the
        cheapest for each map, or the kernel where that is cheaper: on Hopper GPUs, in half
        precision.

    Returns:
      The plan of each map, with the tile of tokens that suits the platform.

    Raises:
      ValueError: if there is no such plan, or it cannot run here.
    """
    if _choose_layer(tokens, weights, activate, platform, implementation) == _FUSED:
        return HiddenPlan(("two_gemms",) * len(weights.up), "two_gemms", is_fused=True)
    first = tuple(
        choose_map(tokens, factors, platform, implementation).name for factors in weights.up
    )
    last = choose_map(tokens, weights.down, platform, implementation).name
    axes = weights.down.axes
    tile = costs.token_tile("low_rank", tokens, len(axes) * axes.dtype.itemsize, platform)
    return HiddenPlan(first, last, tile)


def _choose_layer(
    tokens: int,
    weights: HiddenMaps,
    activate: Activate,
    platform: Platform,
    implementation: str | None,
) -> str:
    """Picks between a plan for each map and the kernel that runs everything between them."""
    if implementation != _FUSED and (implementation is not None or platform == "cpu"):
        return "maps"
    up = [factors.axes.shape[1] for factors in weights.up]
    (width, down), d_out = weights.down.axes.shape, weights.down.filter.shape[1]
    d_in, dtype = weights.up[0].axes.shape[0], weights.down.axes.dtype
    reason = fused_hidden.refusal([*up, down], activate, dtype)
    refused = {_FUSED: reason} if reason else {}
    estimates = costs.low_rank_layer_costs(tokens, d_in, width, d_out, up, down, devices())
    function = (activate.activation, *activate.degrees)
    problem = (tokens, d_in, width, d_out, *up, down, *function, dtype.name)
    return pick("low_rank_layer", implementation, estimates, refused, problem, platform)


def pack(weights: HiddenMaps, plan: HiddenPlan) -> HiddenMaps:
    """Returns the matrices that each map multiplies by in turn, in the dtype of its factors.

    Args:
      weights: the :class:`Factors` of each map.
      plan: a plan that :func:`choose` picked.
    """
    return HiddenMaps(
        tuple(pack_map(factors, name) for factors, name in zip(weights.up, plan.up, strict=True)),
        pack_map(weights.down, plan.down),
    )


def apply(
    x: Float[Array, "*batch i"],
    packed: HiddenMaps,
    plan: HiddenPlan,
    activate: Activate,
    channels: Channels,
) -> Float[Array, "*batch o"]:
    """Applies low-rank maps, an elementwise function and another low-rank map.

    It works in tiles of tokens, or in a kernel of its own, and the backward pass computes hidden
    units again, so that nothing as wide as the hidden layer is kept.

    Args:
      x: inputs (..., d_in).
      packed: weights that :func:`pack` returned for ``plan``.
      plan: a plan that :func:`choose` picked.
      activate: the elementwise function that is applied to the hidden units.
      channels: biases and coefficients of ``activate``.

    Returns:
      The outputs (..., d_out), in the dtype of ``x``, accumulated in float32.
    """

    def fused(interpret: bool, x: Array, packed: HiddenMaps, channels: Channels) -> Array:
        with jax.named_scope("spectral_up"):
            components = [x @ axes for axes, _ in packed.up]
        axes, filter = packed.down
        z = fused_hidden.hidden_layer(
            *(components, [filter for _, filter in packed.up], axes, activate, channels),
            interpret=interpret,
        )
        with jax.named_scope("spectral_down"):
            return z @ filter

    def apart(x: Array, packed: HiddenMaps, channels: Channels) -> Array:
        return over_tokens(functools.partial(rows, packed, channels), x, plan.tile)

    def rows(packed, channels, x):
        with jax.named_scope("spectral_up"):
            us = [multiply(x, matrices) for matrices in packed.up]
        with jax.named_scope("polynomial"):
            hidden = activate(us, channels)
        with jax.named_scope("spectral_down"):
            return multiply(hidden, packed.down)

    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if plan.is_fused:
        # Other platforms have no compiler for the kernel.
        y = jax.lax.platform_dependent(
            *(flat, packed, channels),
            cpu=functools.partial(fused, True),
            cuda=functools.partial(fused, False),
            default=apart,
        )
    else:
        y = apart(flat, packed, channels)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def low_rank_matmul(
    x: Float[Array, "*batch i"],
    factors: Factors,
    *,
    implementation: str | None = None,
    packed: Packed | None = None,
) -> Float[Array, "*batch o"]:
    """Applies one low-rank map, ``(x axes) filter``, with a plan for each platform.

    Args:
      x: inputs (..., d_in).
      factors: the weights, in the dtype of ``x``.
      implementation: name of the plan to run, or ``None``; :func:`choose` lists the names.
      packed: matrices that :func:`pack_map` returned earlier, by the layout of their plan. A plan
        whose layout is missing has its matrices packed by this call.

    Returns:
      The outputs (..., d_out), in the dtype of ``x``, accumulated in float32.

    Raises:
      ValueError: if there is no such plan.
    """

    def run(plan: MapPlan, x: Array, factors: Factors) -> Array:
        ready = (packed or {}).get(plan.layout)
        return multiply(x, ready or pack_map(factors, plan.name))

    return by_platform(
        lambda platform: choose_map(math.prod(x.shape[:-1]), factors, platform, implementation),
        run,
        *(x, factors),
    )


def choose_map(
    tokens: int, factors: Factors, platform: Platform, implementation: str | None = None
) -> MapPlan:
    """Picks the plan for one map; arguments and errors are those of :func:`choose`."""
    (d_in, rank), d_out = factors.axes.shape, factors.filter.shape[1]
    problem = (tokens, d_in, rank, d_out, factors.axes.dtype.name)
    estimates = costs.low_rank_costs(tokens, d_in, rank, d_out)
    return MapPlan(pick("low_rank", implementation, estimates, None, problem, platform))


def pack_map(factors: Factors, plan: str) -> tuple[Array, ...]:
    """Returns the matrices of one map: both factors or, for ``"merged"``, their product alone."""
    return (factors.axes @ factors.filter,) if plan == "merged" else tuple(factors)


def multiply(x: Float[Array, "*batch i"], matrices: tuple[Array, ...]) -> Float[Array, "*batch o"]:
    """Multiplies by the matrices of one map in turn."""
    if len(matrices) == 1:
        return x @ matrices[0]
    axes, filter = matrices
    # A few components a token: kept for the backward pass, they save it the GEMM behind them.
    return _project(kept(_project(x, axes)), filter)


@jax.custom_vjp
def _project(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]) -> Float[Array, "*batch o"]:
    """Returns ``x @ kernel``; the backward pass writes the kernel's gradient longer side last.

    On CPU a product of few columns and many rows takes several times as long as its transpose.
    """
    return x @ kernel


def _project_backward(stored, dy):
    x, kernel = stored
    rows, grads = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    if kernel.shape[0] <= kernel.shape[1]:
        dk = jnp.einsum("ti,to->io", rows, grads)
    else:
        dk = jnp.einsum("to,ti->oi", grads, rows).T
    return dy @ kernel.T, dk.astype(kernel.dtype)


_project.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _project_backward)
