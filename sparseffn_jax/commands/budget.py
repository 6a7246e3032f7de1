"""The options of commands that share a budget out among layers."""

import dataclasses
from typing import Literal

from sparseffn_jax.commands.common import check_at_least


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the layers may cost together: give one of the first five.

    Attributes:
      flops: FFN FLOPs of all layers over the dense ones.
      parameters: FFN parameters of all layers over the dense ones.
      ffn_speedup: Speed-up of the FFNs, measured here.
      speedup: Speed-up of the whole model, measured here.
      max_loss: Predicted rise of the loss, in nats a token, at as few FLOPs as it allows.
      timed_pass: What is timed for a speed-up: evaluation, or training.
      timed_tokens: Tokens in the passes that are timed, rounded to whole windows.
      timed_dtype: Precision of the computation that is timed.
    """

    flops: float | None = None
    parameters: float | None = None
    ffn_speedup: float | None = None
    speedup: float | None = None
    max_loss: float | None = None
    timed_pass: Literal["forward", "training"] = "forward"
    timed_tokens: int = 1024
    timed_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def given(self) -> dict[str, float]:
        """The limits that are given, by name."""
        limits = ("flops", "parameters", "ffn_speedup", "speedup", "max_loss")
        return {name: value for name in limits if (value := getattr(self, name)) is not None}

    @property
    def speedup_wanted(self) -> tuple[str, float] | None:
        """The speed-up that is asked for, and what of; ``None`` if none is."""
        return next((item for item in self.given.items() if "speedup" in item[0]), None)

    def check(self) -> None:
        """Checks that there is one limit, and that it can be met.

        Raises:
          ValueError: if not.
        """
        if len(self.given) != 1:
            names = ", ".join("--" + f.name.replace("_", "-") for f in dataclasses.fields(self)[:5])
            raise ValueError(f"give one of {names}: {len(self.given)} are given")
        ((name, value),) = self.given.items()
        if not value > 0.0:
            raise ValueError(f"{name}={value} must be above 0")
        if self.speedup_wanted and value < 1.0:
            raise ValueError(f"{name}={value} must be 1 or more")
        if self.timed_pass == "training" and not self.speedup_wanted:
            raise ValueError("timed_pass says what is timed for --speedup or --ffn-speedup")
        check_at_least("timed_tokens", self.timed_tokens, 1)
