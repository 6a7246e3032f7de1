"""What the operators that run a hidden layer have in common: its maps, their plans, what is between.

Each operator is three pure functions: ``choose`` picks a plan for shapes and a platform, ``pack``
brings weights into the form that the plan multiplies by, and ``apply`` runs the layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

# The elementwise function of a hidden layer, called with the outputs of the maps into it, one array
# each, and a tree of arrays that broadcast against them.
Activate = Callable[[Sequence[Array], Any], Array]


class MapPlan(NamedTuple):
    """How one map runs; static.

    Attributes:
      name: plan of the map.
      tile: most tokens to take at a time; ``None`` takes all of them at once.
    """

    name: str
    tile: int | None = None

    @property
    def layout(self) -> str:
        """Names what packed weights depend on: the plan, and not the tile."""
        return self.name


class HiddenPlan(NamedTuple):
    """How the maps before and behind a hidden layer's elementwise function run; static.

    Attributes:
      up: plan of each map into the hidden units.
      down: plan of the map out of them.
      tile: most tokens to take at a time; ``None`` takes all of them at once.
    """

    up: tuple[str, ...]
    down: str
    tile: int | None = None

    @property
    def layout(self) -> str:
        """Names what packed weights depend on: the plans of the maps, and not the tile."""
        return f"{'+'.join(self.up)}/{self.down}"


class HiddenMaps(NamedTuple):
    """One thing for each map of a hidden layer: its weights, or its packed weights.

    Attributes:
      up: for the maps into the hidden units: ``(up,)`` or, gated, ``(gate, up)``.
      down: for the map out of them.
    """

    up: tuple[Any, ...]
    down: Any
