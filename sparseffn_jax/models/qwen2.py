"""Qwen2 and Qwen2.5 (Yang et al. 2024, 2407.10671; 2412.15115).

They are LLaMAs whose projections of queries, keys and values alone have biases. Layers from
``max_window_layers`` on may see a window only.
"""

from collections.abc import Hashable
from typing import Any

from transformers import Qwen2Config

from sparseffn_jax.models.gguf import GGUFLayout
from sparseffn_jax.models.llama import (
    GGUF_NUMBERS,
    GGUF_SIZES,
    LlamaAttention,
    LlamaBlock,
    LlamaForCausalLM,
    check_windows,
    gguf_attention,
    gguf_modules,
    layer_window,
    llama_spec,
)
from sparseffn_jax.models.mistral import MistralMLP
from sparseffn_jax.models.spec import DecoderSpec


class Qwen2Attention(LlamaAttention):
    """LLaMA's attention with its own biases, and a window in some layers."""

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases, which they always have."""
        return True

    @property
    def use_bias(self) -> bool:
        """Whether the outputs have a bias, which they never have."""
        return False

    @property
    def window(self) -> int | None:
        """How many tokens a token sees, itself included; ``None`` is all before it."""
        return layer_window(self.config, self.layer_index)


class Qwen2Block(LlamaBlock):
    """LLaMA's block, made of Qwen2's parts."""

    attention = Qwen2Attention
    mlp = MistralMLP


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 or Qwen2.5 with a language-model head, a :class:`Decoder`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import Qwen2Config
      >>> config = Qwen2Config(
      ...     vocab_size=97, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
      ...     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16
      ... )
      >>> model, ids = sf.Qwen2ForCausalLM(config), jnp.zeros((1, 8), int)
      >>> jax.eval_shape(model.init, jax.random.key(0), ids)["params"].keys() >= {"model"}
      True
    """

    config_class = Qwen2Config
    block = Qwen2Block
    gguf = GGUFLayout(
        # The files do not say how far a token sees: all layers see all tokens.
        architecture="qwen2",
        modules=gguf_modules(),
        sizes=GGUF_SIZES,
        numbers=GGUF_NUMBERS,
        derive=gguf_attention,
    )

    @staticmethod
    def spec_of(config: Any) -> DecoderSpec:
        """Returns what a config says, as :meth:`Decoder.spec_of` describes."""
        check_windows(config)
        return llama_spec(config, ffn_bias=False)

    @staticmethod
    def layer_kind(config: Any, layer: int) -> Hashable:
        """Returns how many tokens a token of the layer sees."""
        return layer_window(config, layer)
