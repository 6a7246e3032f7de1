"""What sparse FFNs gain in a whole model: evaluation, training step and generation.

Beside ours runs the dense model of Hugging Face's PyTorch, on the same batches.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config

from sparseffn_jax.bench.clock import TrainingStep, step_config
from sparseffn_jax.bench.comparison import load_dense
from sparseffn_jax.bench.external import torch_refusal
from sparseffn_jax.bench.fairness import token_hash
from sparseffn_jax.bench.pytorch_model import PyTorchModel
from sparseffn_jax.bench.settings import SIZES, ModelBenchSettings, begin_report
from sparseffn_jax.config import SparseFFNConfig, SpectralConfig
from sparseffn_jax.evaluate.losses import make_evaluator
from sparseffn_jax.measure import records
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.measure.timing import PairedTimes, time_in_turn
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.models.generation import generate
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.progress import stage
from sparseffn_jax.sparsify.sizing import size_model

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_VOCABULARY = 50257
Tokens = Int[np.ndarray, "b w"]
Models = Mapping[str, Decoder]


def run_model_bench(settings: ModelBenchSettings, console: Console) -> dict[str, Any]:
    """Times a dense and a sparse model in turn on one batch; writes ``model.json``.

    Args:
      settings: which model is measured, on what and how often.
      console: shows the progress.

    Returns:
      What ``model.json`` holds.

    Raises:
      CheckpointError, FileNotFoundError, ValueError: if the model cannot be read, or the settings
        do not fit it.
    """
    records.make_folder(settings.out)
    dense, ffn = models_of(settings)
    spec = dense.spec
    models = {"dense": dense, "sparse": dense.clone(ffns=(ffn,) * spec.n_layer)}
    vocabulary: int = dense.config.vocab_size
    tokens = np.random.default_rng(0).integers(
        vocabulary, size=(settings.batch_size, settings.window + 1), dtype=np.int32
    )
    result: dict[str, Any] = {
        **begin_report(settings),
        "token_hash": token_hash(tokens),
        "ffn": ffn.to_dict(),
        "promised_ffn_speedup": 1.0 / flops_ratio(ffn),
        "times": {},
    }
    reason = torch_refusal() if settings.external else "not asked for"
    if reason is not None:
        result["pytorch"] = reason
    pytorch = None if reason is not None else PyTorchModel(dense.config, settings.dtype)
    # What an earlier process has compiled would be taken for compiled in no time.
    with stage("compiling the training step", console), _without_compilation_cache():
        steps = {
            name: TrainingStep(model, settings.batch_size, settings.window)
            for name, model in (models | _unequal(dense, settings)).items()
        }
    result["compile_seconds"] = {name: step.compile_seconds for name, step in steps.items()}
    with stage("drawing weights", console):
        params = {name: _fresh(model) for name, model in models.items()}
    programs = {
        "evaluation": partial(_evaluation, models, params, tokens, settings),
        "training step": partial(_training_steps, steps, params, tokens),
        "generation": partial(_generation, models, params, tokens, settings),
    }
    for name, ours in programs.items():
        with stage(f"timing {name}", console):
            runs = ours()
            if pytorch is not None:
                runs.append(_PYTORCH[name](pytorch, tokens, settings))
            times = time_in_turn(runs, repeats=settings.repeats)
        result["times"][name] = PairedTimes(times[0], times[1]).summary()
        if pytorch is not None:
            result["times"][name]["pytorch_seconds"] = float(np.median(times[2]))
            result["times"][name]["over_pytorch"] = {
                side: 1.0 / PairedTimes(times[2], ours).speedup
                for side, ours in zip(models, times[:2], strict=True)
            }
    records.write_json(settings.out / "model.json", result)
    return result


def model_table(result: dict[str, Any]) -> Table:
    """Returns a table of what :func:`run_model_bench` measured.

    Args:
      result: what :func:`run_model_bench` returned.
    """
    settings = result["settings"]
    table = Table(
        title=f"{settings['model'] or 'GPT-2 ' + settings['size']}, "
        f"{settings['batch_size']} x {settings['window']} tokens, "
        f"{settings['decoded']} after {settings['prompt']}, {settings['dtype']}"
    )
    for name in ("program", "dense", "sparse", "speed-up", "PyTorch, dense", "ours over PyTorch"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for name, times in result["times"].items():
        ratios = times.get("over_pytorch", {})
        table.add_row(
            name,
            f"{1e3 * times['baseline_seconds']:.0f} ms",
            f"{1e3 * times['candidate_seconds']:.0f} ms",
            f"{times['speedup']:.2f}x",
            f"{1e3 * times['pytorch_seconds']:.0f} ms" if ratios else "",
            f"{ratios['dense']:.2f}, sparse {ratios['sparse']:.2f}" if ratios else "",
        )
    seconds = result["compile_seconds"]
    table.add_row(
        "compiling the step",
        f"{seconds['dense']:.1f} s",
        f"{seconds['sparse']:.1f} s",
        f"unequal layers: {seconds['unequal']:.1f} s",
    )
    return table


def models_of(settings: ModelBenchSettings) -> tuple[Decoder, SparseFFNConfig]:
    """Returns the dense model, and the FFN that the sparse one has in every layer.

    Args:
      settings: which model is measured, and on what.

    Raises:
      CheckpointError, FileNotFoundError, ValueError: as :func:`run_model_bench`.
    """
    dense = _dense_model(settings)
    spec = dense.spec
    if (needed := max(settings.window, settings.prompt + settings.decoded)) > spec.n_positions:
        raise ValueError(
            f"window={settings.window} and prompt={settings.prompt} with decoded="
            f"{settings.decoded} need {needed} positions: the model has {spec.n_positions}"
        )
    return dense, _sparse_ffn(spec, settings)


def _dense_model(settings: ModelBenchSettings) -> Decoder:
    dtype = _DTYPES[settings.dtype]
    if settings.model is not None:
        return load_dense(settings.model).model(dtype)
    width, n_layer, n_head = SIZES[settings.size]
    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_positions=max(settings.window, settings.prompt + settings.decoded),
        n_embd=width,
        n_layer=settings.layers or n_layer,
        n_head=n_head,
    )
    return GPT2LMHeadModel(config, dtype=dtype)


def _sparse_ffn(spec: DecoderSpec, settings: ModelBenchSettings) -> SparseFFNConfig:
    if settings.circulant_block is None:
        return size_model(spec, settings.flops)
    return SparseFFNConfig(
        spec.d_model,
        spec.d_ff,
        spec.activation,
        spectral=SpectralConfig("block_circulant", spec.d_ff, block_size=settings.circulant_block),
        gated=spec.gated,
        bias=spec.ffn_bias,
    )


def _unequal(dense: Decoder, settings: ModelBenchSettings) -> dict[str, Decoder]:
    """Returns a model of which no two layers are alike, as a budget shared out by layer gives."""
    n_layer = dense.spec.n_layer
    ratios = np.minimum(1.0, settings.flops * np.linspace(0.75, 1.25, n_layer))
    return {"unequal": dense.clone(ffns=tuple(size_model(dense.spec, float(r)) for r in ratios))}


def _fresh(model: Decoder) -> Any:
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    # Whether there is a cache is found out once, unless it is reset.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _evaluation(
    models: Models, params: Mapping[str, Any], tokens: Tokens, settings: ModelBenchSettings
) -> list[Callable[[], Any]]:
    return [
        partial(make_evaluator(model), params[name], tokens, settings.batch_size)
        for name, model in models.items()
    ]


def _training_steps(
    steps: Mapping[str, TrainingStep], params: Mapping[str, Any], tokens: Tokens
) -> list[Callable[[], Any]]:
    return [steps[name].on(leaves, tokens) for name, leaves in params.items()]


def _generation(
    models: Models, params: Mapping[str, Any], tokens: Tokens, settings: ModelBenchSettings
) -> list[Callable[[], Any]]:
    prompt = _prompt(tokens, settings)
    return [
        partial(generate, model, params[name], prompt, settings.decoded)
        for name, model in models.items()
    ]


def _prompt(tokens: Tokens, settings: ModelBenchSettings) -> Tokens:
    return np.resize(tokens, (1, settings.prompt))


_PYTORCH: Mapping[str, Callable[[PyTorchModel, Tokens, ModelBenchSettings], Callable[[], Any]]] = {
    "evaluation": lambda model, tokens, settings: model.evaluation(tokens),
    "training step": lambda model, tokens, settings: model.training_step(
        tokens, step_config(settings.batch_size)
    ),
    "generation": lambda model, tokens, settings: model.generation(
        _prompt(tokens, settings), settings.decoded
    ),
}
