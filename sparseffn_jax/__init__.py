"""Sparse feed-forward layers for pretrained transformers, in JAX.

What this module exports is the public API; the rest may change.
"""

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.convert.checkpoint import (
    CheckpointError,
    Pretrained,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)
from sparseffn_jax.convert.export import export_dense
from sparseffn_jax.convert.warm_start import sparsify
from sparseffn_jax.demo import EMBEDDED_MODEL
from sparseffn_jax.measure.autotune import autotune
from sparseffn_jax.nn.decoder import init_cache
from sparseffn_jax.nn.generation import Sampling, generate
from sparseffn_jax.nn.gpt2 import GPT2LMHeadModel
from sparseffn_jax.nn.gptj import GPTJForCausalLM
from sparseffn_jax.nn.llama import LlamaForCausalLM
from sparseffn_jax.nn.mistral import MistralForCausalLM
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.nn.text_generation import generate_text, stream_text
from sparseffn_jax.ops.block_sparse import BlockMask
from sparseffn_jax.ops.planning import PlanTable
from sparseffn_jax.ops.planning import use as use_plans
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import TokenWindows, load_windows
from sparseffn_jax.train.guard import DivergenceError, GuardConfig
from sparseffn_jax.train.loop import Terminated, TrainResult, train
from sparseffn_jax.train.losses import evaluate_loss
from sparseffn_jax.train.strategies import make_strategy

__all__ = [
    "EMBEDDED_MODEL",
    "BlockMask",
    "CheckpointError",
    "CoreConfig",
    "DivergenceError",
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "GuardConfig",
    "LlamaForCausalLM",
    "MicroRefinementConfig",
    "MistralForCausalLM",
    "PlanTable",
    "PolynomialConfig",
    "Pretrained",
    "Sampling",
    "SparseFFN",
    "SparseFFNConfig",
    "SpectralConfig",
    "Terminated",
    "TokenWindows",
    "TrainConfig",
    "TrainResult",
    "autotune",
    "evaluate_loss",
    "export_dense",
    "generate",
    "generate_text",
    "init_cache",
    "load_pretrained",
    "load_tokenizer",
    "load_windows",
    "make_strategy",
    "save_pretrained",
    "sparsify",
    "stream_text",
    "train",
    "use_plans",
]
