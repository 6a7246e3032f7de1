"""The arguments of ``sparseffn inspect``."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from sparseffn_jax.commands.arguments.common import (
    Precision,
    check_at_least,
    check_files,
    check_models,
)
from sparseffn_jax.commands.parser import Arguments
from sparseffn_jax.defaults import EMBEDDED_MODEL
from sparseffn_jax.measure.records import check_folder


@dataclasses.dataclass(frozen=True)
class InspectArguments(Arguments):
    """Show what a model's FFNs are made of: parts, parameters, FLOPs and execution plans.

    Layers that are alike share a line.

    Attributes:
      model: Folder, GGUF file or hub name of a dense or sparse model.
      tokens: Rows of activations for which plans are chosen, and estimated; 1 is decoding.
      device: GPU (a100, h100, h200, b200), which need not be here, to estimate each layer's time
        on: the layers are compiled for it, forward.
      dtype: Precision of the layers that are estimated.
      autotune: Measure the plans of the model's layers here and write the table to --plans.
      plans: Table of measured plans to choose by, or to write.
      json: Print the layers' SparseFFNConfigs, as "sparseffn convert --config" reads them, instead
        of the table.
    """

    example = "sparseffn inspect --model run/model --tokens 1"
    groups: ClassVar = {
        "options": ("model", "tokens", "device", "dtype", "autotune", "plans", "json")
    }

    model: str = str(EMBEDDED_MODEL)
    tokens: int = 2048
    device: str | None = None
    dtype: Precision = "bfloat16"
    plans: Path | None = None
    autotune: bool = False
    json: bool = False

    def check(self) -> None:
        check_at_least(1, self, "tokens")
        if self.autotune and self.plans is None:
            raise ValueError("--autotune needs --plans, the file to write the table to")
        if self.device is not None and self.plans is not None:
            raise ValueError("--plans are of this machine: nothing runs here with --device")
        if self.json and self.device is not None:
            raise ValueError("--json prints configurations alone: it takes no --device")
        check_models(self.model)
        if self.plans is not None:
            if self.autotune:
                check_folder(self.plans.parent)
            else:
                check_files([self.plans])
