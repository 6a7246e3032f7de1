"""The arguments of ``sparseffn bench``: what sparse FFNs gain, on the clock and in quality."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from sparseffn_jax.bench.settings import FFNBenchSettings, ModelBenchSettings, QualitySettings
from sparseffn_jax.commands.arguments.common import check_files, check_models
from sparseffn_jax.commands.parser import Arguments
from sparseffn_jax.defaults import EMBEDDED_MODEL
from sparseffn_jax.measure.records import check_folder
from sparseffn_jax.train.sources import check_source


@dataclasses.dataclass(frozen=True)
class BenchFFNArguments(FFNBenchSettings, Arguments):
    """Measure one layer: a grid of configurations beside the dense FFN, on the same inputs.

    Shows what the FLOPs of each configuration promise, and what the clock says: in the forward
    pass, in training, and in decoding one token after the other. Shows too the memory that training
    takes, and what the chosen plan loses to the best one.

    Attributes:
      device: GPU (a100, h100, h200, b200), which need not be here, to estimate for instead of
        measuring: the programs are compiled for it, and nothing runs.
      json: Print the contents of ffn.json instead of the tables.
      plans: Table of measured execution plans, as "sparseffn inspect --autotune" writes it.
    """

    example = "sparseffn bench ffn --d-model 4096 --d-ff 11008 --dtype bfloat16"
    groups: ClassVar = {
        "options": ("d_model", "d_ff", "tokens", "dtype", "only", "device"),
        "measurement": ("repeats", "all_plans", "external", "plans"),
        "output": ("out", "json"),
    }

    device: str | None = None
    json: bool = False
    plans: Path | None = None

    def check(self) -> None:
        _check_device(self.device, self.plans)
        check_files([self.plans])
        check_folder(self.out)


@dataclasses.dataclass(frozen=True)
class BenchModelArguments(ModelBenchSettings, Arguments):
    """Measure a whole model: evaluation, training step and generation, beside PyTorch's.

    Attributes:
      device: GPU (a100, h100, h200, b200), which need not be here, to estimate for instead of
        measuring: the programs are compiled for it, and nothing runs.
      plans: Table of measured execution plans, as "sparseffn inspect --autotune" writes it.
    """

    example = "sparseffn bench model --model gpt2 --flops 0.4 --window 1024"
    groups: ClassVar = {
        "model": ("model", "size", "layers", "flops", "circulant_block"),
        "measurement": ("batch_size", "window", "prompt", "decoded", "dtype", "repeats"),
        "beside": ("external", "device", "plans", "out"),
    }

    device: str | None = None
    plans: Path | None = None

    def check(self) -> None:
        _check_device(self.device, self.plans)
        check_models(self.model)
        check_files([self.plans])
        check_folder(self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchQualityArguments(QualitySettings, Arguments):
    """Compare losses at equal measured FFN time: SparseFFN and other ways to thin an FFN.

    All of them train alike. With the embedded model on two CPU cores a method takes about a minute
    at each target; --steps, --targets and --methods shorten it. A stopped run goes on where it was.

    Attributes:
      plans: Table of measured execution plans, as "sparseffn inspect --autotune" writes it.
    """

    example = "sparseffn bench quality --model gpt2 --text corpus/ --targets 2 --steps 200"
    groups: ClassVar = {
        "options": ("model", "text", "out", "targets", "methods"),
        "training": (
            "steps",
            "learning_rate",
            "dense_learning_rate",
            "distill_weight",
            "batch_size",
            "window",
        ),
        "conversion": ("distill_steps", "calibration_windows"),
        "measurement": ("evaluation_windows", "timed_tokens", "plans"),
    }

    model: str = str(EMBEDDED_MODEL)
    plans: Path | None = None

    def check(self) -> None:
        check_models(self.model)
        check_files([self.plans])
        check_source(self.text)
        check_folder(self.out)


@dataclasses.dataclass(frozen=True)
class BenchAllArguments(Arguments):
    """Measure the layer and the model and compare quality for a short time, for one dated file.

    Attributes:
      out: Folder that DATE-DEVICE.json is written to. Pictures and parts go to runs/bench.
      plans: Table of measured execution plans, as "sparseffn inspect --autotune" writes it.
    """

    example = "sparseffn bench all --out results"
    groups: ClassVar = {"options": ("out", "plans")}

    out: Path = Path("campaigns/results")
    plans: Path | None = None

    def check(self) -> None:
        check_files([self.plans])
        check_folder(self.out)


def _check_device(device: str | None, plans: Path | None) -> None:
    if device is not None and plans is not None:
        raise ValueError("--plans are of this machine: nothing runs here with --device")
