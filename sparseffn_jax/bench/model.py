"""What sparse FFNs gain in a whole model: forward pass, training step and decoding."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config

from sparseffn_jax.bench.fairness import token_hash
from sparseffn_jax.bench.settings import begin_report, check_counts
from sparseffn_jax.config import SparseFFNConfig, SpectralConfig
from sparseffn_jax.measure import records
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.measure.timing import time_pair
from sparseffn_jax.models.decoder import Decoder, init_cache
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.step import init_state, make_stage, make_step

_SIZES = {"small": (768, 12, 12), "medium": (1024, 24, 16)}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_VOCABULARY = 50257


@dataclasses.dataclass(frozen=True)
class ModelBenchSettings:
    """The GPT-2 of random weights that is measured, on what and how often.

    Attributes:
      size: "small" has 124M parameters, "medium" 355M.
      layers: Number of blocks that the model is cut down to. The default is all of them.
      block_size: Side of the blocks of the block-circulant maps that replace every FFN.
      batch_size: Sequences in a batch.
      window: Tokens in a sequence.
      decoded: Tokens that are decoded with the cache, one after the other.
      dtype: Precision of the computation. The weights are float32.
      repeats: Runs of each program, which take turns with the dense model's. Medians count.
      out: Folder that model.json is written to.

    Raises:
      ValueError: on construction, if a value is out of its range.
    """

    size: Literal["small", "medium"] = "small"
    layers: int | None = None
    block_size: int = 16
    batch_size: int = 2
    window: int = 512
    decoded: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 5
    out: Path = Path("runs/bench")

    def __post_init__(self):
        check_counts(self, "block_size", "batch_size", "window", "decoded", "repeats")
        width, n_layer, _ = _SIZES[self.size]
        if width % self.block_size:
            raise ValueError(f"block_size={self.block_size} does not divide d_model={width}")
        if self.layers is not None and not 1 <= self.layers <= n_layer:
            raise ValueError(f"layers={self.layers} must lie between 1 and {n_layer}")


def run_model_bench(settings: ModelBenchSettings, console: Console) -> dict[str, Any]:
    """Times a dense and a block-circulant GPT-2 in turn on one batch; writes ``model.json``.

    Args:
      settings: which model is measured, on what and how often.
      console: shows the progress.

    Returns:
      What ``model.json`` holds.

    Raises:
      ValueError: if ``out`` cannot be written to.
    """
    records.make_folder(settings.out)
    width, n_layer, n_head = _SIZES[settings.size]
    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_positions=max(settings.window, settings.decoded + 1),
        n_embd=width,
        n_layer=settings.layers or n_layer,
        n_head=n_head,
    )
    dense = GPT2LMHeadModel(config, dtype=_DTYPES[settings.dtype])
    spec = dense.spec
    ffn = SparseFFNConfig(
        spec.d_model,
        spec.d_ff,
        spec.activation,
        spectral=SpectralConfig("block_circulant", spec.d_ff, block_size=settings.block_size),
    )
    models = (dense, dense.clone(ffns=(ffn,) * spec.n_layer))
    tokens = np.random.default_rng(0).integers(
        _VOCABULARY, size=(settings.batch_size, settings.window + 1), dtype=np.int32
    )
    result: dict[str, Any] = {
        **begin_report(settings),
        "token_hash": token_hash(tokens),
        "promised_ffn_speedup": 1.0 / flops_ratio(ffn),
        "times": {},
    }
    for name, program in (
        ("forward", _forward),
        ("training step", _training_step),
        ("decoding", _decoding),
    ):
        with console.status(f"timing {name}"):
            runs = [program(model, tokens, settings) for model in models]
            times = time_pair(*runs, repeats=settings.repeats)
        result["times"][name] = times.summary()
    records.write_json(settings.out / "model.json", result)
    return result


def model_table(result: dict[str, Any]) -> Table:
    """Returns a table of what :func:`run_model_bench` measured.

    Args:
      result: what :func:`run_model_bench` returned.
    """
    settings = result["settings"]
    table = Table(
        title=f"GPT-2 {settings['size']}, all FFNs at b = {settings['block_size']}, "
        f"{settings['batch_size']} x {settings['window']} tokens, {settings['dtype']}"
    )
    for name in ("program", "dense", "sparse", "speed-up"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for name, times in result["times"].items():
        table.add_row(
            name,
            f"{1e3 * times['baseline_seconds']:.0f} ms",
            f"{1e3 * times['candidate_seconds']:.0f} ms",
            f"{times['speedup']:.2f}x",
        )
    return table


def _fresh(model: Decoder) -> Any:
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def _forward(model: Decoder, tokens: Any, settings: ModelBenchSettings) -> Callable[[], Any]:
    run, params = jax.jit(model.apply), _fresh(model)
    inputs = jnp.asarray(tokens[:, :-1])
    return lambda: run({"params": params}, inputs)


def _training_step(model: Decoder, tokens: Any, settings: ModelBenchSettings) -> Callable[[], Any]:
    config = TrainConfig(steps=1000, batch_size=settings.batch_size, recipe="full")
    params = _fresh(model)
    stage = make_stage(config, params, 0)
    state, frozen = init_state(stage, params)
    step = make_step(model, stage, config)

    def run() -> Any:
        nonlocal state
        # The state is donated: each step goes on from the one before.
        state, metrics = step(
            state, frozen, None, tokens, np.int32(0), np.int32(0), np.float32(1.0)
        )
        return metrics

    return run


def _decoding(model: Decoder, tokens: Any, settings: ModelBenchSettings) -> Callable[[], Any]:
    params = _fresh(model)
    cache = init_cache(model, 1, settings.decoded + 1)

    @jax.jit
    def decode(params: Any, cache: Any, token: Any) -> Any:
        def one(_: Any, carry: Any) -> Any:
            cache, token = carry
            logits, state = model.apply(
                {"params": params, "cache": cache}, token, mutable=["cache"]
            )
            return state["cache"], jnp.argmax(logits[:, -1:], -1).astype(token.dtype)

        return jax.lax.fori_loop(0, settings.decoded, one, (cache, token))

    first = jnp.asarray(tokens[:1, :1])
    return lambda: decode(params, cache, first)
