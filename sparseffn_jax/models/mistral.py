"""Mistral (Jiang et al. 2023, 2310.06825), a LLaMA without biases and with a sliding window.

The tree is ``FlaxMistralForCausalLM``'s; its window is not: there a token sees ``sliding_window``
tokens before itself, here, as in PyTorch and in the paper, itself and ``sliding_window - 1`` more.
"""

from typing import Any

from transformers import MistralConfig

from sparseffn_jax.models.llama import (
    LlamaAttention,
    LlamaBlock,
    LlamaForCausalLM,
    LlamaMLP,
    llama_spec,
)
from sparseffn_jax.models.spec import DecoderSpec


class MistralMLP(LlamaMLP):
    """LLaMA's FFN without biases."""

    @property
    def use_bias(self) -> bool:
        """Whether there are biases, which Mistral never has."""
        return False


class MistralAttention(LlamaAttention):
    """LLaMA's attention without biases, which reaches ``sliding_window`` tokens back."""

    @property
    def use_bias(self) -> bool:
        """Whether there are biases, which Mistral never has."""
        return False

    @property
    def window(self) -> int | None:
        """How many tokens a token sees, itself included; ``None`` is all before it."""
        return self.config.sliding_window


class MistralBlock(LlamaBlock):
    """LLaMA's block, made of Mistral's parts."""

    attention = MistralAttention
    mlp = MistralMLP


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral with a language-model head, a :class:`Decoder`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import MistralConfig
      >>> config = MistralConfig(
      ...     vocab_size=97, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
      ...     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16
      ... )
      >>> model, ids = sf.MistralForCausalLM(config), jnp.zeros((1, 8), int)
      >>> jax.eval_shape(model.init, jax.random.key(0), ids)["params"].keys() >= {"model"}
      True
    """

    config_class = MistralConfig
    block = MistralBlock
    # To llama.cpp a Mistral is a LLaMA.
    gguf = LlamaForCausalLM.gguf

    @staticmethod
    def spec_of(config: Any) -> DecoderSpec:
        """Returns what a config says, as :meth:`Decoder.spec_of` describes."""
        if config.sliding_window is not None and config.sliding_window < 1:
            raise ValueError(
                f"sliding_window={config.sliding_window}: expected a positive integer, or null"
            )
        return llama_spec(config, ffn_bias=False)
