"""Layers on a GPU's clock, in bfloat16: forward, training and decoding, dense = 1.

python campaigns/gpu_layers.py --out campaigns/results/DATE-DEVICE/layers.json
python campaigns/gpu_layers.py --estimate h100 --measured FILE --out FILE

Beside the clock's time stands what is estimated from the same compiled program. With --estimate
each program is compiled for that GPU instead; with --measured the clock's times are those of an
earlier run, and no GPU is needed.

Calls follow each other within one program, each waiting for the one before, so that the time is the
device's and not that of starting a program from Python.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import sparseffn_jax as sf
from sparseffn_jax.bench.estimated import known_gpu
from sparseffn_jax.bench.layer import Mode
from sparseffn_jax.bench.pictures import NARROW_TABLE
from sparseffn_jax.measure.flops import count_kernels
from sparseffn_jax.measure.gpus import compile_for, gpu_here
from sparseffn_jax.measure.memory import memory_of
from sparseffn_jax.measure.programs import read_program
from sparseffn_jax.measure.records import versions, write_json
from sparseffn_jax.measure.timing import chained
from sparseffn_jax.ops import fused_hidden
from sparseffn_jax.ops.hidden import Activate

_CALLS, _DECODED, _QUEUED, _ROUNDS = 16, 64, 3, 5


def layers(d_model: int, d_ff: int, gated: bool) -> dict[str, sf.SparseFFNConfig]:
    """Returns the layers that are measured; the first is the dense one."""
    activation = "silu" if gated else "gelu_new"

    def layer(**parts: Any) -> sf.SparseFFNConfig:
        return sf.SparseFFNConfig(d_model, d_ff, activation, gated=gated, bias=not gated, **parts)

    def sized(ratio: float, bypass: bool | None = None) -> sf.SparseFFNConfig:
        options: Any = {"gated": gated, "bias": not gated, "bypass": bypass}
        return sf.size_ffn(d_model, d_ff, ratio, activation, **options)

    def low_rank(plan: str | None = None) -> sf.SparseFFNConfig:
        return layer(spectral=sf.SpectralConfig("low_rank", d_ff, rank, implementation=plan))

    def circulant(plan: str) -> sf.SparseFFNConfig:
        branch = sf.SpectralConfig("block_circulant", d_ff, block_size=16, implementation=plan)
        return layer(spectral=branch)

    rank = d_model // 5 // 16 * 16
    ranks, bfloat16 = [rank] * (3 if gated else 2), jnp.dtype(jnp.bfloat16)
    fits = fused_hidden.refusal(ranks, Activate(activation), bfloat16) is None
    return {
        "dense": sized(1.0),
        "default-0.4": sized(0.4),
        "default-0.25": sized(0.25),
        "bypass-0.4": sized(0.4, bypass=True),
        "bypass-0.25": sized(0.25, bypass=True),
        f"low-rank-{rank}": low_rank("two_gemms"),
        **({f"low-rank-{rank} fused": low_rank()} if fits else {}),
        # The better of XLA's plans at each size.
        "dft-16": circulant("dense" if d_model < 1024 else "dft"),
        "dft-16 fused": circulant("fused"),
    }


def operands_of(config: sf.SparseFFNConfig, tokens: int, mode: Mode) -> tuple[Any, tuple[Any, ...]]:
    """Returns the function of one pass, and its arguments."""
    ffn = sf.SparseFFN(config, dtype=jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = (jax.random.normal(key, (tokens, config.d_model), jnp.bfloat16) for key in keys[:2])
    shapes = jax.eval_shape(ffn.init, keys[2], x)["params"]
    params = jax.tree.map(
        lambda leaf: 0.02 * jax.random.normal(keys[2], leaf.shape, jnp.bfloat16), shapes
    )

    def training(given: tuple[Any, Any], x: Any) -> Any:
        variables, g = given
        return jax.vjp(ffn.apply, variables, x)[1](g)

    if mode == "training":
        return training, (({"params": params}, g), x)
    if mode == "decoding":
        # As in generation: weights do not change, and are packed once.
        return ffn.apply, (ffn.pack({"params": params}, tokens, platform="gpu"), x)
    return ffn.apply, ({"params": params}, x)


def _repeated(training: Callable[[Any, Any], Any], times: int) -> Callable[[Any, Any], Any]:
    """Returns a function that computes gradients so many times, at inputs that change by theirs."""

    def run(given: Any, x: Any) -> Any:
        def turn(_: Any, carry: Any) -> Any:
            x, _ = carry
            gradients, dx = training(given, x)
            return x + dx, gradients

        gradients, _ = jax.eval_shape(training, given, x)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), gradients)
        return jax.lax.fori_loop(0, times, turn, (x, zeros))

    return run


def measure(config: sf.SparseFFNConfig, tokens: int, mode: Mode) -> dict[str, Any]:
    """Returns a call's time and what is estimated for it, and the program's temporary memory."""
    function, operands = operands_of(config, tokens, mode)
    calls = _DECODED if mode == "decoding" else _CALLS
    function = _repeated(function, calls) if mode == "training" else chained(function, calls)
    traced = jax.jit(function).trace(*operands)
    program = traced.lower().compile()
    result = jax.block_until_ready(program(*operands))
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for _ in range(_QUEUED):
            result = program(*operands)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - started) / _QUEUED / calls)
    row = {
        "us": 1e6 * float(np.median(seconds)),
        "temporary_mib": memory_of(program).temporary / 2**20,
    }
    if (gpu := gpu_here()) is not None:
        read = read_program(program, count_kernels(traced.jaxpr))
        row |= {
            "estimated_us": 1e6 * gpu.seconds(read) / calls,
            "kernels": round(read.launches / calls),
        }
    return row


def main() -> None:
    """Measures, estimates, prints a table and writes the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_layers.json"))
    parser.add_argument("--small", action="store_true", help="tiny layers, to try the script")
    parser.add_argument("--estimate", metavar="GPU", help="estimate for it too: h100, ...")
    parser.add_argument("--measured", type=Path, help="an earlier layers.json to take times from")
    arguments = parser.parse_args()
    gpu = arguments.estimate and known_gpu(arguments.estimate)
    before = arguments.measured and json.loads(arguments.measured.read_text(encoding="utf-8"))
    clocked = {_key(row): row["us"] for row in before["rows"]} if before else {}
    sizes = [(768, 3072, False), (4096, 11008, True)]
    decoding: list[tuple[int, Mode]] = [(1, "decoding"), (16, "decoding"), (64, "decoding")]
    passes: list[list[tuple[int, Mode]]] = [
        [(tokens, "forward"), (tokens, "training"), *decoding] for tokens in (16384, 8192)
    ]
    if arguments.small:
        sizes = [(256, 1024, False), (256, 768, True)]
        passes = [[(64, "training")] for _ in sizes]
    console, rows = Console(soft_wrap=True), []
    of_run: dict[str, Any] = {"versions": before["versions"] if before else versions()}
    if (estimated_for := gpu or gpu_here()) is not None:
        of_run["estimated_for"] = estimated_for.description
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for (d_model, d_ff, gated), each in zip(sizes, passes, strict=True):
        configs = layers(d_model, d_ff, gated)
        for tokens, mode in each:
            first = len(rows)
            for name, config in configs.items():
                if mode == "decoding" and name.startswith(("low", "dft")):
                    continue
                row: dict[str, Any] = {
                    "size": f"{d_model} x {d_ff}",
                    "tokens": tokens,
                    "pass": mode,
                    "layer": name,
                    "promised": 1.0 / sf.flops_ratio(config),
                }
                if before is None:
                    row |= measure(config, tokens, mode)
                elif _key(row) in clocked:
                    row["us"] = clocked[_key(row)]
                if gpu:
                    function, operands = _shapes(config, tokens, mode)
                    program = compile_for(gpu, function, *operands)
                    row |= {
                        "estimated_us": 1e6 * gpu.seconds(program),
                        "kernels": program.launches,
                    }
                rows.append(row)
            for row in rows[first:]:
                for column, gain in (("us", "speedup"), ("estimated_us", "estimated_speedup")):
                    if column in row and column in rows[first]:
                        row[gain] = rows[first][column] / row[column]
            console.print(f"{d_model} x {d_ff}, {tokens} tokens, {mode}: done")
            write_json(arguments.out, {**of_run, "rows": rows})
    console.print(_table(rows, of_run["versions"]["device"]))
    console.print(f"wrote {arguments.out}")


def _shapes(config: sf.SparseFFNConfig, tokens: int, mode: Mode) -> tuple[Any, tuple[Any, ...]]:
    """Returns what :func:`operands_of` does, with shapes in the place of arrays."""
    functions = []

    def operands() -> tuple[Any, ...]:
        function, values = operands_of(config, tokens, mode)
        functions.append(function)
        return values

    shapes = jax.eval_shape(operands)
    return functions[-1], shapes


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("size", "tokens", "pass", "layer"))


def _table(rows: list[dict[str, Any]], device: str) -> Table:
    table = Table(title=f"FFN time on {device}, bfloat16, dense = 1", **NARROW_TABLE)
    columns = {
        **{name: name for name in ("size", "tokens", "pass", "layer", "promised")},
        **{"speed-up": "speedup", "us": "us", "MiB": "temporary_mib"},
        **{"est. speed-up": "estimated_speedup", "est. us": "estimated_us", "kernels": "kernels"},
    }
    columns = {name: key for name, key in columns.items() if any(key in row for row in rows)}
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = (row.get(key, "") for key in columns.values())
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells))
    table.caption = "promised: by FLOPs; MiB: temporary memory; est.: from the compiled program"
    return table


if __name__ == "__main__":
    main()
