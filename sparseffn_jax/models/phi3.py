"""Phi-3, 3.5 and 4 (Abdin et al. 2024, 2404.14219), without images and experts.

They are Mistrals of which a part of each head's channels may be rotated, by frequencies that depend
on whether a text is longer than the texts of pretraining (LongRoPE; Ding et al. 2024, 2402.13753).
Their checkpoints hold queries, keys and values as one tensor, and gate and up maps as another; in
the parameter tree they are apart, as in LLaMA's.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int
from transformers import Phi3Config

from sparseffn_jax.models.gguf import GGUFLayout, GGUFModule, GGUFSettings
from sparseffn_jax.models.llama import (
    GGUF_NUMBERS,
    GGUF_SIZES,
    LlamaForCausalLM,
    LlamaModel,
    RMSNorm,
    gguf_modules,
    head_width,
)
from sparseffn_jax.models.mistral import MistralAttention, MistralBlock, MistralForCausalLM
from sparseffn_jax.models.names import Fusion
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.nn.rotary import Table, longrope_attention_factor, rope_parameters, rotary_table

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


class Phi3Block(MistralBlock):
    """Mistral's block, with dropout of what attention and FFN add."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        attention_mask: Int[Array, "B S"] | None,
        table: Table,
        deterministic: bool,
        init_cache: bool,
    ) -> Float[Array, "B T D"]:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        dropout = nn.Dropout(config.resid_pdrop, deterministic=deterministic)
        normed = RMSNorm(config.rms_norm_eps, *dtypes, name="input_layernorm")(x)
        x = x + dropout(
            MistralAttention(config, self.layer_index, *dtypes, name="self_attn")(
                normed, attention_mask, table, deterministic, init_cache
            )
        )
        normed = RMSNorm(config.rms_norm_eps, *dtypes, name="post_attention_layernorm")(x)
        return x + dropout(self.feed_forward(normed))


class Phi3Model(LlamaModel):
    """LLaMA's stack, whose rotary table is for a part of each head's channels."""

    def embed(self, input_ids, position_ids, deterministic):
        """Returns what goes into the first block, and the rotary table that all blocks take."""
        table = rotary_table(position_ids, _rotary_channels(self.config), self.config)
        return self.embed_tokens(input_ids), table


def _rotary_channels(config: Any) -> int:
    part = rope_parameters(config).get("partial_rotary_factor")
    if part is None:  # As before transformers 5.
        part = getattr(config, "partial_rotary_factor", 1.0)
    return int(head_width(config) * part)


def _query_key_value_rows(config: Any) -> tuple[int, int, int]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = head_width(config)
    return heads * width, groups * width, groups * width


def _gate_up_rows(config: Any) -> tuple[int, int]:
    return config.intermediate_size, config.intermediate_size


def _gguf_config(settings: GGUFSettings) -> dict[str, Any]:
    hidden, heads = settings.integer("embedding_length"), settings.integer("attention.head_count")
    if hidden % heads:
        raise ValueError(
            f"phi3.attention.head_count={heads} does not divide phi3.embedding_length={hidden}"
        )
    width, positions = hidden // heads, settings.integer("context_length")
    channels = settings.integer("rope.dimension_count", width)
    if channels > width or channels % 2:
        raise ValueError(
            f"phi3.rope.dimension_count={channels}: expected an even number of the {width} "
            "channels of a head"
        )
    # 0 stands for none.
    window = settings.values.get("phi3.attention.sliding_window") or None
    original = settings.integer("rope.scaling.original_context_length", positions)
    return {
        "num_key_value_heads": settings.integer("attention.head_count_kv", heads),
        "rope_theta": settings.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": channels / width,
        "original_max_position_embeddings": original,
        "rope_scaling": _gguf_rope_scaling(settings, channels, positions, original),
        "sliding_window": window and settings.integer("attention.sliding_window"),
    }


def _gguf_rope_scaling(
    settings: GGUFSettings, channels: int, positions: int, original: int
) -> dict[str, Any] | None:
    found = [name for name in (_LONG, _SHORT) if name in settings.shapes]
    if not found:
        return None
    for name in (_LONG, _SHORT):
        if (shape := settings.shapes.get(name)) != (channels // 2,):
            raise ValueError(f"{name} has shape {shape}: expected {(channels // 2,)}")
    factor = settings.number("rope.scaling.attn_factor", 1.0)
    expected = longrope_attention_factor(positions, original)
    if not math.isclose(factor, expected, rel_tol=1e-4):
        raise ValueError(
            f"phi3.rope.scaling.attn_factor={factor}: expected {expected:.6g}, that of LongRoPE "
            f"from {original} to {positions} tokens"
        )
    long, short = (settings.read(name).astype(float).tolist() for name in (_LONG, _SHORT))
    return {"type": "longrope", "long_factor": long, "short_factor": short}


class Phi3ForCausalLM(MistralForCausalLM):
    """Phi-3, 3.5 or 4 with a language-model head, a :class:`Decoder`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import Phi3Config
      >>> config = Phi3Config(
      ...     vocab_size=97, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
      ...     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
      ...     pad_token_id=0, bos_token_id=0, eos_token_id=0,
      ... )
      >>> model, ids = sf.Phi3ForCausalLM(config), jnp.zeros((1, 8), int)
      >>> jax.eval_shape(model.init, jax.random.key(0), ids)["params"].keys() >= {"model"}
      True
    """

    config_class = Phi3Config
    body = Phi3Model
    block = Phi3Block
    names = dataclasses.replace(
        LlamaForCausalLM.names,
        fusions=(
            Fusion(
                "model.layers.*.self_attn.qkv_proj.weight",
                tuple(f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkv"),
                _query_key_value_rows,
            ),
            Fusion(
                "model.layers.*.mlp.gate_up_proj.weight",
                tuple(f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up")),
                _gate_up_rows,
            ),
        ),
    )
    gguf = GGUFLayout(
        architecture="phi3",
        modules=(
            *(
                module
                for module in gguf_modules()
                if module.name.rpartition(".")[2]
                not in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
            ),
            GGUFModule("blk.*.attn_qkv", "model.layers.*.self_attn.qkv_proj"),
            GGUFModule("blk.*.ffn_up", "model.layers.*.mlp.gate_up_proj"),
        ),
        sizes=GGUF_SIZES,
        numbers=GGUF_NUMBERS,
        derive=_gguf_config,
        derived=frozenset((_LONG, _SHORT)),
    )

    @staticmethod
    def spec_of(config: Any) -> DecoderSpec:
        """Returns what a config says, as :meth:`Decoder.spec_of` describes."""
        spec, channels = MistralForCausalLM.spec_of(config), _rotary_channels(config)
        if not 2 <= channels <= head_width(config) or channels % 2:
            raise ValueError(
                f"partial_rotary_factor gives {channels} rotary channels: expected an even number "
                f"from 2 to the {head_width(config)} channels of a head"
            )
        return spec
