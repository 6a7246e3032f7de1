"""The commands of ``sparseffn bench``: what sparse FFNs gain, on the clock and in quality."""

import dataclasses
import datetime
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from sparseffn_jax.bench.estimated import estimate_table, run_ffn_estimate
from sparseffn_jax.bench.estimated_model import model_estimate_table, run_model_estimate
from sparseffn_jax.bench.layer import FFNBenchSettings, ffn_tables, run_ffn_bench
from sparseffn_jax.bench.model import ModelBenchSettings, model_table, run_model_bench
from sparseffn_jax.bench.quality import QualitySettings, run_quality
from sparseffn_jax.checkpoints.pretrained import EMBEDDED_MODEL
from sparseffn_jax.measure.records import make_folder, versions, write_json
from sparseffn_jax.ops.plans.choice import using


@dataclasses.dataclass(frozen=True)
class BenchFFN(FFNBenchSettings):
    """Measure one layer: a grid of configurations in turn with the dense FFN, on the same inputs.

    Shows what the FLOPs of each configuration promise, and what the clock says: in the forward
    pass, in training, and in decoding one token after the other. Shows too the memory that training
    takes, and what the chosen plan loses to the best one.

    Attributes:
      device: Estimate for this GPU (a100, h100, h200, b200), which need not be here, instead of
        measuring: the programs are compiled for it, and nothing runs.
      json: Print the contents of ffn.json instead of the tables.
      plans: Table of measured plans to choose by, as "sparseffn inspect --autotune" writes it.
    """

    device: str | None = None
    json: bool = False
    plans: Path | None = None

    def run(self, console: Console) -> None:
        """Runs the command."""
        if self.device is not None:
            result = run_ffn_estimate(self, self.device, Console(stderr=True))
            if self.json:
                print(json.dumps(result, indent=2))
            else:
                console.print(estimate_table(result["gpu"], result["rows"]))
            return
        with using(self.plans):
            result = run_ffn_bench(self, Console(stderr=True))
        if self.json:
            print(json.dumps(result, indent=2))
            return
        for table in ffn_tables(result):
            console.print(table)
        console.print(f"wrote {self.out / 'ffn.json'} and pictures beside it")


@dataclasses.dataclass(frozen=True)
class BenchModel(ModelBenchSettings):
    """Measure a whole model: evaluation, training step, generation, beside Hugging Face's PyTorch.

    Attributes:
      device: Estimate for this GPU (a100, h100, h200, b200), which need not be here, instead of
        measuring: the programs are compiled for it, and nothing runs.
      plans: Table of measured plans to choose by, as "sparseffn inspect --autotune" writes it.
    """

    device: str | None = None
    plans: Path | None = None

    def run(self, console: Console) -> None:
        """Runs the command."""
        if self.device is not None:
            if self.plans is not None:
                raise ValueError("--plans are of this machine: nothing runs here with --device")
            result = run_model_estimate(self, self.device, Console(stderr=True))
            title = f"{self.model or 'GPT-2 ' + self.size}, {self.dtype}, on {result['gpu']}"
            console.print(model_estimate_table(title, result["rows"]))
            console.print(f"wrote {self.out / f'model-{self.device}.json'}")
            return
        with using(self.plans):
            result = run_model_bench(self, console)
        console.print(model_table(result))


@dataclasses.dataclass(frozen=True)
class BenchQuality(QualitySettings):
    """Compare losses at equal measured FFN time: SparseFFN and other ways to thin an FFN.

    All of them train alike. With the embedded model on two CPU cores a method takes about a minute
    at each target; --steps, --targets and --methods shorten it. A stopped run goes on where it was.

    Attributes:
      plans: Table of measured plans to choose by, as "sparseffn inspect --autotune" writes it.
    """

    model: str = str(EMBEDDED_MODEL)
    plans: Path | None = None

    def run(self, console: Console) -> None:
        """Runs the command."""
        with using(self.plans):
            run_quality(self, console)


@dataclasses.dataclass(frozen=True)
class BenchAll:
    """Measure the layer and the model and compare quality for a short time, for one dated file.

    Attributes:
      out: Folder that DATE-DEVICE.json is written to. Pictures and parts go to runs/bench.
      plans: Table of measured plans to choose by, as "sparseffn inspect --autotune" writes it.
    """

    out: Path = Path("campaigns/results")
    plans: Path | None = None

    def run(self, console: Console) -> None:
        """Runs the command."""
        make_folder(self.out)
        with using(self.plans):
            self._run(console)

    def _run(self, console: Console) -> None:
        work = Path("runs/bench")
        ffn = run_ffn_bench(FFNBenchSettings(out=work, repeats=7, all_plans=False), console)
        for table in ffn_tables(ffn):
            console.print(table)
        model = run_model_bench(ModelBenchSettings(out=work, repeats=3, external=False), console)
        console.print(model_table(model))
        quality = run_quality(
            QualitySettings(
                model=str(EMBEDDED_MODEL),
                out=work / "quality",
                targets=(2.0,),
                methods=("SparseFFN", "narrow", "low-rank"),
                steps=30,
                distill_steps=30,
            ),
            console,
        )
        result: dict[str, Any] = {"ffn": ffn, "model": model, "quality": quality}
        device = re.sub(r"[^a-z0-9]+", "-", versions()["device"].lower()).strip("-")
        path = self.out / f"{datetime.date.today().isoformat()}-{device}.json"
        write_json(path, result)
        console.print(f"wrote {path}")
