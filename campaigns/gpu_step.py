"""Training steps of GPT-2 small on a GPU's clock, dense and sparse, and their longest kernels.

python campaigns/gpu_step.py --out campaigns/results/DATE-DEVICE/gpt2_small.json

Steps are queued and waited for together. Beside the clock's time stands what is estimated from the
same compiled program; the kernels' times come from JAX's profiler.
"""

import argparse
import collections
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config

import sparseffn_jax as sf
from sparseffn_jax.bench.clock import TrainingStep
from sparseffn_jax.bench.pictures import NARROW_TABLE
from sparseffn_jax.measure.gpus import gpu_here
from sparseffn_jax.measure.records import versions, write_json
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.sparsify.sizing import size_model

_ROUNDS, _QUEUED, _PROFILED, _KERNELS = 5, 5, 3, 40


def measure(model: Decoder, batch_size: int, window: int) -> dict[str, Any]:
    """Returns the time of a training step, what is estimated for it, and its longest kernels."""
    tokens = np.random.default_rng(0).integers(
        model.config.vocab_size, size=(batch_size, window + 1), dtype=np.int32
    )
    step = TrainingStep(model, batch_size, window)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    run = step.on(params, tokens)
    jax.block_until_ready(run())
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        jax.block_until_ready([run() for _ in range(_QUEUED)])
        seconds.append((time.perf_counter() - started) / _QUEUED)
    row: dict[str, Any] = {"ms": 1e3 * float(np.median(seconds))}
    if (gpu := gpu_here()) is not None:
        program = step.program
        row |= {"estimated_ms": 1e3 * gpu.seconds(program), "launches": program.launches}
    return row | {"kernels": _kernels(run)}


def _kernels(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Returns the kernels of a step that take the longest together, by their names."""
    total, runs = collections.Counter[str](), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([run() for _ in range(_PROFILED)])
        files = Path(folder).rglob("*.xplane.pb")
        planes = [plane for file in files for plane in ProfileData.from_file(str(file)).planes]
        for plane in planes:
            for line in plane.lines:
                if "GPU" in plane.name and "Stream" in line.name:
                    for event in line.events:
                        total[event.name] += event.duration_ns / _PROFILED
                        runs[event.name] += 1
    return [
        {"name": name[:100], "us": ns / 1e3, "times": runs[name] / _PROFILED}
        for name, ns in total.most_common(_KERNELS)
    ]


def main() -> None:
    """Measures, prints a table and writes the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_step.json"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--flops", type=float, nargs="*", default=[0.4])
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    config = GPT2Config(n_layer=arguments.layers)
    dense = sf.GPT2LMHeadModel(config, dtype=jnp.bfloat16, remat=True)
    models = {"dense": dense}
    for ratio in arguments.flops:
        ffn = size_model(dense.spec, ratio)
        models[f"default-{ratio:g}"] = dense.clone(ffns=(ffn,) * dense.spec.n_layer)
    shape = arguments.batch_size, arguments.window
    console, result = Console(), {"versions": versions(), "shape": shape, "steps": {}}
    table = Table(title=f"GPT-2 small, {shape[0]} x {shape[1]} tokens, bfloat16", **NARROW_TABLE)
    for column in ("model", "ms", "speed-up", "est. ms"):
        table.add_column(column, justify="right")
    for name, model in models.items():
        row = result["steps"][name] = measure(model, *shape)
        speedup = result["steps"]["dense"]["ms"] / row["ms"]
        estimate = f"{row['estimated_ms']:.1f}" if "estimated_ms" in row else ""
        table.add_row(name, f"{row['ms']:.1f}", f"{speedup:.2f}x", estimate)
        write_json(arguments.out, result)
    console.print(table)
    console.print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
