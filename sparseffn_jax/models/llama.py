"""LLaMA (Touvron et al. 2023) in Flax Linen, with the tree of ``FlaxLlamaForCausalLM``.

It has RMSNorm, rotary positions on halves of each head, grouped-query attention, and a gated
feed-forward network (SwiGLU; Shazeer 2020, 2002.05202). It honours what the Flax class does not:
``rope_theta``, ``rope_scaling``, ``head_dim``, ``mlp_bias`` and tied embeddings.

Families that differ from it in a few points are subclasses: they override the properties of
:class:`LlamaAttention` and :class:`LlamaMLP` that say what is there, and its few methods.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from transformers import LlamaConfig

from sparseffn_jax.models.decoder import FFN, Block, BlockCollection, Decoder, Dtype
from sparseffn_jax.models.gguf import GGUFExtras, GGUFLayout, GGUFModule, GGUFSettings
from sparseffn_jax.models.names import NameMap, Rule, linear_rules
from sparseffn_jax.models.spec import DecoderSpec, FFNLayout
from sparseffn_jax.nn.attention import CausalAttention
from sparseffn_jax.nn.parts import dense, embed
from sparseffn_jax.nn.rotary import (
    Table,
    llama3_divisors,
    llama3_scaling,
    longrope_border,
    rope_parameters,
    rope_positions,
    rotary_table,
    rotate,
)
from sparseffn_jax.ops.activations import get_activation

# The tensor in which GGUF files have LLaMA 3's scaling of the rotary frequencies.
ROPE_FREQS = "rope_freqs.weight"
# The kinds of layers in a config's ``layer_types``: tokens see all before them, or a window.
FULL, SLIDING = "full_attention", "sliding_attention"


class RMSNorm(nn.Module):
    """Scales to a root mean square of one (Zhang & Sennrich 2019, 1910.07467), in float32.

    Attributes:
      epsilon: what is added to the mean square.
      dtype: the dtype of the outputs.
      param_dtype: the dtype of the weight.
      offset: what is added to the weight.
    """

    epsilon: float
    dtype: Dtype
    param_dtype: Dtype
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        start = nn.initializers.constant(1.0 - self.offset)
        weight = self.param("weight", start, (x.shape[-1],), self.param_dtype)
        if self.offset:
            weight = weight.astype(jnp.float32) + self.offset
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * weight).astype(self.dtype)


class LlamaMLP(nn.Module):
    """The dense gated feed-forward network that a gated :class:`SparseFFN` replaces."""

    config: Any
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T D"]:
        config, use_bias = self.config, self.use_bias
        gate = dense(self, "gate_proj", config.intermediate_size, use_bias)(x)
        up = dense(self, "up_proj", config.intermediate_size, use_bias)(x)
        hidden = get_activation(self.activation)(gate) * up
        return dense(self, "down_proj", config.hidden_size, use_bias)(hidden)

    @property
    def activation(self) -> str:
        """The Hugging Face name of the gate's activation."""
        return self.config.hidden_act

    @property
    def use_bias(self) -> bool:
        """Whether the maps have biases."""
        return self.config.mlp_bias


class LlamaAttention(CausalAttention):
    """Causal self-attention in which groups of heads share keys and values (2305.13245)."""

    config: Any
    layer_index: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        attention_mask: Int[Array, "B S"] | None,
        table: Table,
        deterministic: bool,
        init_cache: bool,
    ) -> Float[Array, "B T D"]:
        config, width = self.config, head_width(self.config)

        def heads(name, count):
            out = dense(self, name, count * width, self.qkv_bias)(x)
            return out.reshape(*x.shape[:-1], count, width)

        query = self.normalise("q_norm", heads("q_proj", config.num_attention_heads))
        key = self.normalise("k_norm", heads("k_proj", config.num_key_value_heads))
        value = heads("v_proj", config.num_key_value_heads)
        out = self.attend(
            self.place(query, table),
            self.place(key, table),
            value,
            attention_mask,
            deterministic,
            init_cache,
            scale=self.scale,
            dropout_rate=config.attention_dropout,
            window=self.window,
        )
        return dense(self, "o_proj", config.hidden_size, self.use_bias)(out)

    def normalise(self, name: str, x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        """Returns queries or keys as they are to be rotated; LLaMA has no norm for them.

        Args:
          name: the name of the norm, ``"q_norm"`` or ``"k_norm"``.
          x: the queries or keys.
        """
        del name
        return x

    def place(self, x: Float[Array, "B T H K"], table: Table) -> Float[Array, "B T H K"]:
        """Returns queries or keys at their positions."""
        return rotate(x, table, interleaved=False)

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections of queries, keys and values have biases."""
        return self.use_bias

    @property
    def use_bias(self) -> bool:
        """Whether the projection of the outputs has a bias."""
        return self.config.attention_bias

    @property
    def scale(self) -> float | None:
        """The factor of the attention's logits; ``None`` is one over the root of a head's width."""
        return None

    @property
    def window(self) -> int | None:
        """How many tokens a token sees, itself included; ``None`` is all before it."""
        return None


class LlamaBlock(Block):
    """A pre-norm residual block of attention and then the layer's feed-forward module."""

    attention: ClassVar[type[LlamaAttention]] = LlamaAttention
    mlp = LlamaMLP

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
        normed = RMSNorm(config.rms_norm_eps, *dtypes, name="input_layernorm")(x)
        x = x + self.attention(config, self.layer_index, *dtypes, name="self_attn")(
            normed, attention_mask, table, deterministic, init_cache
        )
        normed = RMSNorm(config.rms_norm_eps, *dtypes, name="post_attention_layernorm")(x)
        return x + self.feed_forward(normed)


class LlamaModel(nn.Module):
    """Embedding, blocks and the last RMSNorm, which return hidden states ``(B, T, D)``."""

    block: type[Block]
    config: Any
    ffns: tuple[FFN, ...]
    dtype: Dtype
    param_dtype: Dtype
    remat: bool

    def setup(self):
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.embed_tokens = embed(config, *dtypes)
        self.layers = BlockCollection(self.block, config, self.ffns, *dtypes, self.remat)
        self.norm = RMSNorm(config.rms_norm_eps, *dtypes)

    def __call__(self, input_ids, attention_mask, position_ids, deterministic, init_cache):
        x, table = self.embed(input_ids, position_ids, deterministic)
        x = self.layers(x, attention_mask, table, deterministic, init_cache)
        return self.norm(x)

    def embed(self, input_ids, position_ids, deterministic):
        """Returns what goes into the first block, and the rotary table that all blocks take."""
        table = rotary_table(position_ids, head_width(self.config), self.config)
        return self.embed_tokens(input_ids), table

    @property
    def token_embedding(self) -> Float[Array, "V D"]:
        """The embedding that a tied head shares."""
        return self.embed_tokens.embedding


def gguf_attention(settings: GGUFSettings) -> dict[str, Any]:
    """Returns what a LLaMA-like config says of heads and rotary positions, from a GGUF file."""
    arch = settings.architecture
    hidden, heads = settings.integer("embedding_length"), settings.integer("attention.head_count")
    if hidden % heads and not settings.has("attention.key_length"):
        raise ValueError(
            f"{arch}.attention.head_count={heads} does not divide {arch}.embedding_length={hidden}"
        )
    width = settings.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := settings.integer(key, width)) != width:
            raise ValueError(
                f"{arch}.{key}={other} differs from the {width} channels of a head: such models "
                f"are not {arch} as transformers has it"
            )
    if experts := settings.values.get(f"{arch}.expert_count"):
        raise ValueError(
            f"{arch}.expert_count is {str(experts)[:80]}: mixtures of experts are not read, only "
            "dense models"
        )
    theta = settings.number("rope.freq_base", 10000.0)
    return {
        "num_key_value_heads": settings.integer("attention.head_count_kv", heads),
        "head_dim": width,
        "rope_theta": theta,
        "rope_scaling": _gguf_rope_scaling(settings, theta, width),
    }


def _gguf_rope_scaling(
    settings: GGUFSettings, theta: float, width: int
) -> dict[str, str | float] | None:
    # What files were written with before there was rope.scaling.
    factor = settings.number("rope.scale_linear", 1.0)
    kind = settings.text("rope.scaling.type", "none" if factor == 1 else "linear")
    has_freqs = ROPE_FREQS in settings.shapes
    if kind not in ("none", "linear") or (kind == "linear" and has_freqs):
        raise ValueError(
            f"{settings.architecture}.rope.scaling.type={kind[:80]!r}"
            f"{' beside ' + ROPE_FREQS if has_freqs else ''}"
            ": expected none or linear, or LLaMA 3's scaling in that tensor alone"
        )
    if kind == "linear":
        return {"rope_type": kind, "factor": settings.number("rope.scaling.factor", factor)}
    if not has_freqs:
        return None
    if (shape := settings.shapes[ROPE_FREQS]) != (width // 2,):
        raise ValueError(f"{ROPE_FREQS} has shape {shape}: expected {(width // 2,)}")
    return llama3_scaling(settings.read(ROPE_FREQS), theta)


def gguf_biases(settings: GGUFSettings) -> dict[str, bool]:
    """Returns what a LLaMA's config says of biases, from the tensors of a GGUF file."""
    return {
        "attention_bias": "blk.0.attn_q.bias" in settings.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in settings.shapes,
    }


GGUF_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
GGUF_NUMBERS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}


def gguf_modules(paired: bool = False) -> tuple[GGUFModule, ...]:
    """Returns how GGUF files call the modules of a LLaMA.

    Args:
      paired: whether rows that a rotary position turns together are neighbours in the files.
    """
    query, key = ("num_attention_heads", "num_key_value_heads") if paired else (None, None)
    return (
        GGUFModule("token_embd", "model.embed_tokens"),
        GGUFModule("blk.*.attn_norm", "model.layers.*.input_layernorm"),
        GGUFModule("blk.*.attn_q", "model.layers.*.self_attn.q_proj", heads=query),
        GGUFModule("blk.*.attn_k", "model.layers.*.self_attn.k_proj", heads=key),
        GGUFModule("blk.*.attn_v", "model.layers.*.self_attn.v_proj"),
        GGUFModule("blk.*.attn_output", "model.layers.*.self_attn.o_proj"),
        GGUFModule("blk.*.ffn_norm", "model.layers.*.post_attention_layernorm"),
        GGUFModule("blk.*.ffn_gate", "model.layers.*.mlp.gate_proj"),
        GGUFModule("blk.*.ffn_up", "model.layers.*.mlp.up_proj"),
        GGUFModule("blk.*.ffn_down", "model.layers.*.mlp.down_proj"),
        GGUFModule("output_norm", "model.norm"),
        GGUFModule("output", "lm_head"),
    )


def _gguf_extras(config: Any) -> GGUFExtras:
    """Returns what a GGUF file holds of a LLaMA's config beyond what all of them name alike."""
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act={config.hidden_act!r}: llama.cpp runs such FFNs with silu")
    rope, width = rope_parameters(config), head_width(config)
    settings: dict[str, Any] = {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    # The format has no window here: within one, no token is out of sight.
    if (window := getattr(config, "sliding_window", None)) is not None:
        settings["context_length"] = min(window, config.max_position_embeddings)
    if rope["rope_type"] == "linear":
        settings |= {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(rope["factor"]),
        }
    elif rope["rope_type"] == "llama3":
        return GGUFExtras(settings, {ROPE_FREQS: llama3_divisors(width, rope)})
    elif rope["rope_type"] != "default":
        raise ValueError(
            f"rope_type={rope['rope_type']!r}: llama.cpp has default, linear and llama3"
        )
    return GGUFExtras(settings)


class LlamaForCausalLM(Decoder):
    """LLaMA with a language-model head, a :class:`Decoder`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import LlamaConfig
      >>> config = LlamaConfig(
      ...     vocab_size=97, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
      ...     num_attention_heads=4, max_position_embeddings=16
      ... )
      >>> model, ids = sf.LlamaForCausalLM(config), jnp.zeros((1, 8), int)
      >>> jax.eval_shape(model.init, jax.random.key(0), ids)["params"].keys() >= {"model"}
      True
    """

    config: Any

    body: ClassVar[type[LlamaModel]] = LlamaModel
    config_class = LlamaConfig
    layer_path = ("model", "layers")
    ffn_layout = FFNLayout(up="up_proj", down="down_proj", gate="gate_proj")
    d_ff_key = "intermediate_size"
    ffn_bias_key = "mlp_bias"
    block = LlamaBlock
    names = NameMap(
        rules=(
            Rule("model.embed_tokens.embedding", "model.embed_tokens.weight"),
            *linear_rules("model.layers.*.self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
            *linear_rules("model.layers.*.mlp", ("gate_proj", "up_proj", "down_proj")),
            Rule("lm_head.kernel", "lm_head.weight", True),
        ),
        prefix="model.",
        buffers=frozenset(("model.layers.*.self_attn.rotary_emb.inv_freq",)),
        tied=frozenset(("lm_head.kernel",)),
    )
    sharding = (
        (r"embed_tokens/embedding", ("tensor", "fsdp")),
        (r"self_attn/[qkv]_proj/kernel", ("fsdp", "tensor")),
        (r"self_attn/[qkv]_proj/bias", ("tensor",)),
        (r"self_attn/o_proj/kernel", ("tensor", "fsdp")),
        (r"mlp/(gate|up)_proj/kernel", ("fsdp", "tensor")),
        (r"mlp/(gate|up)_proj/bias", ("tensor",)),
        (r"mlp/down_proj/kernel", ("tensor", "fsdp")),
        (r"lm_head/kernel", ("fsdp", "tensor")),
    )
    attention = "self_attn"
    norms = ("input_layernorm", "post_attention_layernorm", "norm")
    gguf = GGUFLayout(
        # Mistral's files say so too. They do not say how far a token sees, and are read as LLaMA.
        architecture="llama",
        modules=gguf_modules(paired=True),
        sizes=GGUF_SIZES,
        numbers=GGUF_NUMBERS,
        derive=lambda settings: gguf_attention(settings) | gguf_biases(settings),
        derived=frozenset((ROPE_FREQS,)),
        describe=_gguf_extras,
        per_layer="deci",
        ffn_bias=True,
    )

    def setup(self):
        self.model = self.body(self.block, *self._body_settings())
        if not self.config.tie_word_embeddings:
            self.lm_head = self._untied_head()

    @staticmethod
    def spec_of(config: Any) -> DecoderSpec:
        """Returns what a config says, as :meth:`Decoder.spec_of` describes."""
        return llama_spec(config, ffn_bias=config.mlp_bias)

    @staticmethod
    def cache_border(config: Any) -> int | None:
        """Returns where LongRoPE changes its frequencies, if the config has it."""
        return longrope_border(config)


def llama_spec(config: Any, ffn_bias: bool) -> DecoderSpec:
    """Checks and returns what a LLaMA-like config says, as :meth:`Decoder.spec_of` does."""
    check_heads(config)
    return DecoderSpec(
        n_layer=config.num_hidden_layers,
        n_positions=rope_positions(config),
        d_model=config.hidden_size,
        d_ff=config.intermediate_size,
        activation=config.hidden_act,
        gated=True,
        ffn_bias=ffn_bias,
    )


def check_heads(config: Any) -> None:
    """Checks what a LLaMA-like config says of its heads.

    Raises:
      ValueError: if groups of heads are not alike, or a head cannot be rotated.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise ValueError(
            f"num_key_value_heads={groups} does not divide num_attention_heads={heads}"
        )
    if head_width(config) % 2:
        raise ValueError(f"head_dim={head_width(config)}: rotary positions need an even number")


def head_width(config: Any) -> int:
    """Returns a head's channels: ``head_dim``, or each head's share of ``hidden_size``."""
    width = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def layer_types(config: Any) -> list[str]:
    """Returns the kind of every layer: ``FULL``, or ``SLIDING`` with a window."""
    if (kinds := getattr(config, "layer_types", None)) is not None:
        return kinds
    # As before transformers 4.53.
    layers = range(config.num_hidden_layers)
    if pattern := getattr(config, "sliding_window_pattern", None):
        return [SLIDING if (i + 1) % pattern else FULL for i in layers]
    first = config.max_window_layers if config.use_sliding_window else config.num_hidden_layers
    return [SLIDING if i >= first else FULL for i in layers]


def layer_window(config: Any, layer: int) -> int | None:
    """Returns how many tokens a token of a layer sees, itself included; ``None`` is all."""
    return config.sliding_window if layer_types(config)[layer] == SLIDING else None


def check_windows(config: Any) -> None:
    """Checks what a config says of its layers' windows.

    Raises:
      ValueError: if ``layer_types`` does not name a known kind for each layer, or layers have a
        window and ``sliding_window`` is no positive integer.
    """
    kinds, window = layer_types(config), config.sliding_window
    if len(kinds) != config.num_hidden_layers or not {*kinds} <= {SLIDING, FULL}:
        raise ValueError(
            f"layer_types={str(kinds)[:80]}: expected {FULL} or {SLIDING} for each of "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    if SLIDING in kinds and (window is None or window < 1):
        raise ValueError(f"sliding_window={window}: {SLIDING} needs a positive integer")
