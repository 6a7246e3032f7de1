"""The arguments of ``sparseffn convert``."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from sparseffn_jax.checkpoints.folders import check_replaceable
from sparseffn_jax.commands.arguments.budget import LIMITS, TIMING, Budget
from sparseffn_jax.commands.arguments.common import (
    check_at_least,
    check_files,
    check_models,
    check_share,
)
from sparseffn_jax.commands.parser import Arguments
from sparseffn_jax.defaults import REPAIR, STDLIB
from sparseffn_jax.measure.records import check_folder
from sparseffn_jax.train.sources import check_sources


@dataclasses.dataclass(frozen=True)
class ConvertArguments(Arguments):
    """Replace a dense model's FFNs by sparse ones that start near them.

    It goes layer by layer, without end-to-end training: that is "sparseffn finetune". Without a
    budget every layer keeps 0.4 of its FLOPs; --flops alone makes all layers alike too; with
    --planned, and with every other budget, a plan shares the budget out. A stopped command goes on
    when it is given again: what it needs for that lies in OUT.partial and OUT.plan.

    Attributes:
      model: Folder, GGUF file or hub name of a dense model.
      out: Folder to write, in Hugging Face format.
      budget: What the layers may cost together.
      planned: Share --flops out among the layers by a plan.
      servable: Plan what "sparseffn export" can write for llama.cpp.
      config: JSON file of one SparseFFNConfig for all layers, or a list with one for each, as
        "sparseffn inspect --json" prints it; null keeps a layer dense.
      text: Calibration text: a file, a folder, a dataset, or "stdlib" for Python's library.
      validation_text: Text to validate on; by default a twentieth of --text is held out for that.
      text_tokens: Most tokens to read of each text; a dataset of the Hub is then streamed.
      calibration_tokens: Tokens of the text to use, ten or more for each hidden unit of a layer.
      window: Tokens in a window, by default n_positions or 1024 if that is less.
      batch_size: Windows computed at once; it changes time and memory, not the result.
      distill_steps: Steps of distillation for each layer; 0 leaves distillation out.
      repair: Share, from 0 to 1, of what the layers before have lost that a layer makes up for.
      stream_dtype: Precision of the activations that wait in memory, which bfloat16 halves: both
        residual streams, and the inputs and targets of one layer.
      seed: Seed of the choice of windows.
      plans: Table of measured execution plans, as "sparseffn inspect --autotune" writes it.
      overwrite: Replace the model that lies in --out.
      push: Repository on the Hugging Face Hub, such as me/sparse-gpt2, to push the model to.
      private: Make that repository private.
    """

    example = "sparseffn convert --model gpt2 --text corpus/ --out sparse --flops 0.4"
    groups: ClassVar = {
        "options": ("model", "out", "text", "overwrite"),
        "budget (at most one)": (*LIMITS, "config"),
        "plan (beside a budget)": ("planned", "servable"),
        "what is timed": TIMING,
        "calibration": (
            "calibration_tokens",
            "window",
            "batch_size",
            "distill_steps",
        ),
    }

    model: str
    out: Path
    budget: Budget
    planned: bool = False
    servable: bool = False
    config: Path | None = None
    text: str = STDLIB
    validation_text: str | None = None
    text_tokens: int | None = None
    calibration_tokens: int = 65536
    window: int | None = None
    batch_size: int = 4
    distill_steps: int = 300
    repair: float = REPAIR
    stream_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    plans: Path | None = None
    overwrite: bool = False
    push: str | None = None
    private: bool = False

    @property
    def is_planned(self) -> bool:
        """Whether a plan shares the budget out."""
        return self.planned or not self.budget.given.keys() <= {"flops"}

    def check(self) -> None:
        check_at_least(1, self, "calibration_tokens", "batch_size", "window", "text_tokens")
        check_at_least(0, self, "distill_steps", "seed")
        check_share("repair", self.repair)
        if self.config is not None and (self.budget != Budget() or self.planned):
            raise ValueError(
                "--config says what the layers are: it takes no budget and no --planned"
            )
        if self.servable and not self.is_planned:
            raise ValueError(
                "--servable says how a plan is made, and there is none: add --planned to --flops, "
                "or give another budget"
            )
        if self.is_planned or self.budget != Budget():
            self.budget.check()
        check_models(self.model)
        check_files([self.config, self.plans])
        check_sources(self.text, self.validation_text)
        check_replaceable(self.out, self.overwrite, [self.model])
        check_folder(self.out)
