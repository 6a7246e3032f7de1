"""What sparse FFNs gain on the clock: a grid of configurations against the dense FFN.

Every number is a ratio to another program that took turns with it in the same run. The *promised*
speed-up is the dense FFN's FLOPs over the layer's, the *realised* share what the clock shows of it.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparseffn_jax.bench import pictures
from sparseffn_jax.bench.external import EXTERNAL
from sparseffn_jax.bench.settings import BLOCK, FFNBenchSettings, begin_report, check_known
from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.measure import records
from sparseffn_jax.measure.autotune import time_plans
from sparseffn_jax.measure.costs import flops_per_token, flops_ratio, training_flops_per_token
from sparseffn_jax.measure.flops import count_flops
from sparseffn_jax.measure.memory import program_memory
from sparseffn_jax.measure.roofline import measure_peak, roofline
from sparseffn_jax.measure.timing import PairedTimes, chained, time_pair
from sparseffn_jax.measure.trace import time_by_part
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.ops.block_sparse import block_sparse_matmul
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.sparsify.sizing import size_ffn

Mode = Literal["forward", "training", "decoding"]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Tokens decoded one after the other in one program.
_DECODED = 32
_ACTIVATION = "gelu_new"
# Times of the whole grid that are put together: a shared machine has slow minutes, and none of them
# is then one configuration's alone.
_ROUNDS = 3


def grid(d_model: int, d_ff: int) -> dict[str, SparseFFNConfig]:
    """Returns the configurations that are measured, by name.

    Args:
      d_model: number of channels in and out, a multiple of 64.
      d_ff: number of hidden units of the dense FFN, a multiple of 256.
    """

    def layer(**parts: Any) -> SparseFFNConfig:
        return SparseFFNConfig(d_model, d_ff, _ACTIVATION, **parts)

    def low_rank(rank: int, polynomial: bool = False) -> SparseFFNConfig:
        branch = SpectralConfig("low_rank", d_ff, rank)
        return layer(spectral=branch, polynomial=PolynomialConfig(4) if polynomial else None)

    def circulant(b: int, kept: float = 1.0, polynomial: bool = False) -> SparseFFNConfig:
        mask = None
        if kept < 1.0:
            frequencies = np.arange(b // 2 + 1)
            mask = tuple((frequencies < kept * len(frequencies)).tolist())
        branch = SpectralConfig("block_circulant", d_ff, block_size=b, frequency_mask=mask)
        return layer(spectral=branch, polynomial=PolynomialConfig(4) if polynomial else None)

    def core(
        width: int, up: BlockMask | None = None, down: BlockMask | None = None
    ) -> SparseFFNConfig:
        return layer(micro=MicroRefinementConfig(CoreConfig(width, up, down)))

    units = np.arange(d_ff // BLOCK) % 4 == 0
    rows = d_model // BLOCK
    whole = [
        BlockMask.from_array(np.tile(units, (rows, 1)), (BLOCK, BLOCK)),
        BlockMask.from_array(np.tile(units[:, None], (1, rows)), (BLOCK, BLOCK)),
    ]
    scattered = [unstructured_mask(rows, len(units)), unstructured_mask(len(units), rows)]
    ranks = (d_model // 12, d_model // 6, d_model // 3)
    return {
        **{f"low-rank-{rank}": low_rank(rank) for rank in ranks},
        **{f"low-rank-{rank}-polynomial": low_rank(rank, polynomial=True) for rank in ranks},
        **{f"circulant-{b}": circulant(b) for b in (8, 16, 32)},
        "circulant-16-half": circulant(16, kept=0.5),
        **{f"circulant-{b}-polynomial": circulant(b, polynomial=True) for b in (8, 16)},
        "narrow-1/4": core(d_ff // 4),
        "structured-1/4": core(d_ff, *whole),
        "unstructured-1/4": core(d_ff, *scattered),
        **{
            f"bypass-{ratio:g}": size_ffn(d_model, d_ff, ratio, _ACTIVATION, bypass=True)
            for ratio in (0.4, 0.2)
        },
    }


def unstructured_mask(rows: int, columns: int, density: float = 0.25) -> BlockMask:
    """Returns a random mask of 64 x 64 blocks that keeps equally many of them in every column.

    Args:
      rows: number of blocks in a column.
      columns: number of columns of blocks.
      density: the share of the blocks that is kept; in every column it is rounded up.
    """
    scores = np.random.default_rng(0).random((rows, columns))
    kept = np.argsort(np.argsort(scores, axis=0), axis=0) < density * rows
    return BlockMask.from_array(kept, (BLOCK, BLOCK))


def run_ffn_bench(settings: FFNBenchSettings, console: Console) -> dict[str, Any]:
    """Measures the grid; writes ``ffn.json``, ``speedups.png``, ``roofline.png``, ``parts.png``.

    Every configuration is timed in turn with the dense FFN on identical activations: forward,
    forward with backward, and decoding, one token after the other.

    Args:
      settings: which layers are measured, on what and how often.
      console: shows the progress.

    Returns:
      What ``ffn.json`` holds.

    Raises:
      ValueError: if ``out`` cannot be written to, or a configuration is not known.
    """
    configs = grid(settings.d_model, settings.d_ff)
    check_known("configurations", settings.only, configs)
    records.make_folder(settings.out)
    chosen = settings.only or tuple(configs)
    dense = configs["dense"] = size_ffn(settings.d_model, settings.d_ff, 1.0, _ACTIVATION)
    dtype = DTYPES[settings.dtype]
    peak = measure_peak(dtype)
    tokens = settings.tokens
    programs = {
        (name, mode): _program(configs[name], mode, 1 if mode == "decoding" else tokens, dtype)
        for name in track(("dense", *chosen), "compiling", console=console, transient=True)
        for mode in _MODES
    }
    times = _time_grid(programs, chosen, settings.repeats, console)
    forward = {name: times[name, "forward"] for name in chosen}
    # The dense FFN took turns with every other one: its median is over all of them.
    seconds = {
        "dense": statistics.median(x for pair in forward.values() for x in pair.baseline),
        **{name: statistics.median(pair.candidate) for name, pair in forward.items()},
    }
    rows, parts = [], {}
    for name in track(chosen, "analysing", console=console, transient=True):
        for mode in _MODES:
            rows.append(_row(name, mode, configs[name], dense, times[name, mode], settings))
        compiled, arguments = programs[name, "forward"]
        parts[name] = time_by_part(compiled, *arguments, repeats=3).seconds
    result: dict[str, Any] = {
        **begin_report(settings),
        "peak": dataclasses.asdict(peak),
        "rows": rows,
        "seconds_by_part": parts,
        "roofline": {
            name: _roofline(configs[name], tokens, peak, dtype) | {"measured_seconds": measured}
            for name, measured in seconds.items()
        },
        "pairs": _pairs(programs, chosen, settings.repeats),
        "products": _products(settings) if settings.external else {},
        "counted_flops": {name: _counted(configs[name], tokens, dtype) for name in chosen},
    }
    result["geometric_mean_realised"] = {
        mode: statistics.geometric_mean(row["realised"] for row in rows if row["mode"] == mode)
        for mode in ("forward", "training", "decoding")
    }
    records.write_json(settings.out / "ffn.json", result)
    pictures.plot_speedups(settings.out / "speedups.png", rows)
    pictures.plot_roofline(settings.out / "roofline.png", result["roofline"], peak)
    pictures.plot_parts(settings.out / "parts.png", parts)
    return result


def ffn_tables(result: Mapping[str, Any]) -> list[Table]:
    """Returns two tables of what :func:`run_ffn_bench` measured: the grid, and pairs of programs.

    Args:
      result: what :func:`run_ffn_bench` returned.
    """
    rows = result["rows"]
    grid_table = Table(
        title="FFN speed-up over dense, and the share of the promise that it realises",
        **pictures.NARROW_TABLE,
    )
    grid_table.add_column("configuration", no_wrap=True)
    for name in ("promised", "forward", "training", "decoding", "memory", "lost"):
        grid_table.add_column(name, justify="right")
    for name in dict.fromkeys(row["configuration"] for row in rows):
        by_mode = {row["mode"]: row for row in rows if row["configuration"] == name}
        cells = [name, f"{by_mode['forward']['promised']:.2f}x"]
        cells += [f"{row['speedup']:.2f}x {row['realised']:.2f}" for row in by_mode.values()]
        cells.append(f"{by_mode['training']['memory_ratio']:.2f}")
        lost = [loss for row in by_mode.values() for loss in row["plan_loss"].values()]
        cells.append(f"{max(lost) - 1:.0%}" if lost else "")
        grid_table.add_row(*cells)
    means = result["geometric_mean_realised"]
    grid_table.caption = "memory: of training, dense = 1. Geometric mean realised: " + ", ".join(
        f"{mode} {mean:.2f}" for mode, mean in means.items()
    )
    if any(row["plan_loss"] for row in rows):
        grid_table.caption += ". Lost: by the chosen plan to the best one measured"
    others = Table(title="Side by side, in the same run")
    others.add_column("programs")
    others.add_column("ratio of times", justify="right")
    for name, pair in (result["pairs"] | result["products"]).items():
        text = f"{pair['speedup']:.2f}x" if "speedup" in pair else pair["refused"]
        others.add_row(name, text)
    return [grid_table, others]


def _time_grid(programs, chosen, repeats, console) -> dict[tuple[str, Mode], PairedTimes]:
    """Times every configuration in turn with the dense FFN, the whole grid in every round."""
    each = -(-repeats // _ROUNDS)
    rounds: list[tuple[str, Mode]] = [
        (name, mode) for _ in range(_ROUNDS) for name in chosen for mode in _MODES
    ]
    times: dict[tuple[str, Mode], PairedTimes] = {}
    for name, mode in track(rounds, "measuring", console=console, transient=True):
        measured = _time(programs["dense", mode], programs[name, mode], mode, each)
        before = times.get((name, mode))
        times[name, mode] = measured if before is None else before + measured
    return times


def _row(name, mode: Mode, config, dense, times: PairedTimes, settings) -> dict[str, Any]:
    dtype = DTYPES[settings.dtype]
    tokens = 1 if mode == "decoding" else settings.tokens
    promised = 1.0 / flops_ratio(config)
    row = {
        "configuration": name,
        "mode": mode,
        "tokens": tokens,
        "promised": promised,
        "realised": times.speedup / promised,
        **times.summary(),
        "plan_loss": {},
    }
    if mode == "training":
        row["memory_ratio"] = _training_bytes(config, tokens, dtype) / _training_bytes(
            dense, tokens, dtype
        )
    if settings.all_plans:
        measured = time_plans(
            config, tokens, dtype, train=mode == "training", repeats=settings.repeats
        )
        row["plan_loss"] = {each.choice.operator: each.loss for each in measured}
        row["plans"] = {each.choice.operator: each.seconds for each in measured}
    return row


def _pairs(programs, chosen, repeats) -> dict[str, Any]:
    wanted = {
        "circulant-16 over circulant-16-half": ("circulant-16", "circulant-16-half"),
        "narrow-1/4 over structured-1/4": ("narrow-1/4", "structured-1/4"),
    }
    return {
        name: _time(
            programs[one, "forward"], programs[other, "forward"], "forward", repeats
        ).summary()
        for name, (one, other) in wanted.items()
        if {one, other} <= set(chosen)
    }


def _products(settings: FFNBenchSettings) -> dict[str, Any]:
    """Times the block-sparse product against other libraries' at the same mask and precision."""
    mask = unstructured_mask(settings.d_model // BLOCK, settings.d_ff // BLOCK)
    rng = np.random.default_rng(0)
    weight = np.asarray(rng.normal(size=mask.shape) * 0.02, np.float32)
    alive = np.kron(np.array(mask.blocks), np.ones(mask.block_shape, np.float32))
    x = np.asarray(rng.normal(size=(settings.tokens, mask.shape[0])), np.float32)
    dtype = DTYPES[settings.dtype]
    kernel = jnp.asarray(mask.compress(weight), dtype)
    ours = jax.jit(lambda x: block_sparse_matmul(x, kernel, mask))
    x_here = jnp.asarray(x, dtype)
    results: dict[str, Any] = {}
    for name, peer in EXTERNAL.items():
        label = f"{name} over block_sparse_matmul"
        if (reason := peer.refusal(settings.dtype)) is not None:
            results[label] = {"refused": reason}
            continue
        theirs = peer.product(weight * alive, x, block=BLOCK, precision=settings.dtype)
        results[label] = time_pair(theirs, lambda: ours(x_here), repeats=3).summary()
    return results


def _time(baseline, candidate, mode: Mode, repeats) -> PairedTimes:
    (dense, dense_arguments), (ours, our_arguments) = baseline, candidate
    # Short programs need more runs before their median says something.
    return time_pair(
        lambda: dense(*dense_arguments),
        lambda: ours(*our_arguments),
        repeats=repeats * (5 if mode == "decoding" else 1),
    )


def _program(config: SparseFFNConfig, mode: Mode, tokens: int, dtype) -> tuple[Any, Any]:
    layer = SparseFFN(config, dtype=dtype, param_dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (tokens, config.d_model), dtype)
    params = jax.jit(layer.init)(jax.random.key(1), x)
    if mode == "decoding":
        params = layer.pack(params, tokens)
    return jax.jit(_MODES[mode](layer)).lower(params, x).compile(), (params, x)


def _forward(layer: SparseFFN) -> Callable[..., Any]:
    return lambda params, x: layer.apply(params, x)


def training_pass(layer: SparseFFN) -> Callable[..., Any]:
    """Returns a function of parameters and inputs that returns outputs and both gradients."""

    def value_and_gradients(params: Any, x: Any) -> Any:
        y, vjp = jax.vjp(layer.apply, params, x)
        return y, vjp(x)

    return value_and_gradients


def _decoding(layer: SparseFFN) -> Callable[..., Any]:
    return chained(layer.apply, _DECODED)


_MODES: Mapping[Mode, Callable[[SparseFFN], Callable[..., Any]]] = {
    "forward": _forward,
    "training": training_pass,
    "decoding": _decoding,
}


def _training_bytes(config: SparseFFNConfig, tokens: int, dtype) -> int:
    layer = SparseFFN(config, dtype=dtype, param_dtype=dtype)
    x = jax.ShapeDtypeStruct((tokens, config.d_model), dtype)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    return program_memory(training_pass(layer), params, x).total


def _counted(config: SparseFFNConfig, tokens: int, dtype) -> dict[str, float]:
    layer = SparseFFN(config, dtype=dtype)
    x = jax.ShapeDtypeStruct((tokens, config.d_model), dtype)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    linear = {
        mode: sum(flops.values()) - flops["polynomial"]
        for mode, flops in (
            ("forward", flops_per_token(config)),
            ("training", training_flops_per_token(config)),
        )
    }
    return {
        mode: count_flops(_MODES[mode](layer), params, x).dot / (tokens * linear[mode])
        for mode in ("forward", "training")
    }


def _roofline(config: SparseFFNConfig, tokens: int, peak, dtype) -> dict[str, float]:
    bound = roofline(config, tokens, peak, dtype)
    return {
        "intensity": bound.intensity,
        "flops": bound.flops,
        "seconds": bound.seconds,
        "is_memory_bound": bound.is_memory_bound,
    }
