"""Text generation with the key/value cache, the whole decode loop compiled once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparseffn_jax.nn.decoder import Decoder, init_cache


def generate(
    model: Decoder,
    params: Any,
    prompt: Int[Array, "b t"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Int[Array, "b t_plus_new"]:
    """Continues prompts of one length.

    Args:
      model: the decoder.
      params: its parameters.
      prompt: (B, T) token ids, T at least 1.
      max_new_tokens: how many tokens to add; all are added, an end-of-text token stops nothing.
      temperature: 0 is greedy; otherwise the logits are divided by it and sampled.
      top_k: sample from the k most likely tokens only.
      key: for sampling; needed if ``temperature`` is above 0.

    Returns:
      (B, T + max_new_tokens): the prompt and its continuation.

    Raises:
      ValueError: if the prompt is empty, or prompt and continuation exceed ``n_positions``, or a
        setting is out of range.
    """
    vocab_size = model.config.vocab_size
    if prompt.shape[1] < 1:
        raise ValueError("the prompt is empty: give at least one token")
    if int(prompt.max()) >= vocab_size:
        raise ValueError(f"the prompt holds token id {prompt.max()}, vocab_size={vocab_size}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0.0:
        raise ValueError(f"temperature={temperature} must not be negative")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k={top_k} must lie between 1 and vocab_size={vocab_size}")
    if temperature > 0.0 and key is None:
        raise ValueError("sampling needs a key: pass key=jax.random.key(seed)")
    cache = init_cache(model, prompt.shape[0], prompt.shape[1] + max_new_tokens)
    key = jax.random.key(0) if key is None else key
    new = _decode(model.apply, max_new_tokens, top_k, params, cache, prompt, temperature, key)
    return jnp.concatenate([prompt, new], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(apply, max_new_tokens, top_k, params, cache, prompt, temperature, key):
    def forward(cache, tokens, start):
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        logits, state = apply(
            {"params": params, "cache": cache}, tokens, position_ids=positions, mutable=["cache"]
        )
        return logits[:, -1], state["cache"]

    def step(carry, offset):
        cache, logits, key = carry
        key, this = jax.random.split(key)
        token = _sample(logits, temperature, top_k, this).astype(prompt.dtype)[:, None]
        logits, cache = forward(cache, token, prompt.shape[1] + offset)
        return (cache, logits, key), token[:, 0]

    logits, cache = forward(cache, prompt, 0)
    (_, logits, key), tokens = jax.lax.scan(
        step, (cache, logits, key), jnp.arange(max_new_tokens - 1)
    )
    last = _sample(logits, temperature, top_k, key).astype(prompt.dtype)
    return jnp.concatenate([tokens.T, last[:, None]], axis=1)


def _sample(
    logits: Float[Array, "b v"], temperature: Array, top_k: int | None, key: PRNGKeyArray
) -> Int[Array, " b"]:
    if top_k is not None:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    greedy = jnp.argmax(logits, axis=-1)
    sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0.0, sampled, greedy)
