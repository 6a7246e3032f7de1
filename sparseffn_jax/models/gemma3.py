"""Gemma 3 (Gemma Team 2025, 2503.19786), the model of text.

Its embedding is scaled, its RMSNorms multiply by one plus their weight, and stand before and behind
attention and FFN, and on each head of queries and keys. Most layers see a window only; they have
rotary positions of their own. The FFN's gate is a GELU (GeGLU; Shazeer 2020, 2002.05202).
"""

from collections.abc import Hashable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparseffn_jax.models import later
from sparseffn_jax.models.decoder import BlockCollection
from sparseffn_jax.models.gguf import GGUFLayout, GGUFModule, GGUFSettings
from sparseffn_jax.models.llama import (
    FULL,
    GGUF_NUMBERS,
    GGUF_SIZES,
    SLIDING,
    LlamaAttention,
    LlamaBlock,
    LlamaForCausalLM,
    LlamaModel,
    RMSNorm,
    check_heads,
    check_windows,
    gguf_attention,
    gguf_modules,
    head_width,
    layer_types,
    layer_window,
)
from sparseffn_jax.models.mistral import MistralMLP
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.nn.parts import embed
from sparseffn_jax.nn.rotary import longrope_border, rope_parameters, rotary_table

# How far, in its own size, a norm's weight may be from zero and a channel's error still not be
# undone in front of it.
_DAMPING = 0.1
# In llama.cpp alone: the model of 27 billion parameters, of this many layers, has another scale.
_LAYERS_OF_27B = 62


def _norm(module: Any, name: str | None = None) -> RMSNorm:
    return RMSNorm(
        module.config.rms_norm_eps, module.dtype, module.param_dtype, offset=1.0, name=name
    )


class Gemma3MLP(MistralMLP):
    """LLaMA's FFN without biases, whose activation the config calls otherwise."""

    @property
    def activation(self) -> str:
        """The Hugging Face name of the gate's activation."""
        return self.config.hidden_activation


class Gemma3Attention(LlamaAttention):
    """LLaMA's attention with norms of queries and keys, and a window in some layers."""

    def normalise(self, name: str, x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        """Returns normalised queries or keys, as :meth:`LlamaAttention.normalise` describes."""
        return _norm(self, name)(x)

    @property
    def scale(self) -> float:
        """The factor of the attention's logits."""
        return self.config.query_pre_attn_scalar**-0.5

    @property
    def window(self) -> int | None:
        """How many tokens a token sees, itself included; ``None`` is all before it."""
        return layer_window(self.config, self.layer_index)


class Gemma3Block(LlamaBlock):
    """A residual block with a norm before and behind attention and FFN."""

    attention = Gemma3Attention
    mlp = Gemma3MLP

    def setup(self):
        self.post_feedforward_layernorm = _norm(self)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        attention_mask: Int[Array, "B S"] | None,
        table: Any,
        deterministic: bool,
        init_cache: bool,
    ) -> Float[Array, "B T D"]:
        dtypes = (self.dtype, self.param_dtype)
        attend = self.attention(self.config, self.layer_index, *dtypes, name="self_attn")
        normed = _norm(self, "input_layernorm")(x)
        # One for each kind of layers.
        table = table[layer_types(self.config)[self.layer_index]]
        attended = attend(normed, attention_mask, table, deterministic, init_cache)
        x = x + _norm(self, "post_attention_layernorm")(attended)
        normed = _norm(self, "pre_feedforward_layernorm")(x)
        return x + self.behind_ffn(self.feed_forward(normed))

    def behind_ffn(self, y: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the FFN's outputs, normalised."""
        return self.post_feedforward_layernorm(y)

    def before_norm(
        self, y: Float[Array, "*B D"], error: Float[Array, "*B D"]
    ) -> Float[Array, "*B D"]:
        """Returns ``error`` in front of the norm behind the FFN, as :class:`Block` describes.

        To first order and channel by channel. Channels that the norm all but mutes stay as they
        are, and a change of the outputs' size, which the norm takes back, is not made up for.
        """
        norm = self.post_feedforward_layernorm
        gain = 1.0 + norm.variables["params"]["weight"].astype(jnp.float32)
        size = jnp.sqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + norm.epsilon)
        damping = _DAMPING**2 * jnp.mean(jnp.square(gain))
        return error * size * gain / (jnp.square(gain) + damping)


class Gemma3Model(LlamaModel):
    """Embedding, blocks and the last norm, which return hidden states ``(B, T, D)``."""

    def setup(self):
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.embed_tokens = embed(config, *dtypes)
        self.layers = BlockCollection(self.block, config, self.ffns, *dtypes, self.remat)
        self.norm = _norm(self)

    def embed(self, input_ids, position_ids, deterministic) -> tuple[Array, Any]:
        """Returns what goes into the first block, and the rotary table of each kind of layers."""
        config, width = self.config, head_width(self.config)
        tables = {
            kind: rotary_table(position_ids, width, config, kind)
            for kind in sorted({*layer_types(config)})
        }
        # In the precision of the computation, as in PyTorch.
        scale = jnp.asarray(config.hidden_size**0.5, self.dtype)
        return self.embed_tokens(input_ids) * scale, tables


def _gguf_modules() -> tuple[GGUFModule, ...]:
    norms = {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    return (
        *(module for module in gguf_modules() if not module.name.endswith("norm")),
        *(
            GGUFModule(f"blk.*.{name}", f"model.layers.*.{target}", offset=1.0)
            for name, target in norms.items()
        ),
        GGUFModule("output_norm", "model.norm", offset=1.0),
    )


def _gguf_config(settings: GGUFSettings) -> dict[str, Any]:
    values = gguf_attention(settings)
    hidden, heads = settings.integer("embedding_length"), settings.integer("attention.head_count")
    layers, width = settings.integer("block_count"), values["head_dim"]
    window = settings.integer("attention.sliding_window", None)
    every = settings.integer("attention.sliding_window_pattern", 6)
    kinds = [SLIDING if window and (i + 1) % every else FULL for i in range(layers)]
    if cap := settings.number("final_logit_softcapping", 0.0):
        values["final_logit_softcapping"] = cap
    return values | {
        "rope_local_base_freq": settings.number("rope.freq_base_swa", 10000.0),
        "sliding_window": window,
        "layer_types": kinds,
        "query_pre_attn_scalar": hidden // heads if layers == _LAYERS_OF_27B else width,
        "attention_bias": "blk.0.attn_q.bias" in settings.shapes,
    }


class Gemma3ForCausalLM(LlamaForCausalLM):
    """Gemma 3 with a language-model head, a :class:`Decoder`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import Gemma3TextConfig
      >>> config = Gemma3TextConfig(
      ...     vocab_size=97, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=16,
      ...     max_position_embeddings=16
      ... )
      >>> model, ids = sf.Gemma3ForCausalLM(config), jnp.zeros((1, 8), int)
      >>> jax.eval_shape(model.init, jax.random.key(0), ids)["params"].keys() >= {"model"}
      True
    """

    config: Any

    config_class = later.config_class("Gemma3TextConfig", "4.50")
    body = Gemma3Model
    block = Gemma3Block
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "norm",
    )
    gguf = GGUFLayout(
        architecture="gemma3",
        modules=_gguf_modules(),
        sizes=GGUF_SIZES,
        numbers=GGUF_NUMBERS,
        derive=_gguf_config,
    )

    @staticmethod
    def spec_of(config: Any) -> DecoderSpec:
        """Returns what a config says, as :meth:`Decoder.spec_of` describes."""
        check_heads(config)
        check_windows(config)
        for kind in {*layer_types(config)}:
            rope_parameters(config, kind)
        for name in ("final_logit_softcapping", "attn_logit_softcapping"):
            if (value := getattr(config, name, None)) is not None:
                raise ValueError(f"{name}={value}: Gemma 3 has none; set it to null")
        if config.query_pre_attn_scalar <= 0:
            raise ValueError(
                f"query_pre_attn_scalar={config.query_pre_attn_scalar}: expected a positive number"
            )
        if getattr(config, "use_bidirectional_attention", False):
            raise ValueError(
                "use_bidirectional_attention=True: that is a model of embeddings, not a decoder"
            )
        return DecoderSpec(
            n_layer=config.num_hidden_layers,
            # Unlike LLaMA's, the number after scaling.
            n_positions=config.max_position_embeddings,
            d_model=config.hidden_size,
            d_ff=config.intermediate_size,
            activation=config.hidden_activation,
            gated=True,
            ffn_bias=False,
        )

    @staticmethod
    def layer_kind(config: Any, layer: int) -> Hashable:
        """Returns the kind of the layer, which has its window and its rotary positions."""
        return layer_types(config)[layer]

    @staticmethod
    def cache_border(config: Any) -> int | None:
        """Returns where LongRoPE changes the frequencies of some layers, if it does."""
        borders = (longrope_border(config, kind) for kind in layer_types(config))
        return min((border for border in borders if border is not None), default=None)
