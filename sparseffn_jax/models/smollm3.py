"""SmolLM3 (Hugging Face, 2025): a LLaMA in which some layers have no positions.

In those layers, every fourth unless the config says otherwise, queries and keys are not rotated
(NoPE; Yang et al. 2025, 2501.18795).
"""

from collections.abc import Hashable
from typing import Any

from jaxtyping import Array, Float

from sparseffn_jax.models import later
from sparseffn_jax.models.gguf import GGUFLayout, GGUFSettings
from sparseffn_jax.models.llama import (
    GGUF_NUMBERS,
    GGUF_SIZES,
    ROPE_FREQS,
    LlamaAttention,
    LlamaBlock,
    LlamaForCausalLM,
    check_windows,
    gguf_attention,
    gguf_biases,
    gguf_modules,
    layer_window,
    llama_spec,
)
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.nn.rotary import Table


class SmolLM3Attention(LlamaAttention):
    """LLaMA's attention without positions in some layers, and with a window in some."""

    def place(self, x: Float[Array, "B T H K"], table: Table) -> Float[Array, "B T H K"]:
        """Returns queries or keys at their positions, if the layer has any."""
        rotates = self.config.no_rope_layers[self.layer_index]
        return super().place(x, table) if rotates else x

    @property
    def window(self) -> int | None:
        """How many tokens a token sees, itself included; ``None`` is all before it."""
        return layer_window(self.config, self.layer_index)


class SmolLM3Block(LlamaBlock):
    """LLaMA's block, made of SmolLM3's attention."""

    attention = SmolLM3Attention


def _gguf_config(settings: GGUFSettings) -> dict[str, Any]:
    # The files do not say which layers have no positions: llama.cpp takes every fourth.
    return gguf_attention(settings) | gguf_biases(settings) | {"no_rope_layer_interval": 4}


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """SmolLM3 with a language-model head, a :class:`Decoder`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import SmolLM3Config
      >>> config = SmolLM3Config(
      ...     vocab_size=97, hidden_size=32, intermediate_size=88, num_hidden_layers=4,
      ...     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
      ...     pad_token_id=0, bos_token_id=0, eos_token_id=0,
      ... )
      >>> model, ids = sf.SmolLM3ForCausalLM(config), jnp.zeros((1, 8), int)
      >>> jax.eval_shape(model.init, jax.random.key(0), ids)["params"].keys() >= {"model"}
      True
    """

    config: Any

    config_class = later.config_class("SmolLM3Config", "4.53")
    block = SmolLM3Block
    gguf = GGUFLayout(
        architecture="smollm3",
        modules=gguf_modules(paired=True),
        sizes=GGUF_SIZES,
        numbers=GGUF_NUMBERS,
        derive=_gguf_config,
        derived=frozenset((ROPE_FREQS,)),
    )

    @staticmethod
    def spec_of(config: Any) -> DecoderSpec:
        """Returns what a config says, as :meth:`Decoder.spec_of` describes."""
        check_windows(config)
        rotates = config.no_rope_layers
        if len(rotates) < config.num_hidden_layers or not {*rotates} <= {0, 1}:
            raise ValueError(
                f"no_rope_layers={str(rotates)[:80]}: expected, for each of num_hidden_layers="
                f"{config.num_hidden_layers}, 1 with rotary positions and 0 without"
            )
        return llama_spec(config, ffn_bias=config.mlp_bias)

    @staticmethod
    def layer_kind(config: Any, layer: int) -> Hashable:
        """Returns how many tokens a token of the layer sees, and whether it has positions."""
        return layer_window(config, layer), bool(config.no_rope_layers[layer])
