"""The commands of ``sparseffn bench``: what sparse FFNs gain, on the clock and in quality."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from sparseffn_jax.bench.estimated import estimate_table, run_ffn_estimate
from sparseffn_jax.bench.estimated_model import model_estimate_table, run_model_estimate
from sparseffn_jax.bench.layer import ffn_tables, run_ffn_bench
from sparseffn_jax.bench.model import model_table, run_model_bench
from sparseffn_jax.bench.quality import run_quality
from sparseffn_jax.bench.settings import FFNBenchSettings, ModelBenchSettings, QualitySettings
from sparseffn_jax.commands.arguments.bench import (
    BenchAllArguments,
    BenchFFNArguments,
    BenchModelArguments,
    BenchQualityArguments,
)
from sparseffn_jax.defaults import EMBEDDED_MODEL
from sparseffn_jax.measure.records import make_folder, versions, write_json


class BenchFFN(BenchFFNArguments):
    """Measures one layer."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        if self.device is not None:
            result = run_ffn_estimate(self, self.device, Console(stderr=True))
            if self.json:
                print(json.dumps(result, indent=2))
            else:
                console.print(estimate_table(result["gpu"], result["rows"]))
            return
        result = run_ffn_bench(self, Console(stderr=True))
        if self.json:
            print(json.dumps(result, indent=2))
            return
        for table in ffn_tables(result):
            console.print(table)
        console.print(f"wrote {self.out / 'ffn.json'} and pictures beside it")


class BenchModel(BenchModelArguments):
    """Measures a whole model."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        if self.device is not None:
            result = run_model_estimate(self, self.device, Console(stderr=True))
            title = f"{self.model or 'GPT-2 ' + self.size}, {self.dtype}, on {result['gpu']}"
            console.print(model_estimate_table(title, result["rows"]))
            console.print(f"wrote {self.out / f'model-{self.device}.json'}")
            return
        console.print(model_table(run_model_bench(self, console)))


class BenchQuality(BenchQualityArguments):
    """Compares losses at equal measured FFN time."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        run_quality(self, console)


class BenchAll(BenchAllArguments):
    """Measures layer, model and quality for a short time."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        make_folder(self.out)
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
