"""Layers on a GPU's clock, in bfloat16: forward, training and decoding, dense = 1.

python campaigns/gpu_layers.py --out campaigns/results/DATE-DEVICE/layers.json

Forward and training calls are queued and waited for together, so that the time is the device's and
not that of starting a program from Python; decoded tokens follow each other within one program.
"""

import argparse
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
from sparseffn_jax.bench.pictures import NARROW_TABLE
from sparseffn_jax.measure.memory import memory_of
from sparseffn_jax.measure.records import versions, write_json
from sparseffn_jax.measure.timing import chained

_QUEUED, _DECODED, _ROUNDS = 30, 64, 5


def layers(d_model: int, d_ff: int, gated: bool) -> dict[str, sf.SparseFFNConfig]:
    """Returns the layers that are measured; the first is the dense one."""
    activation = "silu" if gated else "gelu_new"

    def layer(**parts: Any) -> sf.SparseFFNConfig:
        return sf.SparseFFNConfig(d_model, d_ff, activation, gated=gated, bias=not gated, **parts)

    def default(ratio: float) -> sf.SparseFFNConfig:
        return sf.size_ffn(d_model, d_ff, ratio, activation, gated=gated, bias=not gated)

    def narrow(ratio: float) -> sf.SparseFFNConfig:
        width = int(d_ff * ratio) // 128 * 128
        return layer(micro=sf.MicroRefinementConfig(sf.CoreConfig(width)))

    rank = d_model // 5 // 16 * 16
    return {
        "dense": default(1.0),
        "default-0.4": default(0.4),
        "default-0.25": default(0.25),
        "narrow-0.4": narrow(0.4),
        "narrow-0.25": narrow(0.25),
        f"low-rank-{rank}": layer(spectral=sf.SpectralConfig("low_rank", d_ff, rank)),
        "dft-16": layer(spectral=sf.SpectralConfig("block_circulant", d_ff, block_size=16)),
    }


def measure(config: sf.SparseFFNConfig, tokens: int, mode: str) -> tuple[float, int]:
    """Returns the seconds of one call, and the bytes of the program's temporary memory."""
    ffn = sf.SparseFFN(config, dtype=jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = (jax.random.normal(key, (tokens, config.d_model), jnp.bfloat16) for key in keys[:2])
    shapes = jax.eval_shape(ffn.init, keys[2], x)["params"]
    params = jax.tree.map(
        lambda leaf: 0.02 * jax.random.normal(keys[2], leaf.shape, jnp.bfloat16), shapes
    )

    variables: Any = {"params": params}
    if mode == "decoding":
        # As in generation: weights do not change, and are packed once.
        variables = ffn.pack(variables, tokens)

    def training(variables: Any, x: Any, g: Any) -> Any:
        return jax.vjp(ffn.apply, variables, x)[1](g)

    programs: Mapping[str, tuple[Callable[..., Any], Any, int, int]] = {
        "forward": (ffn.apply, (variables, x), _QUEUED, 1),
        "training": (training, (variables, x, g), _QUEUED, 1),
        "decoding": (chained(ffn.apply, _DECODED), (variables, x), 3, _DECODED),
    }
    function, operands, queued, calls = programs[mode]
    program = jax.jit(function).lower(*operands).compile()
    result = jax.block_until_ready(program(*operands))
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for _ in range(queued):
            result = program(*operands)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - started) / queued / calls)
    return float(np.median(seconds)), memory_of(program).temporary


def main() -> None:
    """Measures, prints a table and writes the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_layers.json"))
    parser.add_argument("--small", action="store_true", help="tiny layers, to try the script")
    arguments = parser.parse_args()
    sizes = [(768, 3072, False), (4096, 11008, True)]
    runs = [(16384, "forward"), (16384, "training")], [(8192, "forward"), (8192, "training")]
    decoding = [(1, "decoding"), (16, "decoding"), (64, "decoding")]
    if arguments.small:
        sizes, runs = [(256, 1024, False), (256, 768, True)], ([(64, "training")],) * 2
    console, rows = Console(soft_wrap=True), []
    device = jax.devices()[0].device_kind
    table = Table(title=f"FFN time on {device}, bfloat16, dense = 1", **NARROW_TABLE)
    for name in ("size", "tokens", "pass", "layer", "promised", "speed-up", "us", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.caption = "promised: by FLOPs; MiB: temporary memory of the program"
    for (d_model, d_ff, gated), passes in zip(sizes, runs, strict=True):
        configs = layers(d_model, d_ff, gated)
        for tokens, mode in [*passes, *decoding]:
            seconds: dict[str, float] = {}
            for name, config in configs.items():
                if mode == "decoding" and name.startswith(("low", "dft")):
                    continue
                seconds[name], temporary = measure(config, tokens, mode)
                row = {
                    "size": f"{d_model} x {d_ff}",
                    "tokens": tokens,
                    "pass": mode,
                    "layer": name,
                    "promised": 1.0 / sf.flops_ratio(config),
                    "speedup": seconds["dense"] / seconds[name],
                    "us": 1e6 * seconds[name],
                    "temporary_mib": temporary / 2**20,
                }
                rows.append(row)
                table.add_row(
                    *(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values())
                )
            console.print(f"{d_model} x {d_ff}, {tokens} tokens, {mode}: measured")
    console.print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"versions": versions(), "rows": rows})
    console.print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
