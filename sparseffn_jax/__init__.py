"""Sparse feed-forward layers for pretrained transformers, in JAX.

What this module exports is the public API; the rest may change. Each name is imported when it is
first used: a layer alone needs no more than JAX and Flax.
"""

import importlib
import os
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Without NVIDIA's driver, JAX's plugin for CUDA is there as a compiler alone (measure.gpus), and
# would report on every start that it misses CUDA's libraries.
if not os.path.exists("/proc/driver/nvidia"):
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

if TYPE_CHECKING:
    from sparseffn_jax.checkpoints.adapters import load_adapter, save_adapter
    from sparseffn_jax.checkpoints.errors import CheckpointError
    from sparseffn_jax.checkpoints.export import export_dense
    from sparseffn_jax.checkpoints.gguf_export import export_gguf
    from sparseffn_jax.checkpoints.hub import push_to_hub
    from sparseffn_jax.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained
    from sparseffn_jax.checkpoints.tokenizers import load_tokenizer
    from sparseffn_jax.config import (
        CoreConfig,
        MicroRefinementConfig,
        PolynomialConfig,
        SparseFFNConfig,
        SpectralConfig,
    )
    from sparseffn_jax.defaults import EMBEDDED_MODEL
    from sparseffn_jax.evaluate.losses import evaluate_loss
    from sparseffn_jax.measure.autotune import autotune
    from sparseffn_jax.measure.costs import flops_per_token, flops_ratio
    from sparseffn_jax.models.decoder import Decoder, init_cache
    from sparseffn_jax.models.gemma3 import Gemma3ForCausalLM
    from sparseffn_jax.models.generation import Sampling, generate
    from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
    from sparseffn_jax.models.gptj import GPTJForCausalLM
    from sparseffn_jax.models.llama import LlamaForCausalLM
    from sparseffn_jax.models.mistral import MistralForCausalLM
    from sparseffn_jax.models.phi3 import Phi3ForCausalLM
    from sparseffn_jax.models.qwen2 import Qwen2ForCausalLM
    from sparseffn_jax.models.qwen3 import Qwen3ForCausalLM
    from sparseffn_jax.models.smollm3 import SmolLM3ForCausalLM
    from sparseffn_jax.models.spec import DecoderSpec
    from sparseffn_jax.models.text_generation import generate_text, stream_text
    from sparseffn_jax.nn.lora import LoraAdapter
    from sparseffn_jax.nn.sparse_ffn import SparseFFN
    from sparseffn_jax.ops.masks import BlockMask
    from sparseffn_jax.ops.plans.choice import PlanTable
    from sparseffn_jax.ops.plans.choice import use as use_plans
    from sparseffn_jax.sparsify.convert import sparsify
    from sparseffn_jax.sparsify.sizing import size_ffn
    from sparseffn_jax.train.config import TrainConfig
    from sparseffn_jax.train.data import SplitCounts, TextCounts, TokenWindows, load_windows
    from sparseffn_jax.train.guard import DivergenceError, GuardConfig
    from sparseffn_jax.train.loop import Terminated, TrainResult, train
    from sparseffn_jax.train.strategies import make_strategy

# Where each public name lives: module, and the name there if it is another.
_HOMES = {
    "EMBEDDED_MODEL": "defaults",
    "BlockMask": "ops.masks",
    "CheckpointError": "checkpoints.errors",
    "CoreConfig": "config",
    "Decoder": "models.decoder",
    "DecoderSpec": "models.spec",
    "DivergenceError": "train.guard",
    "GPT2LMHeadModel": "models.gpt2",
    "GPTJForCausalLM": "models.gptj",
    "Gemma3ForCausalLM": "models.gemma3",
    "GuardConfig": "train.guard",
    "LlamaForCausalLM": "models.llama",
    "LoraAdapter": "nn.lora",
    "MicroRefinementConfig": "config",
    "MistralForCausalLM": "models.mistral",
    "Phi3ForCausalLM": "models.phi3",
    "PlanTable": "ops.plans.choice",
    "PolynomialConfig": "config",
    "Pretrained": "checkpoints.pretrained",
    "Qwen2ForCausalLM": "models.qwen2",
    "Qwen3ForCausalLM": "models.qwen3",
    "Sampling": "models.generation",
    "SmolLM3ForCausalLM": "models.smollm3",
    "SparseFFN": "nn.sparse_ffn",
    "SparseFFNConfig": "config",
    "SpectralConfig": "config",
    "SplitCounts": "train.data",
    "Terminated": "train.loop",
    "TextCounts": "train.data",
    "TokenWindows": "train.data",
    "TrainConfig": "train.config",
    "TrainResult": "train.loop",
    "autotune": "measure.autotune",
    "evaluate_loss": "evaluate.losses",
    "export_dense": "checkpoints.export",
    "export_gguf": "checkpoints.gguf_export",
    "flops_per_token": "measure.costs",
    "flops_ratio": "measure.costs",
    "generate": "models.generation",
    "generate_text": "models.text_generation",
    "init_cache": "models.decoder",
    "load_adapter": "checkpoints.adapters",
    "load_pretrained": "checkpoints.pretrained",
    "load_tokenizer": "checkpoints.tokenizers",
    "load_windows": "train.data",
    "make_strategy": "train.strategies",
    "push_to_hub": "checkpoints.hub",
    "save_adapter": "checkpoints.adapters",
    "save_pretrained": "checkpoints.pretrained",
    "size_ffn": "sparsify.sizing",
    "sparsify": "sparsify.convert",
    "stream_text": "models.text_generation",
    "train": "train.loop",
    "use_plans": "ops.plans.choice:use",
}

__all__ = sorted([*_HOMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(types.ModuleType):
    """This package, whose functions ``train`` and ``sparsify`` share their names with packages.

    Importing a subpackage sets it as an attribute of its parent; here the public name stays.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _HOMES[name].partition(":")
        value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
