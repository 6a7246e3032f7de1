"""LLaMA's training step on many H100s, compiled here: memory, communication, estimated time.

python campaigns/compiled_scale.py --out campaigns/results/compiled_scale.json

XLA compiles the library's own step for meshes of GPUs that are not there, with rematerialisation,
one window of 2048 tokens in each share of the batch. Blocks are alike: what a deep model takes
follows from two shallow ones. Bytes are set beside the formulas in communication.py.
"""

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from communication import MODELS, Plan, step_bytes
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

import sparseffn_jax as sf
from sparseffn_jax.bench.clock import step_config
from sparseffn_jax.bench.pictures import NARROW_TABLE
from sparseffn_jax.measure.gpus import gpus
from sparseffn_jax.measure.programs import Program, read_program
from sparseffn_jax.measure.records import versions, write_json
from sparseffn_jax.progress import stage
from sparseffn_jax.train.sharding import BATCH_SPEC, shardings
from sparseffn_jax.train.step import init_state, make_stage, make_update
from sparseffn_jax.train.strategies import STEP_SCALARS, MeshSharding

_WINDOW, _A_HOST = 2048, 8
_DEPTHS = 1, 2


class Size(NamedTuple):
    """A LLaMA.

    Attributes:
      layers: number of blocks.
      d_model: number of channels.
      d_ff: number of hidden units of an FFN.
      heads: number of heads.
      kv_heads: number of heads of keys and values.
    """

    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int


SIZES: Mapping[str, Size] = {
    "LLaMA 7B": Size(32, 4096, 11008, 32, 32),
    "LLaMA 2 70B": Size(80, 8192, 28672, 64, 8),
}
RUNS = (
    ("LLaMA 7B", Plan(fsdp=8)),
    ("LLaMA 7B", Plan(fsdp=64)),
    ("LLaMA 7B", Plan(fsdp=32, tensor=8)),
    ("LLaMA 2 70B", Plan(fsdp=64)),
    ("LLaMA 2 70B", Plan(fsdp=32, tensor=8)),
)


def compile_step(size: Size, layers: int, plan: Plan, flops: float) -> Program:
    """Compiles the training step of a model that is cut down to some blocks."""
    count = plan.data * plan.fsdp * plan.tensor
    devices = gpus()["h100"].devices(max(1, count // _A_HOST), min(count, _A_HOST))
    mesh = f"data={plan.data},fsdp={plan.fsdp},tensor={plan.tensor}"
    strategy = MeshSharding(mesh, list(devices.reshape(-1)))
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=size.d_model,
        intermediate_size=size.d_ff,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=_WINDOW,
    )
    ffns = ()
    if flops < 1.0:
        ffn = sf.size_ffn(size.d_model, size.d_ff, flops, "silu", gated=True, bias=False)
        ffns = (ffn,) * layers
    model = sf.LlamaForCausalLM(config, ffns=ffns, dtype=jnp.bfloat16, remat=True)
    ids = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    train = step_config(strategy.batch_shards)
    first = make_stage(train, params, 0)
    state, frozen = map(
        strategy.abstract, jax.eval_shape(functools.partial(init_state, first), params)
    )
    update = make_update(
        model, first, train, gather=strategy.gather, batch_shards=strategy.batch_shards
    )
    batch = jax.ShapeDtypeStruct(
        (strategy.batch_shards, _WINDOW + 1),
        jnp.int32,
        sharding=NamedSharding(strategy.mesh, BATCH_SPEC),
    )
    everywhere = NamedSharding(strategy.mesh, PartitionSpec())
    scalars = [jax.ShapeDtypeStruct((), x.dtype, sharding=everywhere) for x in STEP_SCALARS]
    step = jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(shardings(strategy.mesh, state), everywhere),
    )
    with strategy.tracing():
        traced = step.trace(state, frozen, None, batch, *scalars)
        return read_program(traced.lower(lowering_platforms=("cuda",)).compile())


def describe(program: Program) -> dict[str, float]:
    """Returns what is reported of a program, all of which grows evenly with its depth."""
    return {
        "state_gb": program.memory.arguments / 1e9,
        "memory_gb": program.memory.total / 1e9,
        "ms": 1e3 * gpus()["h100"].seconds(program),
        "kernels": program.launches,
        **{f"{kind} GB": sent / 1e9 for kind, sent in program.collective_bytes.items()},
    }


def deep(size: Size, plan: Plan, flops: float) -> dict[str, float]:
    """Returns what the whole model's step takes, by the difference of two shallow ones."""
    few, more = (describe(compile_step(size, layers, plan, flops)) for layers in _DEPTHS)
    beyond = (size.layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
    return {
        name: few.get(name, 0.0) + beyond * (more.get(name, 0.0) - few.get(name, 0.0))
        for name in few | more
    }


def main() -> None:
    """Compiles, prints a table and writes the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compiled_scale.json"))
    parser.add_argument("--flops", type=float, default=0.4, help="of the sparse model's FFNs")
    parser.add_argument("--runs", type=int, nargs="*", help="numbers of the runs; default all")
    arguments = parser.parse_args()
    console, rows = Console(soft_wrap=True), []
    table = Table(title="Training steps compiled for H100s, estimated", **NARROW_TABLE)
    for name in ("model", "mesh", "FFNs", "GB", "sent GB", "formula GB", "ms", "kernels"):
        table.add_column(name, justify="right", no_wrap=True)
    table.caption = "GB: memory of a GPU; sent: by a GPU in a step; ms: estimated, not measured"
    for number, (name, plan) in enumerate(RUNS):
        if arguments.runs is not None and number not in arguments.runs:
            continue
        size, mesh = SIZES[name], f"fsdp={plan.fsdp},tensor={plan.tensor}"
        for kind, flops in (("dense", 1.0), ("sparse", arguments.flops)):
            with stage(f"compiling {name} on {mesh}, {kind}", console):
                found = deep(size, plan, flops)
            row: dict[str, Any] = {"model": name, "mesh": mesh, "ffns": kind, **found}
            row["sent_gb"] = sum(x for key, x in found.items() if key.endswith(" GB"))
            formula = step_bytes(MODELS[name], plan, _WINDOW, flops)
            row["formula_gb"] = sum(formula.values()) / 1e9
            rows.append(row)
            cells = (row[key] for key in ("memory_gb", "sent_gb", "formula_gb", "ms"))
            table.add_row(
                *(name, mesh, kind), *(f"{x:.1f}" for x in cells), f"{found['kernels']:.0f}"
            )
    console.print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"versions": versions(), "rows": rows})
    console.print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
