"""The attention that all model families share: masks, the key/value cache and dropout.

Shape letters: B batch, T tokens, S keys (cached ones included), H heads, G key/value heads, K head
width.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparseffn_jax.ops.plans.choice import pick
from sparseffn_jax.ops.plans.kernels import devices, is_for_this_gpu, pallas_module, triton_refusal

# Blocks of queries: more and smaller ones take longer to compile, and no less in a whole training
# step.
_LEAST_BLOCK, _MOST_BLOCKS = 256, 4
# Rows of a tile; the narrowest head that is an operand of a product, and the widest for which there
# are registers; GPUs (A100, H100 and H200, B200) whose shared memory holds the tiles.
_CUDNN, _FLASH, _FLASH_ROWS, _FLASH_WIDTHS = "cudnn", "flash", 128, (16, 128)
_FLASH_CAPABILITIES = ("8.0", "9.0", "10.0")


class CausalAttention(nn.Module):
    """Base class of the families' attention modules, without parameters of its own.

    The cache lies in the module's collection ``cache``, under the names that transformers' Flax
    models use: ``cached_key`` and ``cached_value``, both (B, S, G, K), and the scalar
    ``cache_index``.
    """

    def attend(
        self,
        query: Float[Array, "B T H K"],
        key: Float[Array, "B T G K"],
        value: Float[Array, "B T G K"],
        attention_mask: Int[Array, "B S"] | None,
        deterministic: bool,
        init_cache: bool,
        *,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        window: int | None = None,
    ) -> Float[Array, "B T HK"]:
        """Attends from T new tokens to themselves and all earlier ones, cached ones included.

        Args:
          query: queries of the new tokens.
          key: keys of the new tokens; H is a multiple of G.
          value: values of the new tokens.
          attention_mask: 1 for real tokens, 0 for padding; it covers the whole cache if there is
            one that does not begin here, and the new tokens otherwise. ``None`` means that there is
            no padding.
          deterministic: whether dropout is off.
          init_cache: whether the cache begins here: where there is none, an empty one as long as
            ``key`` is created; into one that exists the new tokens are written from its first place
            on, and they attend to themselves alone.
          scale: factor of the logits; by default ``K ** -0.5``.
          dropout_rate: probability that an attention weight is dropped.
          window: number of tokens that a token attends to, itself included; ``None`` sets no limit.

        Returns:
          The heads' outputs side by side, in the dtype of ``query``.

        Raises:
          ValueError: if ``attention_mask`` does not cover the keys, or they exceed the cache.
        """
        tokens = query.shape[1]
        has_cache = self.has_variable("cache", "cached_key")
        is_decoding = has_cache and not init_cache
        start = 0
        if has_cache or init_cache:
            cached = self._update_cache(key, value, has_cache, is_decoding)
            if is_decoding:
                key, value, start = cached
        if window is not None and window >= tokens and not is_decoding:
            window = None
        # None stands for the plain causal mask, which attention has a faster way to apply.
        mask = None
        if is_decoding or window is not None:
            mask = _causal_mask(start + jnp.arange(tokens), key.shape[1], window)
        if attention_mask is not None:
            if attention_mask.shape != key.shape[:2]:
                raise ValueError(
                    f"attention_mask has shape {attention_mask.shape}, expected {key.shape[:2]}: "
                    "one entry for each key, cached ones included"
                )
            causal = _causal_mask(jnp.arange(tokens), tokens) if mask is None else mask
            mask = causal & attention_mask[:, None, None, :].astype(bool)
        if dropout_rate > 0.0 and not deterministic:
            if mask is None:
                mask = _causal_mask(jnp.arange(tokens), tokens)
            out = self._attend_with_dropout(query, key, value, mask, scale, dropout_rate)
        elif is_decoding:
            out = _dot_product_attention(query, key, value, mask, scale)
        else:
            is_padded = attention_mask is not None
            out = _attend_without_cache(query, key, value, mask, scale, window, is_padded)
        return out.reshape(*out.shape[:2], -1)

    def _attend_with_dropout(self, query, key, value, mask, scale, dropout_rate):
        # Flax's attention has no scale and wants a key/value head for each head.
        if scale is not None:
            query = query * (scale * query.shape[-1] ** 0.5)
        groups = query.shape[2] // key.shape[2]
        return nn.dot_product_attention(
            query,
            jnp.repeat(key, groups, axis=2),
            jnp.repeat(value, groups, axis=2),
            mask=mask,
            dropout_rng=self.make_rng("dropout"),
            dropout_rate=dropout_rate,
            broadcast_dropout=False,
            force_fp32_for_softmax=True,
        )

    def _update_cache(self, key, value, has_cache, is_decoding):
        """Writes T new positions into a cache that exists, behind others only when decoding.

        Returns the cache's keys and values, and the first new position.
        """
        cached_key = self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
        index = self.variable("cache", "cache_index", lambda: jnp.array(0, jnp.int32))
        start = index.value if is_decoding else jnp.zeros_like(index.value)
        if not has_cache:
            return key, value, start
        tokens, length = key.shape[1], cached_key.value.shape[1]
        if tokens > length:
            raise ValueError(f"{tokens} tokens do not fit a cache of {length}")
        place = (0, start, 0, 0)
        cached_key.value = jax.lax.dynamic_update_slice(cached_key.value, key, place)
        cached_value.value = jax.lax.dynamic_update_slice(cached_value.value, value, place)
        index.value = start + tokens
        return cached_key.value, cached_value.value, start


def _attend_without_cache(query, key, value, mask, scale, window, is_padded):
    """Attends from all tokens at once; no attention weight is stored for the backward pass."""

    def in_blocks(query, key, value):
        full = _causal_mask(jnp.arange(tokens), tokens) if mask is None else mask
        return _attend_in_blocks(query, key, value, full, scale)

    def whole(query, key, value):
        return _dot_product_attention(query, key, value, mask, scale)

    tokens = query.shape[1]
    if query.dtype == jnp.float32:
        return in_blocks(query, key, value)
    branches = {"cpu": in_blocks, "default": jax.checkpoint(whole)}
    kernels = {
        _CUDNN: functools.partial(
            jax.nn.dot_product_attention,
            scale=scale,
            is_causal=True,
            local_window_size=window and (window - 1, 0),
            implementation="cudnn",
        ),
        _FLASH: functools.partial(flash_attention, scale=scale),
    }
    refused = {}
    if is_padded:
        refused = dict.fromkeys(kernels, "there is padding")
    else:
        if reason := _cudnn_refusal(kernels[_CUDNN], query, key, value):
            refused[_CUDNN] = reason
        if reason := _flash_refusal(query, window):
            refused[_FLASH] = reason
    problem = (*query.shape[1:], query.dtype.name)
    # One kernel and no T x T array in memory; cuDNN's takes an H200 less than half of the time.
    costs = {_CUDNN: 0.0, _FLASH: 1.0, "weights": 2.0}
    chosen = pick("attention", None, costs, refused, problem, "gpu")
    if chosen in kernels:
        branches["cuda"] = kernels[chosen]
    return jax.lax.platform_dependent(query, key, value, **branches)


def _cudnn_refusal(attend: Callable[..., Array], *operands: Array) -> str | None:
    if operands[0].shape[-1] > _FLASH_WIDTHS[1]:
        return "heads wider than 128 channels failed with it on an H200"
    if not is_for_this_gpu():
        return "only where the GPU is does XLA compile cuDNN's attention"
    try:
        jax.eval_shape(lambda *given: jax.vjp(attend, *given)[1], *operands)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def _flash_refusal(query: Array, window: int | None) -> str | None:
    tokens, width = query.shape[1], query.shape[-1]
    if window is not None:
        return "its mask is the causal one alone"
    if tokens % _FLASH_ROWS:
        return f"{tokens} tokens are no multiple of {_FLASH_ROWS}"
    if not _FLASH_WIDTHS[0] <= width <= _FLASH_WIDTHS[1]:
        return f"it has no tiles for heads of {width} channels"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 or float16, not {query.dtype}"
    if devices() > 1:
        # The partitioner cannot divide JAX's kernel among them, as it can cuDNN's.
        return "there are several devices"
    return triton_refusal(_FLASH_CAPABILITIES)


def flash_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    *,
    scale: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Runs causal attention by JAX's kernel for Triton, which keeps its weights on the chip.

    The method is FlashAttention (Dao 2023, 2307.08691), forward and backward.

    Args:
      query: queries; T is a multiple of 128, and K from 16 to 128.
      key: keys; H is a multiple of G.
      value: values.
      scale: factor of the logits; by default ``K ** -0.5``.
      interpret: whether to run the kernel in Pallas's interpreter, which needs no GPU.

    Returns:
      The outputs of the heads, in the dtype of ``query``.
    """
    kernel = pallas_module("ops.gpu.attention")
    groups = query.shape[2] // key.shape[2]
    out: Array = kernel.mha(
        *(query, jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2), None),
        sm_scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=True,
        block_sizes=kernel.BlockSizes(_FLASH_ROWS, *(_FLASH_ROWS // 2,) * 5),
        num_warps=8,
        interpret=interpret,
    )
    return out


def _attend_in_blocks(query, key, value, mask, scale):
    """Attends without a cache, in float32, some queries at a time.

    On CPU it takes half the time of Flax's attention and a third of JAX's, in reduced precision
    too: keys behind a block of queries, which are masked, are left out; heads that share keys share
    a product; and weights are normalised after they have met the values. The backward pass computes
    the weights again, so that none of them are stored.
    """
    batch, tokens, heads, width = query.shape
    groups, dtype = key.shape[2], query.dtype
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    scale = width**-0.5 if scale is None else scale
    # From here on (B, G, heads of a group, T, K), and (B, G, S, K).
    query = (scale * query).reshape(batch, tokens, groups, -1, width).transpose(0, 2, 3, 1, 4)
    key, value = (x.transpose(0, 2, 1, 3) for x in (key, value))

    @jax.checkpoint
    def attend(query, key, value, mask):
        rows = query.reshape(batch, groups, -1, width)
        logits = jnp.einsum("bgmk,bgsk->bgms", rows, key)
        logits = logits.reshape(*query.shape[:4], -1)
        # A row of padding sees no key: with a finite number its weights stay finite too.
        logits = jnp.where(mask[:, :, None], logits, jnp.finfo(logits.dtype).min)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        weights = weights.reshape(batch, groups, -1, weights.shape[-1])
        return jnp.einsum("bgms,bgsk->bgmk", weights, value).reshape(query.shape) / total

    size = max(_LEAST_BLOCK, -(-tokens // _MOST_BLOCKS))
    blocks = []
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        part = mask[:, :, start:end, :end]
        blocks.append(attend(query[:, :, :, start:end], key[:, :, :end], value[:, :, :end], part))
    out = jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, width).astype(dtype)


def _dot_product_attention(query, key, value, mask, scale):
    def attend(query, key, value):
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, is_causal=mask is None
        )

    def attend_in_float32(query, key, value):
        wide = attend(*(x.astype(jnp.float32) for x in (query, key, value)))
        return wide.astype(query.dtype)

    if query.dtype != jnp.float16:
        return attend(query, key, value)
    # The CPU's float16 products cannot be asked to accumulate in float32, as JAX's attention does.
    return jax.lax.platform_dependent(query, key, value, cpu=attend_in_float32, default=attend)


def _causal_mask(
    positions: Int[Array, " T"], keys: int, window: int | None = None
) -> Bool[Array, "1 1 T S"]:
    behind = positions[:, None] - jnp.arange(keys)[None, :]
    mask = behind >= 0
    if window is not None:
        mask &= behind < window
    return mask[None, None]
