"""GPT-J (Wang & Komatsuzaki 2021) in Flax Linen, with the tree of ``FlaxGPTJForCausalLM``.

Rotary positions turn neighbouring channels of a part of each head, attention and feed-forward
module read the same LayerNorm and run side by side, and the head has weights and a bias of its own.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int
from transformers import GPTJConfig

from sparseffn_jax.models.decoder import FFN, Block, BlockCollection, Decoder, Dtype
from sparseffn_jax.models.gpt2 import gpt_spec
from sparseffn_jax.models.names import NameMap, Rule, linear_rules
from sparseffn_jax.models.spec import DecoderSpec, FFNLayout
from sparseffn_jax.nn.attention import CausalAttention
from sparseffn_jax.nn.parts import dense, embed, layer_norm
from sparseffn_jax.nn.rotary import Table, rotary_table, rotate
from sparseffn_jax.ops.activations import get_activation


class GPTJMLP(nn.Module):
    """The dense feed-forward network that a :class:`SparseFFN` replaces."""

    config: GPTJConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T D"]:
        config = self.config
        hidden = dense(self, "fc_in", gpt_spec(config).d_ff, use_bias=True)(x)
        hidden = get_activation(config.activation_function)(hidden)
        return dense(self, "fc_out", config.n_embd, use_bias=True)(hidden)


class GPTJAttention(CausalAttention):
    """Causal self-attention with rotary positions on a head's first ``rotary_dim`` channels."""

    config: GPTJConfig
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
        config = self.config
        heads = (*x.shape[:-1], config.n_head, config.n_embd // config.n_head)
        query, key, value = (
            dense(self, name, config.n_embd)(x).reshape(heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = self.attend(
            rotate(query, table, interleaved=True),
            rotate(key, table, interleaved=True),
            value,
            attention_mask,
            deterministic,
            init_cache,
            dropout_rate=config.attn_pdrop,
        )
        return dense(self, "out_proj", config.n_embd)(out)


class GPTJBlock(Block):
    """A residual block of attention and the feed-forward module side by side."""

    mlp = GPTJMLP

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
        normed = layer_norm(config, "ln_1", *dtypes)(x)
        attended = GPTJAttention(config, *dtypes, name="attn")(
            normed, attention_mask, table, deterministic, init_cache
        )
        dropout = nn.Dropout(config.resid_pdrop, deterministic=deterministic)
        return x + dropout(attended) + dropout(self.feed_forward(normed))


class GPTJModel(nn.Module):
    """Embedding, blocks and the last LayerNorm, which return hidden states ``(B, T, D)``."""

    config: GPTJConfig
    ffns: tuple[FFN, ...]
    dtype: Dtype
    param_dtype: Dtype
    remat: bool

    def setup(self):
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.wte = embed(config, *dtypes)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.h = BlockCollection(GPTJBlock, config, self.ffns, *dtypes, self.remat)
        self.ln_f = layer_norm(config, None, *dtypes)

    def __call__(self, input_ids, attention_mask, position_ids, deterministic, init_cache):
        x, table = self.embed(input_ids, position_ids, deterministic)
        x = self.h(x, attention_mask, table, deterministic, init_cache)
        return self.ln_f(x)

    def embed(self, input_ids, position_ids, deterministic):
        """Returns what goes into the first block, and the rotary table that all blocks take."""
        table = rotary_table(position_ids, _rotary_channels(self.config))
        return self.dropout(self.wte(input_ids), deterministic=deterministic), table


class GPTJForCausalLM(Decoder):
    """GPT-J with a language-model head, a :class:`Decoder`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import GPTJConfig
      >>> config = GPTJConfig(
      ...     vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=16, rotary_dim=4
      ... )
      >>> model, ids = sf.GPTJForCausalLM(config), jnp.zeros((1, 8), int)
      >>> jax.eval_shape(model.init, jax.random.key(0), ids)["params"].keys() >= {"transformer"}
      True
    """

    config: GPTJConfig

    config_class = GPTJConfig
    layer_path = ("transformer", "h")
    ffn_layout = FFNLayout(up="fc_in", down="fc_out")
    d_ff_key = "n_inner"
    block = GPTJBlock
    names = NameMap(
        rules=(
            Rule("transformer.wte.embedding", "transformer.wte.weight"),
            Rule("transformer.h.*.ln_1.scale", "transformer.h.*.ln_1.weight"),
            *linear_rules("transformer.h.*.attn", ("q_proj", "k_proj", "v_proj", "out_proj")),
            *linear_rules("transformer.h.*.mlp", ("fc_in", "fc_out")),
            Rule("transformer.ln_f.scale", "transformer.ln_f.weight"),
            Rule("lm_head.kernel", "lm_head.weight", True),
        ),
        prefix="transformer.",
        buffers=frozenset(
            f"transformer.h.*.attn.{name}" for name in ("bias", "masked_bias", "embed_positions")
        ),
    )
    sharding = (
        (r"wte/embedding", ("tensor", "fsdp")),
        (r"attn/[qkv]_proj/kernel", ("fsdp", "tensor")),
        (r"attn/out_proj/kernel", ("tensor", "fsdp")),
        (r"mlp/fc_in/kernel", ("fsdp", "tensor")),
        (r"mlp/fc_in/bias", ("tensor",)),
        (r"mlp/fc_out/kernel", ("tensor", "fsdp")),
        (r"lm_head/kernel", ("fsdp", "tensor")),
        (r"lm_head/bias", ("tensor",)),
    )
    attention = "attn"
    norms = ("ln_1", "ln_f")

    def setup(self):
        self.transformer = GPTJModel(*self._body_settings())
        self.lm_head = self._untied_head(use_bias=True)

    @staticmethod
    def spec_of(config: Any) -> DecoderSpec:
        """Returns what a config says, as :meth:`Decoder.spec_of` describes."""
        if config.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=True: GPT-J's head has weights of its own; set it to False"
            )
        spec = gpt_spec(config)
        head = config.n_embd // config.n_head
        if _rotary_channels(config) > head:
            raise ValueError(
                f"rotary_dim={config.rotary_dim} exceeds the {head} channels of a head"
            )
        return spec


def _rotary_channels(config: GPTJConfig) -> int:
    return config.rotary_dim or config.n_embd // config.n_head
