"""The options of commands that share a budget out among layers."""

import dataclasses
import math
from typing import Literal

from sparseffn_jax.commands.arguments.common import Precision, check_at_least
from sparseffn_jax.commands.parser import flag_of

_SHARES, _SPEEDUPS = ("flops", "parameters"), ("ffn_speedup", "speedup")
LIMITS = (*_SHARES, *_SPEEDUPS, "max_loss")
TIMING = ("timed_pass", "timed_tokens", "timed_dtype", "device")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the layers may cost together: give one of the first five.

    Attributes:
      flops: Share of the dense FFNs' FLOPs that the layers may have.
      parameters: Share of the dense FFNs' parameters that the layers may have.
      ffn_speedup: Speed-up of the FFNs, measured here.
      speedup: Speed-up of the whole model, measured here or, with --device, estimated.
      max_loss: Predicted rise of the loss in nats a token, at as few FLOPs as it allows.
      timed_pass: What is timed for a speed-up: evaluation, or training.
      timed_tokens: Tokens in the passes that are timed, rounded to whole windows.
      timed_dtype: Precision of the computation that is timed.
      device: GPU to plan for (a100, h100, h200, b200), which need not be here: speed-ups are
        estimated from programs compiled for it.
    """

    flops: float | None = None
    parameters: float | None = None
    ffn_speedup: float | None = None
    speedup: float | None = None
    max_loss: float | None = None
    timed_pass: Literal["forward", "training"] = "forward"
    timed_tokens: int = 1024
    timed_dtype: Precision = "float32"
    device: str | None = None

    @property
    def given(self) -> dict[str, float]:
        """The limits that are given, by name."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    @property
    def speedup_wanted(self) -> tuple[str, float] | None:
        """The speed-up that is asked for, and what of; ``None`` if none is."""
        return next((item for item in self.given.items() if item[0] in _SPEEDUPS), None)

    def check(self) -> None:
        """Checks that there is one limit, and nothing beside it that has no meaning.

        Raises:
          ValueError: if not.
        """
        if len(self.given) != 1:
            names = ", ".join(map(flag_of, LIMITS))
            raise ValueError(f"give one of {names}: {len(self.given)} are given")
        ((name, value),) = self.given.items()
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number above 0")
        if name in _SPEEDUPS and value < 1.0:
            raise ValueError(f"{name}={value} must be 1 or more")
        if name in _SHARES and value > 1.0:
            raise ValueError(f"{name}={value} is a share of the dense FFNs: it must not exceed 1")
        for field in dataclasses.fields(self):
            given, is_of_clock = getattr(self, field.name), field.name in TIMING
            if is_of_clock and name not in _SPEEDUPS and given != field.default:
                raise ValueError(
                    f"{field.name}={given} says what is timed for --speedup or --ffn-speedup: "
                    f"with {flag_of(name)} nothing is timed"
                )
        check_at_least(1, self, "timed_tokens")
