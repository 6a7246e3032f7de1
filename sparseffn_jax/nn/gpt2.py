"""GPT-2 (Radford et al. 2019) in Flax Linen, with a pluggable feed-forward layer.

The parameter tree has the names, shapes and layouts of ``FlaxGPT2LMHeadModel`` in
transformers 4.57, so that a tree from there applies unchanged. Shape letters in comments
and names: B batch, T tokens, S cached tokens, H heads, K head width, D ``n_embd``.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int
from transformers import GPT2Config

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.ops.activations import get_activation
from sparseffn_jax.ops.block_sparse import matmul

Dtype = Any
FFN = SparseFFNConfig | Callable[..., nn.Module] | None


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
        return matmul(x, kernel.T) + bias


class GPT2MLP(nn.Module):
    """The dense feed-forward network that a :class:`SparseFFN` replaces."""

    config: GPT2Config
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T D"]:
        config = self.config
        common = (config.initializer_range, self.dtype, self.param_dtype)
        hidden = Conv1D(d_ff(config), *common, name="c_fc")(x)
        hidden = get_activation(config.activation_function)(hidden)
        return Conv1D(config.n_embd, *common, name="c_proj")(hidden)


class GPT2Attention(nn.Module):
    """Causal self-attention with an optional key/value cache in the ``cache`` collection."""

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

        is_decoding = self.has_variable("cache", "cached_key")
        # None stands for the plain causal mask, which attention has a faster way to apply.
        mask = None
        if is_decoding or init_cache:
            key, value, mask = self._update_cache(query, key, value, is_decoding)
        if attention_mask is not None:
            if attention_mask.shape != key.shape[:2]:
                raise ValueError(
                    f"attention_mask has shape {attention_mask.shape}, expected {key.shape[:2]}: "
                    "one entry for each key, cached ones included"
                )
            causal = _causal_mask(x.shape[1]) if mask is None else mask
            mask = causal & attention_mask[:, None, None, :].astype(bool)

        scale = query.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= self.layer_index + 1
        if config.attn_pdrop > 0.0 and not deterministic:
            # jax.nn.dot_product_attention has no dropout on the attention weights.
            out = nn.dot_product_attention(
                query * (scale * query.shape[-1] ** 0.5),
                key,
                value,
                mask=_causal_mask(x.shape[1]) if mask is None else mask,
                dropout_rng=self.make_rng("dropout"),
                dropout_rate=config.attn_pdrop,
                broadcast_dropout=False,
                deterministic=False,
                force_fp32_for_softmax=True,
            )
        else:
            out = jax.nn.dot_product_attention(
                query, key, value, mask=mask, scale=scale, is_causal=mask is None
            )
        out = Conv1D(config.n_embd, *common, name="c_proj")(out.reshape(x.shape))
        return nn.Dropout(config.resid_pdrop)(out, deterministic=deterministic)

    def _update_cache(self, query, key, value, is_decoding):
        """Writes T new positions into the cache; returns its keys, values and causal mask."""
        cached_key = self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
        index = self.variable("cache", "cache_index", lambda: jnp.array(0, jnp.int32))
        if not is_decoding:
            return key, value, None
        start, tokens, length = index.value, query.shape[1], cached_key.value.shape[1]
        if tokens > length:
            raise ValueError(f"{tokens} tokens do not fit a cache of {length}")
        place = (0, start, 0, 0)
        cached_key.value = jax.lax.dynamic_update_slice(cached_key.value, key, place)
        cached_value.value = jax.lax.dynamic_update_slice(cached_value.value, value, place)
        index.value = start + tokens
        positions = start + jnp.arange(tokens)
        mask = jnp.arange(length)[None, :] <= positions[:, None]
        return cached_key.value, cached_value.value, mask[None, None]


class GPT2Block(nn.Module):
    """Pre-norm residual block: attention, then the layer's feed-forward module."""

    config: GPT2Config
    layer_index: int
    ffn: FFN
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
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        normed = _layer_norm(config, "ln_1", *dtypes)(x)
        x = x + GPT2Attention(config, self.layer_index, *dtypes, name="attn")(
            normed, attention_mask, deterministic, init_cache
        )
        normed = _layer_norm(config, "ln_2", *dtypes)(x)
        # Costs nothing unless a caller makes the collection mutable (calibration does).
        self.sow("intermediates", "ffn_input", normed)
        with jax.named_scope("ffn"):
            y = _make_ffn(self.ffn, config, *dtypes)(normed)
        return x + nn.Dropout(config.resid_pdrop)(y, deterministic=deterministic)


class GPT2BlockCollection(nn.Module):
    """The stack of blocks, named ``0``, ``1``, ... as in FlaxGPT2."""

    config: GPT2Config
    ffns: tuple[FFN, ...]
    dtype: Dtype
    param_dtype: Dtype
    remat: bool

    @nn.compact
    def __call__(self, x, attention_mask, deterministic, init_cache):
        # Static arguments are counted with `self` as number 0.
        block = nn.remat(GPT2Block, static_argnums=(3, 4)) if self.remat else GPT2Block
        for i, ffn in enumerate(self.ffns):
            x = block(self.config, i, ffn, self.dtype, self.param_dtype, name=str(i))(
                x, attention_mask, deterministic, init_cache
            )
            self.sow("intermediates", "hidden_states", x)
        return x


class GPT2Model(nn.Module):
    """Embeddings, blocks and the last LayerNorm; returns hidden states ``(B, T, D)``."""

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
        self.h = GPT2BlockCollection(config, self.ffns, *dtypes, self.remat)
        self.ln_f = _layer_norm(config, None, *dtypes)

    def __call__(self, input_ids, attention_mask, position_ids, deterministic, init_cache):
        x = self.wte(input_ids) + self.wpe(position_ids)
        x = self.dropout(x, deterministic=deterministic)
        x = self.h(x, attention_mask, deterministic, init_cache)
        return self.ln_f(x)


class GPT2LMHeadModel(nn.Module):
    """GPT-2 with a language-model head.

    Attributes:
      config: a ``transformers.GPT2Config``; every field that changes numbers is honoured.
      ffns: one entry a layer: ``None`` keeps the dense FFN, a ``SparseFFNConfig`` puts a
        ``SparseFFN`` there, and any callable is called with ``name``, ``dtype`` and
        ``param_dtype`` and returns the module to use, which maps ``(B, T, D)`` to ``(B, T, D)``.
        The empty tuple keeps every layer dense.
      dtype: of the computation. LayerNorm statistics, softmax and logits are float32 always.
      param_dtype: of the parameters.
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: GPT2Config
    ffns: tuple[FFN, ...] = ()
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False

    def setup(self):
        config = self.config
        _check_config(config)
        if self.ffns and len(self.ffns) != config.n_layer:
            raise ValueError(
                f"ffns has {len(self.ffns)} entries, but the model has n_layer={config.n_layer}: "
                "give one entry a layer (None keeps a layer dense), or an empty tuple"
            )
        ffns = self.ffns or (None,) * config.n_layer
        self.transformer = GPT2Model(config, ffns, self.dtype, self.param_dtype, self.remat)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Dense(
                config.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.normal(config.initializer_range),
                dot_general=_dot_general_f32,
            )

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
        init_cache: bool = False,
    ) -> Float[Array, "B T V"]:
        """Returns next-token logits in float32.

        Args:
          input_ids: token ids below ``vocab_size``.
          attention_mask: 1 for real tokens, 0 for padding; over the whole cache (S = its
            length) when decoding, else S = T. ``None`` means no padding.
          position_ids: positions below ``n_positions``. By default they count from 0, or from
            the cache's end when there is one; left padding needs them given.
          deterministic: ``False`` applies the config's dropout (needs an rng ``"dropout"``).
          init_cache: create the key/value cache; see :func:`init_cache`.

        Raises:
          ValueError: if the config asks for what this model does not have, if ``ffns`` has not
            one entry a layer, if the tokens exceed ``n_positions`` or the cache, or if
            ``attention_mask`` does not cover the keys.
        """
        if input_ids.shape[1] > self.config.n_positions:
            raise ValueError(
                f"{input_ids.shape[1]} tokens do not fit n_positions={self.config.n_positions}"
            )
        if position_ids is None:
            start = self._cached_tokens()
            position_ids = jnp.broadcast_to(start + jnp.arange(input_ids.shape[1]), input_ids.shape)
        x = self.transformer(input_ids, attention_mask, position_ids, deterministic, init_cache)
        if not self.config.tie_word_embeddings:
            return self.lm_head(x)
        x, embedding = promote_dtype(x, self.transformer.wte.embedding, dtype=self.dtype)
        return _dot_general_f32(x, embedding, (((2,), (1,)), ((), ())))

    def _cached_tokens(self) -> Int[Array, ""] | int:
        cache = self.variables.get("cache")
        # Every layer's cache holds the same positions.
        return cache["transformer"]["h"]["0"]["attn"]["cache_index"] if cache else 0


def init_cache(model: GPT2LMHeadModel, batch_size: int, max_length: int) -> dict[str, Any]:
    """Returns an empty key/value cache for ``batch_size`` sequences of ``max_length`` tokens.

    Pass it as ``model.apply({"params": p, "cache": cache}, ..., mutable=["cache"])``. How many
    positions are written is tracked inside; writing more than ``max_length`` in all is not
    detected.

    Raises:
      ValueError: if ``max_length`` exceeds the model's ``n_positions``.
    """
    if max_length > model.config.n_positions:
        raise ValueError(
            f"a cache of {max_length} tokens exceeds n_positions={model.config.n_positions}: "
            "shorten the prompt or generate fewer tokens"
        )
    ids = jax.ShapeDtypeStruct((batch_size, max_length), jnp.int32)
    shapes = jax.eval_shape(
        lambda key, ids: model.init(key, ids, init_cache=True), jax.random.key(0), ids
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["cache"])


def ffn_module(model: GPT2LMHeadModel, layer: int) -> nn.Module:
    """Returns one layer's FFN as a module of its own, to apply to that layer's ``mlp`` leaves."""
    ffn = model.ffns[layer] if model.ffns else None
    return _make_ffn(ffn, model.config, model.dtype, model.param_dtype)


def d_ff(config: GPT2Config) -> int:
    """Returns the dense FFN's hidden width: ``n_inner``, or four times ``n_embd``."""
    return config.n_inner if config.n_inner is not None else 4 * config.n_embd


def _causal_mask(tokens: int) -> Bool[Array, "1 1 T T"]:
    return jnp.tril(jnp.ones((1, 1, tokens, tokens), bool))


def _check_config(config: GPT2Config) -> None:
    if config.add_cross_attention:
        raise ValueError(
            "add_cross_attention=True: this GPT-2 is a decoder alone, without an encoder to attend "
            "to; set it to False"
        )
    if config.n_embd % config.n_head:
        raise ValueError(f"n_head={config.n_head} does not divide n_embd={config.n_embd}")


def _make_ffn(ffn: FFN, config: GPT2Config, dtype: Dtype, param_dtype: Dtype) -> nn.Module:
    settings = {"name": "mlp", "dtype": dtype, "param_dtype": param_dtype}
    if ffn is None:
        return GPT2MLP(config, **settings)
    if isinstance(ffn, SparseFFNConfig):
        return SparseFFN(ffn, **settings)
    return ffn(**settings)


def _layer_norm(config: GPT2Config, name: str | None, dtype: Dtype, param_dtype: Dtype):
    # The two-pass variance: GPT-2's outlier channels cancel badly in E[x^2] - E[x]^2.
    return nn.LayerNorm(
        epsilon=config.layer_norm_epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        name=name,
    )


def _dot_general_f32(lhs, rhs, dimension_numbers, precision=None, **_):
    return jax.lax.dot_general(
        lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=jnp.float32
    )
