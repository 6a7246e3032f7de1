"""How a hidden layer runs: its maps, the function between them, its plans and its tiles.

Each operator is three pure functions: ``choose`` picks a plan for shapes and a platform, ``pack``
brings weights into the form that the plan multiplies by, and ``apply`` runs the layer. Its
``hidden_layer`` joins the three by :func:`by_platform`: the plan depends on the platform that the
program is compiled for, which JAX knows only when it lowers the program. The operator is therefore
traced for each platform whose plan differs, and lowering keeps the one that is right.

A layer that does little arithmetic is bound by how often its hidden activations go to memory and
back. In tiles of tokens they stay in cache; in the backward pass every tile recomputes them from
its inputs, so that a layer keeps nothing for it but what it was given (Chen et al. 2016,
1604.06174).

Products are plain ``@``. XLA accumulates half precision in float32 by itself; asking for a float32
result and casting it would say the same of the forward pass, but then the cotangent is cast up too,
and both products of the backward pass run in float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sparseffn_jax.ops.activations import get_activation
from sparseffn_jax.ops.elementwise import add_bias
from sparseffn_jax.ops.plans.costs import Platform
from sparseffn_jax.ops.polynomial import evaluate

Plan = TypeVar("Plan", bound="MapPlan | HiddenPlan")
# Packed weights, by the layout that a plan wants.
Packed = Mapping[str, Any]


class Channels(NamedTuple):
    """The parameters of hidden units; the last axis of every array is the hidden width, or 1.

    Attributes:
      biases: bias (width,) of each map into the hidden units; empty if the layer has no biases.
      coefficients: coefficients (terms, width or 1) of a polynomial; ``None`` for a plain
        activation.
    """

    biases: tuple[Array, ...] = ()
    coefficients: Array | None = None


@dataclasses.dataclass(frozen=True)
class Activate:
    """The elementwise function of a hidden layer.

    It is ``phi(u + bias)`` or, in a gated layer, ``phi(gate + bias) * (up + bias)``.

    Attributes:
      activation: name of phi where it is no polynomial, as Hugging Face's configs spell it.
      degrees: degrees that a polynomial phi keeps, ascending; empty for a plain activation.
      radius: R > 0 of the interval [-R, R] on which phi is a polynomial.
    """

    activation: str
    degrees: tuple[int, ...] = ()
    radius: float = 1.0

    def __call__(self, us: Sequence[Array], channels: Channels) -> Array:
        if channels.biases:
            us = [add_bias(u, bias) for u, bias in zip(us, channels.biases, strict=True)]
        if channels.coefficients is None:
            hidden = get_activation(self.activation)(us[0])
        else:
            hidden = evaluate(
                us[0], channels.coefficients, degrees=self.degrees, radius=self.radius
            )
        return hidden if len(us) == 1 else hidden * us[1]


class MapPlan(NamedTuple):
    """The static description of how one map runs.

    Attributes:
      name: name of the plan.
      tile: the largest number of tokens to take at a time; ``None`` takes all of them at once.
    """

    name: str
    tile: int | None = None

    @property
    def layout(self) -> str:
        """Name of the layout of packed weights, which depends on the plan and not on the tile."""
        return self.name


class HiddenPlan(NamedTuple):
    """The static description of how the maps into and out of hidden units run.

    Attributes:
      up: name of the plan of each map into the hidden units.
      down: name of the plan of the map out of the hidden units.
      tile: the largest number of tokens to take at a time; ``None`` takes all of them at once.
      is_fused: whether one kernel runs everything as wide as the hidden units.
    """

    up: tuple[str, ...]
    down: str
    tile: int | None = None
    is_fused: bool = False

    @property
    def layout(self) -> str:
        """Name of the layout of packed weights, which depends on the plans and not on the tile."""
        return f"{'+'.join(self.up)}/{self.down}"


class HiddenMaps(NamedTuple):
    """One value for each map of a hidden layer, such as its weights, packed weights or mask.

    Attributes:
      up: values for the maps into the hidden units: ``(up,)`` or, in a gated layer, ``(gate, up)``.
      down: value for the map out of the hidden units.
    """

    up: tuple[Any, ...]
    down: Any


def by_platform(
    choose: Callable[[Platform], Plan], run: Callable[..., Array], *operands: Any
) -> Array:
    """Runs an operator by the plan for the platform that the program is compiled for.

    Args:
      choose: function that returns the plan for a platform.
      run: function that computes the result from a plan and the operands.
      *operands: trees of arrays that ``run`` takes behind the plan.

    Returns:
      What ``run`` returns for the plan of the platform.
    """
    on_cpu, on_gpu = choose("cpu"), choose("gpu")
    if on_cpu == on_gpu:
        return run(on_cpu, *operands)
    return jax.lax.platform_dependent(
        *operands, cpu=functools.partial(run, on_cpu), default=functools.partial(run, on_gpu)
    )


# Rows of a tile come in multiples of this: what vector units and GEMM kernels like.
_ROWS = 16
_KEPT = "kept"


def kept(x: Array) -> Array:
    """Marks a narrow array, which :func:`over_tokens` then keeps for the backward pass."""
    return checkpoint_name(x, _KEPT)


def over_tokens(
    function: Callable[[Float[Array, "t i"]], Float[Array, "t o"]],
    x: Float[Array, "T i"],
    tile: int | None,
) -> Float[Array, "T o"]:
    """Applies a function of single rows tile by tile; the backward pass recomputes every tile.

    Args:
      function: maps the rows (t, i) of a tile to (t, o), each row by itself. It may close over
        arrays, which get their gradients. Arrays that it marks with :func:`kept` are not
        recomputed.
      x: all rows, (T, i).
      tile: the largest number of rows in a tile; ``None`` takes all rows at once.

    Returns:
      The mapped rows, (T, o).
    """
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    function = jax.checkpoint(function, policy=policy)
    tokens, channels = x.shape
    if tile is None or tokens <= tile:
        return function(x)
    count, rows = _tiles(tokens, tile)
    padded = jnp.pad(x, ((0, count * rows - tokens), (0, 0)))
    y = jax.lax.map(function, padded.reshape(count, rows, channels))
    return y.reshape(count * rows, y.shape[-1])[:tokens]


def _tiles(tokens: int, tile: int) -> tuple[int, int]:
    """Returns the number of tiles, and the number of rows in each."""
    fewest = -(-tokens // tile)
    # Padding copies all rows twice: tiles a little smaller that need none are cheaper.
    for count in range(fewest, 2 * fewest):
        if tokens % (count * _ROWS) == 0:
            return count, tokens // count
    return fewest, _ROWS * -(-tokens // (fewest * _ROWS))
