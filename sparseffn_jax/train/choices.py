"""What a run chooses by name, with the defaults of each; cheap to import, for the command line."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, cast, get_args

LossOn = Literal["all", "completion"]
OptimizerName = Literal["adamw", "lion", "muon"]
ReporterName = Literal["tensorboard", "wandb"]
Resume = Literal["auto", "never", "must"]
ScheduleName = Literal["cosine", "linear", "constant", "wsd"]
StrategyName = Literal["single", "pmap", "mesh"]
# The number of stages of each recipe; :data:`.recipes.RECIPES` says what trains in each of them.
STAGES = MappingProxyType({"full": 1, "ffn_only": 1, "lora": 1, "stepwise": 2})


class Defaults(NamedTuple):
    """What suits an optimizer where nothing else is asked for.

    Attributes:
      learning_rate: the peak learning rate.
      weight_decay: the decoupled weight decay, which is multiplied by the rate.
    """

    learning_rate: float
    weight_decay: float


# Every entry of Lion's update is as large as the rate: it takes a smaller rate than AdamW, and as
# much more decay (Chen et al. 2023, 2302.06675, section 5). Muon's updates are scaled to the size
# of AdamW's, so that one rate and one decay suit both (Liu et al. 2025, 2502.16982, section 2.2).
DEFAULTS: Mapping[OptimizerName, Defaults] = MappingProxyType(
    {
        "adamw": Defaults(5e-4, 0.1),
        "lion": Defaults(5e-5, 1.0),
        "muon": Defaults(5e-4, 0.1),
    }
)


def parse_reporters(names: str) -> tuple[ReporterName, ...]:
    """Reads a list of reporters, such as ``"tensorboard,wandb"``; ``"none"`` is the empty one.

    Raises:
      ValueError: if a name is unknown.
    """
    if names == "none":
        return ()
    found = tuple(name.strip() for name in names.split(","))
    for name in found:
        if name not in get_args(ReporterName):
            raise ValueError(
                f"report_to={names!r} has {name!r}: expected some of "
                f"{', '.join(get_args(ReporterName))} with commas between, or none"
            )
    return cast(tuple[ReporterName, ...], tuple(dict.fromkeys(found)))
