"""The arguments of ``sparseffn demo``."""

import dataclasses
from typing import ClassVar

from sparseffn_jax.bench.settings import DemoSettings
from sparseffn_jax.checkpoints.folders import check_replaceable
from sparseffn_jax.commands.arguments.common import check_models
from sparseffn_jax.commands.parser import Arguments
from sparseffn_jax.measure.records import check_folder
from sparseffn_jax.train.sources import check_source


@dataclasses.dataclass(frozen=True)
class DemoArguments(DemoSettings, Arguments):
    """Make a faster sparse GPT-2 of a dense one, with a report and pictures.

    Without arguments it takes the small model that comes with the package and needs no network. It
    loads, evaluates, sparsifies and distils, fine-tunes sparse and dense on the same batches,
    evaluates and times both, and lets both write.
    """

    example = "sparseffn demo --model gpt2 --text corpus/ --out runs/gpt2"
    groups: ClassVar = {
        "options": ("model", "text", "out", "ffn_speedup", "flops", "prompt"),
        "training": ("steps", "learning_rate", "dense_learning_rate", "batch_size", "window"),
        "conversion": ("distill_steps", "calibration_windows"),
        "evaluation": ("evaluation_windows", "sweep", "sweep_steps"),
    }

    def check(self) -> None:
        # What is read stays; the last demo's result is replaced.
        check_replaceable(self.out / "model", True, [self.model])
        check_models(self.model)
        check_source(self.text)
        check_folder(self.out)
