"""GPT-2 (Radford et al. 2019) in Flax Linen, with the tree of ``FlaxGPT2LMHeadModel``."""

from collections.abc import Hashable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Int
from transformers import GPT2Config

from sparseffn_jax.models.decoder import FFN, Block, BlockCollection, Decoder, Dtype
from sparseffn_jax.models.gguf import GGUFExtras, GGUFLayout, GGUFModule
from sparseffn_jax.models.names import NameMap, Rule, linear_rules
from sparseffn_jax.models.spec import DecoderSpec, FFNLayout
from sparseffn_jax.nn.attention import CausalAttention
from sparseffn_jax.nn.parts import flat_dot_general, layer_norm
from sparseffn_jax.ops.activations import get_activation


class Conv1D(nn.Module):
    """GPT-2's linear map with its kernel stored as ``(out, in)``, as ``FlaxConv1D`` stores it."""

    features: int
    init_range: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = self.param(
            "kernel",
            nn.initializers.normal(self.init_range),
            (self.features, x.shape[-1]),
            self.param_dtype,
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # For one token, XLA's CPU compiler would write out a transposed kernel in every call.
        return flat_dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ()))) + bias


class GPT2MLP(nn.Module):
    """The dense feed-forward network that a :class:`SparseFFN` replaces."""

    config: GPT2Config
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T D"]:
        config = self.config
        common = (config.initializer_range, self.dtype, self.param_dtype)
        hidden = Conv1D(gpt_spec(config).d_ff, *common, name="c_fc")(x)
        hidden = get_activation(config.activation_function)(hidden)
        return Conv1D(config.n_embd, *common, name="c_proj")(hidden)


class GPT2Attention(CausalAttention):
    """Causal self-attention with one projection for queries, keys and values."""

    config: GPT2Config
    layer_index: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        attention_mask: Int[Array, "B S"] | None,
        deterministic: bool,
        init_cache: bool,
    ) -> Float[Array, "B T D"]:
        config = self.config
        common = (config.initializer_range, self.dtype, self.param_dtype)
        qkv = Conv1D(3 * config.n_embd, *common, name="c_attn")(x)
        heads = (*x.shape[:-1], config.n_head, config.n_embd // config.n_head)
        query, key, value = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        scale = query.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= self.layer_index + 1
        out = self.attend(
            query,
            key,
            value,
            attention_mask,
            deterministic,
            init_cache,
            scale=scale,
            dropout_rate=config.attn_pdrop,
        )
        out = Conv1D(config.n_embd, *common, name="c_proj")(out)
        return nn.Dropout(config.resid_pdrop)(out, deterministic=deterministic)


class GPT2Block(Block):
    """A pre-norm residual block of attention and then the layer's feed-forward module."""

    mlp = GPT2MLP

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        attention_mask: Int[Array, "B S"] | None,
        rotary_table: None,
        deterministic: bool,
        init_cache: bool,
    ) -> Float[Array, "B T D"]:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        normed = layer_norm(config, "ln_1", *dtypes)(x)
        x = x + GPT2Attention(config, self.layer_index, *dtypes, name="attn")(
            normed, attention_mask, deterministic, init_cache
        )
        y = self.feed_forward(layer_norm(config, "ln_2", *dtypes)(x))
        return x + nn.Dropout(config.resid_pdrop)(y, deterministic=deterministic)


class GPT2Model(nn.Module):
    """Embeddings, blocks and the last LayerNorm, which return hidden states ``(B, T, D)``."""

    config: GPT2Config
    ffns: tuple[FFN, ...]
    dtype: Dtype
    param_dtype: Dtype
    remat: bool

    def setup(self):
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        embed_init = nn.initializers.normal(config.initializer_range)
        embed = {"dtype": self.dtype, "param_dtype": self.param_dtype, "embedding_init": embed_init}
        self.wte = nn.Embed(config.vocab_size, config.n_embd, **embed)
        self.wpe = nn.Embed(config.n_positions, config.n_embd, **embed)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.h = BlockCollection(GPT2Block, config, self.ffns, *dtypes, self.remat)
        self.ln_f = layer_norm(config, None, *dtypes)

    def __call__(self, input_ids, attention_mask, position_ids, deterministic, init_cache):
        x, table = self.embed(input_ids, position_ids, deterministic)
        x = self.h(x, attention_mask, table, deterministic, init_cache)
        return self.ln_f(x)

    def embed(self, input_ids, position_ids, deterministic):
        """Returns what goes into the first block; GPT-2's blocks take no rotary table."""
        x = self.wte(input_ids) + self.wpe(position_ids)
        return self.dropout(x, deterministic=deterministic), None

    @property
    def token_embedding(self) -> Float[Array, "V D"]:
        """The embedding that a tied head shares."""
        return self.wte.embedding


def _gguf_extras(config: Any) -> GGUFExtras:
    """Checks that llama.cpp computes what a config says; its files hold no more of it."""
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        raise ValueError(
            f"activation_function={config.activation_function!r}: llama.cpp runs GPT-2 with "
            "gelu_new"
        )
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise ValueError(
            f"scale_attn_weights={config.scale_attn_weights}, scale_attn_by_inverse_layer_idx="
            f"{config.scale_attn_by_inverse_layer_idx}: llama.cpp has True and False"
        )
    return GGUFExtras()


class GPT2LMHeadModel(Decoder):
    """GPT-2 with a language-model head, a :class:`Decoder`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import GPT2Config
      >>> config = GPT2Config(
      ...     vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=16
      ... )
      >>> model, ids = sf.GPT2LMHeadModel(config), jnp.zeros((1, 8), int)
      >>> jax.eval_shape(model.init, jax.random.key(0), ids)["params"].keys() >= {"transformer"}
      True
    """

    config: GPT2Config

    config_class = GPT2Config
    layer_path = ("transformer", "h")
    ffn_layout = FFNLayout(up="c_fc", down="c_proj", transposed=True)
    d_ff_key = "n_inner"
    block = GPT2Block
    names = NameMap(
        # GPT-2's Conv1D keeps its weight as (in, out); FlaxConv1D, unlike other Flax layers, its
        # kernel as (out, in).
        rules=(
            Rule("transformer.wte.embedding", "transformer.wte.weight"),
            Rule("transformer.wpe.embedding", "transformer.wpe.weight"),
            Rule("transformer.h.*.ln_1.scale", "transformer.h.*.ln_1.weight"),
            *linear_rules("transformer.h.*.attn", ("c_attn", "c_proj")),
            Rule("transformer.h.*.ln_2.scale", "transformer.h.*.ln_2.weight"),
            *linear_rules("transformer.h.*.mlp", ("c_fc", "c_proj")),
            Rule("transformer.ln_f.scale", "transformer.ln_f.weight"),
            Rule("lm_head.kernel", "lm_head.weight", True),
        ),
        prefix="transformer.",
        buffers=frozenset(("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias")),
        tied=frozenset(("lm_head.kernel",)),
    )
    sharding = (
        (r"wte/embedding", ("tensor", "fsdp")),
        (r"wpe/embedding", (None, "fsdp")),
        (r"attn/c_attn/kernel", ("tensor", "fsdp")),
        (r"attn/c_attn/bias", ("tensor",)),
        (r"attn/c_proj/kernel", ("fsdp", "tensor")),
        (r"mlp/c_fc/kernel", ("tensor", "fsdp")),
        (r"mlp/c_fc/bias", ("tensor",)),
        (r"mlp/c_proj/kernel", ("fsdp", "tensor")),
        (r"lm_head/kernel", ("fsdp", "tensor")),
    )
    attention = "attn"
    norms = ("ln_1", "ln_2", "ln_f")
    gguf = GGUFLayout(
        architecture="gpt2",
        # The converter transposes what Conv1D keeps as (in, out).
        modules=(
            GGUFModule("token_embd", "transformer.wte"),
            GGUFModule("position_embd", "transformer.wpe"),
            GGUFModule("blk.*.attn_norm", "transformer.h.*.ln_1"),
            GGUFModule("blk.*.attn_qkv", "transformer.h.*.attn.c_attn", transposed=True),
            GGUFModule("blk.*.attn_output", "transformer.h.*.attn.c_proj", transposed=True),
            GGUFModule("blk.*.ffn_norm", "transformer.h.*.ln_2"),
            GGUFModule("blk.*.ffn_up", "transformer.h.*.mlp.c_fc", transposed=True),
            GGUFModule("blk.*.ffn_down", "transformer.h.*.mlp.c_proj", transposed=True),
            GGUFModule("output_norm", "transformer.ln_f"),
            GGUFModule("output", "lm_head"),
        ),
        sizes={
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
        },
        numbers={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        # GELU's tanh form, which llama.cpp computes, is GPT2Config's default.
        derive=lambda settings: {},
        describe=_gguf_extras,
    )

    def setup(self):
        self.transformer = GPT2Model(*self._body_settings())
        if not self.config.tie_word_embeddings:
            self.lm_head = self._untied_head()

    @staticmethod
    def spec_of(config: Any) -> DecoderSpec:
        """Returns what a config says, as :meth:`Decoder.spec_of` describes."""
        if config.add_cross_attention:
            raise ValueError(
                "add_cross_attention=True: this GPT-2 is a decoder alone, without an encoder to "
                "attend to; set it to False"
            )
        return gpt_spec(config)

    @staticmethod
    def layer_kind(config: Any, layer: int) -> Hashable:
        """Returns the layer's number if it scales attention."""
        return layer if config.scale_attn_by_inverse_layer_idx else None


def gpt_spec(config: Any) -> DecoderSpec:
    """Checks and returns what a config with GPT-2's keys says, as :meth:`Decoder.spec_of` does."""
    if config.n_embd % config.n_head:
        raise ValueError(f"n_head={config.n_head} does not divide n_embd={config.n_embd}")
    return DecoderSpec(
        n_layer=config.n_layer,
        n_positions=config.n_positions,
        d_model=config.n_embd,
        d_ff=config.n_inner if config.n_inner is not None else 4 * config.n_embd,
        activation=config.activation_function,
        gated=False,
        ffn_bias=True,
    )
