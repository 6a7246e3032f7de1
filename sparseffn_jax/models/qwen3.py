"""Qwen3 (Yang et al. 2025, 2505.09388), dense: a LLaMA whose queries and keys are normalised.

It has an RMSNorm over the channels of each head of queries and of keys, and biases only where the
config asks for them. Layers from ``max_window_layers`` on may see a window only.
"""

from typing import Any

from jaxtyping import Array, Float

from sparseffn_jax.models import later
from sparseffn_jax.models.gguf import GGUFLayout, GGUFModule
from sparseffn_jax.models.llama import (
    GGUF_NUMBERS,
    GGUF_SIZES,
    RMSNorm,
    gguf_attention,
    gguf_modules,
)
from sparseffn_jax.models.qwen2 import Qwen2Attention, Qwen2Block, Qwen2ForCausalLM


class Qwen3Attention(Qwen2Attention):
    """Qwen2's attention with an RMSNorm on each head of queries and keys."""

    def normalise(self, name: str, x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        """Returns normalised queries or keys, as :meth:`LlamaAttention.normalise` describes."""
        return RMSNorm(self.config.rms_norm_eps, self.dtype, self.param_dtype, name=name)(x)

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.config.attention_bias

    @property
    def use_bias(self) -> bool:
        """Whether the outputs have a bias."""
        return self.config.attention_bias


class Qwen3Block(Qwen2Block):
    """Qwen2's block, made of Qwen3's parts."""

    attention = Qwen3Attention


class Qwen3ForCausalLM(Qwen2ForCausalLM):
    """Qwen3 with a language-model head, a :class:`Decoder`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import Qwen3Config
      >>> config = Qwen3Config(
      ...     vocab_size=97, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=16,
      ...     max_position_embeddings=16
      ... )
      >>> model, ids = sf.Qwen3ForCausalLM(config), jnp.zeros((1, 8), int)
      >>> jax.eval_shape(model.init, jax.random.key(0), ids)["params"].keys() >= {"model"}
      True
    """

    config: Any

    config_class = later.config_class("Qwen3Config", "4.51")
    block = Qwen3Block
    gguf = GGUFLayout(
        architecture="qwen3",
        modules=(
            *gguf_modules(),
            GGUFModule("blk.*.attn_q_norm", "model.layers.*.self_attn.q_norm"),
            GGUFModule("blk.*.attn_k_norm", "model.layers.*.self_attn.k_norm"),
        ),
        sizes=GGUF_SIZES,
        numbers=GGUF_NUMBERS,
        derive=lambda settings: (
            gguf_attention(settings) | {"attention_bias": "blk.0.attn_q.bias" in settings.shapes}
        ),
    )
