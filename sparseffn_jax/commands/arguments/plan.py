"""The arguments of ``sparseffn plan``."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from sparseffn_jax.commands.arguments.budget import LIMITS, TIMING, Budget
from sparseffn_jax.commands.arguments.common import check_at_least, check_models, check_share
from sparseffn_jax.commands.parser import Arguments
from sparseffn_jax.defaults import REPAIR, STDLIB
from sparseffn_jax.measure.records import check_folder
from sparseffn_jax.train.sources import check_sources


@dataclasses.dataclass(frozen=True)
class PlanArguments(Arguments):
    """Choose what each layer's FFN becomes, so that a budget costs as little loss as possible.

    The folder --out gets plan.json, which "sparseffn convert --config" reads, and report.json and
    plan.png, which show what was chosen and why. "sparseffn convert" makes such a plan itself if it
    is given such a budget. The same command goes on where it stopped.

    Attributes:
      model: Folder, GGUF file or hub name of a dense model.
      out: Folder to write; a plan with another budget starts from the estimates in it.
      budget: What the layers may cost together.
      most_shapes: Number of different layers, dense ones included. The default is any number.
      narrow: Plan with narrower FFNs alone, without bypasses, to compare.
      servable: Plan what "sparseffn export" can write for llama.cpp: bypasses are priced as the
        hidden units that they become there, and all layers are alike where it takes no others.
      trials: Conversions that show how much of a loss later layers repair, and whether bypasses
        pay: as many with them as without.
      text: Calibration text: a file, a folder, a dataset, or "stdlib" for Python's library.
      validation_text: Text to validate on; by default a twentieth of --text is held out for that.
      text_tokens: Most tokens to read of each text; a dataset of the Hub is then streamed.
      calibration_tokens: Tokens of the text to use.
      window: Tokens in a window, by default n_positions or 1024 if that is less.
      batch_size: Windows computed at once; it changes time and memory, not the result.
      repair: Share of what the layers before have lost that a layer makes up for when the plan is
        converted, from 0 to 1; with 0 there are no trials.
      seed: Seed of the choice of windows.
    """

    example = "sparseffn plan --model gpt2 --text corpus/ --out plan --speedup 1.3"
    groups: ClassVar = {
        "options": ("model", "out", "text"),
        "budget (give one)": LIMITS,
        "what is timed": TIMING,
        "calibration": ("calibration_tokens", "window", "batch_size"),
        "plan": ("most_shapes", "narrow", "servable"),
    }

    model: str
    out: Path
    budget: Budget
    most_shapes: int | None = None
    narrow: bool = False
    servable: bool = False
    trials: int = 1
    text: str = STDLIB
    validation_text: str | None = None
    text_tokens: int | None = None
    calibration_tokens: int = 32768
    window: int | None = None
    batch_size: int = 4
    repair: float = REPAIR
    seed: int = 0

    def check(self) -> None:
        self.budget.check()
        counts = "calibration_tokens", "batch_size", "most_shapes", "window", "text_tokens"
        check_at_least(1, self, *counts)
        check_at_least(0, self, "trials", "seed")
        check_share("repair", self.repair)
        check_models(self.model)
        check_sources(self.text, self.validation_text)
        check_folder(self.out)
