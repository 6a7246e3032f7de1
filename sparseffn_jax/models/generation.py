"""Token generation with the key/value cache: prompts are read once, then one compiled loop decodes.

The program of the loop depends on shapes alone. The sampling settings and the length to stop at are
data: calling the loop for one token at a time streams, with the same program and the same tokens.
Shape letters: B prompts, T their padded length, N new tokens, V the vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparseffn_jax.models.decoder import Decoder, init_cache, pack_ffns
from sparseffn_jax.nn.sparse_ffn import PACKED
from sparseffn_jax.ops.plans.choice import platform_of

# No token has this id: where nothing ends a row, the program is the same as where something does.
_NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    The settings apply in this order, as in Hugging Face's ``generate``.

    Attributes:
      repetition_penalty: number by which the positive logits of tokens that the row holds already
        are divided, and the negative ones multiplied (Keskar et al. 2019, 1909.05858); 1 changes
        nothing.
      temperature: number by which the logits are divided before a token is drawn; 0 takes the
        likeliest token instead.
      top_k: number k of likeliest tokens that a token is drawn from; ``None`` sets no limit.
      top_p: probability, above 0 and at most 1. A token is drawn from the smallest set of likeliest
        tokens that together have at least this probability (Holtzman et al. 2019, 1904.09751);
        ``None`` sets no limit.

    Raises:
      ValueError: on construction, if a value is out of its range; the message names it.

    Example:
      >>> import sparseffn_jax as sf
      >>> sf.Sampling(temperature=0.8, top_p=0.95)
      Sampling(repetition_penalty=1.0, temperature=0.8, top_k=None, top_p=0.95)
      >>> sf.Sampling(top_k=0)
      Traceback (most recent call last):
      ValueError: top_k=0 must be at least 1
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive")
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must lie above 0 and not above 1")


class DecodeState(NamedTuple):
    """Sequences that are being continued.

    Attributes:
      cache: the model's key/value cache, for T + N tokens.
      tokens: the padded prompts followed by the new tokens, (B, T + N) int32; positions from
        ``length`` on hold arbitrary values.
      length: the length of all sequences up to now, padding included.
      padding: the number of places on the left of each row that hold no token, (B,).
      seen: which tokens each row holds, (B, V).
      done: which rows have ended, (B,); the last token of such a row is repeated.
      key: the key from which later random numbers are made.
    """

    cache: Any
    tokens: Int[Array, "b t_plus_n"]
    length: Int[Array, ""]
    padding: Int[Array, " b"]
    seen: Bool[Array, "b v"]
    done: Bool[Array, " b"]
    key: PRNGKeyArray


def generate(
    model: Decoder,
    params: Any,
    prompt: Int[Array | np.ndarray, "b t"] | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    prompt_mask: Int[Array | np.ndarray, "b t"] | None = None,
    key: PRNGKeyArray | None = None,
) -> Int[Array, "b t_plus_n"]:
    """Continues prompts, token by token.

    The programs are compiled once for all calls with the same model and shapes; the sampling
    settings may differ from call to call.

    Args:
      model: the decoder.
      params: parameters of the decoder.
      prompt: token ids ``(B, T)``, or B lists of ids of any lengths, which :func:`left_pad` pads.
      max_new_tokens: largest number of tokens to add to each row.
      temperature: number by which the logits are divided before a token is drawn; 0 takes the
        likeliest token instead.
      top_k: number of likeliest tokens that a token is drawn from; ``None`` sets no limit.
      top_p: probability of the smallest set of likeliest tokens that a token is drawn from;
        ``None`` sets no limit.
      repetition_penalty: penalty on tokens that the row holds already, as in :class:`Sampling`;
        1 changes nothing.
      eos_token_id: the token, or tokens, that end a row; the token that ended a row is repeated up
        to the row's end. ``None`` ends no row early.
      prompt_mask: ``(B, T)``, 1 for tokens and 0 for padding, which must be on the left; lists of
        ids are then of one length. ``None`` means that there is no padding.
      key: random key for sampling; needed if ``temperature`` is above 0.

    Returns:
      The padded prompts and their continuations, ``(B, T + max_new_tokens)`` int32.

    Raises:
      ValueError: if a prompt is empty or padded on the right, or holds an unknown token or what is
        no integer; if prompts with a mask differ in length; if prompt and continuation exceed the
        model's positions; or if a setting is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import GPT2Config
      >>> config = GPT2Config(
      ...     vocab_size=97, n_positions=16, n_embd=32, n_layer=1, n_head=2,
      ...     bos_token_id=0, eos_token_id=0,
      ... )
      >>> model = sf.GPT2LMHeadModel(config)
      >>> ids = jnp.zeros((2, 8), int)
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> prompts = [[3, 14, 15], [9, 2]]  # The second one gets one token of padding.
      >>> sf.generate(model, params, prompts, max_new_tokens=5).shape
      (2, 8)
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p)
    state = start(
        model, params, prompt, max_new_tokens, sampling,
        eos_token_id=eos_token_id, prompt_mask=prompt_mask, key=key,
    )  # fmt: skip
    length = state.tokens.shape[1]
    return advance(model, params, state, length, sampling, eos_token_id=eos_token_id).tokens


def start(
    model: Decoder,
    params: Any,
    prompt: Int[Array | np.ndarray, "b t"] | Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    prompt_mask: Int[Array | np.ndarray, "b t"] | None = None,
    key: PRNGKeyArray | None = None,
) -> DecodeState:
    """Reads the prompts and chooses the first new token of each.

    Args:
      model: the decoder.
      params: parameters of the decoder.
      prompt: token ids, as :func:`generate` takes them.
      max_new_tokens: largest number N of tokens to add to each row.
      sampling: how tokens are chosen.
      eos_token_id: the token, or tokens, that end a row; ``None`` ends no row early.
      prompt_mask: mask of the prompts, as :func:`generate` takes it.
      key: random key for sampling; needed if the temperature is above 0.

    Returns:
      The state from which :func:`advance` goes on.

    Raises:
      ValueError: under the conditions that :func:`generate` lists.
    """
    vocab_size: int = model.config.vocab_size
    if prompt_mask is None and not isinstance(prompt, np.ndarray | jax.Array):
        ids, mask = left_pad(prompt)
    else:
        ids = _as_token_ids(prompt)
        mask = np.ones_like(ids) if prompt_mask is None else np.asarray(prompt_mask)
    _check_prompt(ids, mask, vocab_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if sampling.temperature > 0.0 and key is None:
        raise ValueError("sampling needs a key: pass key=jax.random.key(seed)")
    key = jax.random.key(0) if key is None else key
    padding = np.sum(mask == 0, axis=1, dtype=np.int32)
    _check_border(model.cache_border(model.config), int(mask.sum(1).max()), max_new_tokens)
    return _prefill(
        _ByValue(model), max_new_tokens, params, ids.astype(np.int32), padding, key,
        as_data(sampling, vocab_size), _as_ids(eos_token_id),
    )  # fmt: skip


def advance(
    model: Decoder,
    params: Any,
    state: DecodeState,
    length: int,
    sampling: Sampling,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    packed: Any = None,
) -> DecodeState:
    """Decodes until the sequences are ``length`` long or every row is done.

    Args:
      model: the decoder.
      params: parameters of the decoder.
      state: the sequences so far. Its buffers are donated, so that it must not be used again.
      length: length of the sequences to stop at, padding included; at most T + N.
      sampling: how tokens are chosen.
      eos_token_id: the token, or tokens, that end a row; ``None`` ends no row early.
      packed: what :func:`pack` returns, so that several calls need not pack the weights anew.

    Returns:
      The state of the longer sequences.

    Raises:
      ValueError: if ``length`` exceeds T + N, or ``top_k`` the vocabulary.
    """
    if length > (capacity := state.tokens.shape[1]):
        raise ValueError(
            f"length={length} exceeds the {capacity} tokens that there is room for: start with a "
            "larger max_new_tokens"
        )
    data = as_data(sampling, model.config.vocab_size)
    packed = pack(model, params, len(state.tokens)) if packed is None else packed
    return _decode(
        _ByValue(model), params, packed, state, np.int32(length), data, _as_ids(eos_token_id)
    )


def pack(model: Decoder, params: Any, batch_size: int) -> dict[str, Any]:
    """Packs the weights of all sparse FFNs for decoding.

    Args:
      model: the decoder.
      params: parameters of the decoder.
      batch_size: number B of prompts.

    Returns:
      What :func:`advance` takes as ``packed``: it must be packed again when ``params`` change.
    """
    return _pack(_ByValue(model), batch_size, platform_of(params), params)


def left_pad(
    prompts: Sequence[Sequence[int]], length: int = 0
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"]]:
    """Pads lists of token ids on the left to one length.

    Args:
      prompts: B lists of token ids.
      length: smallest length T of the result; longer lists make it longer.

    Returns:
      The padded ids (B, T), and a mask (B, T) with 1 for tokens and 0 for padding; both int32.

    Raises:
      ValueError: if a list holds what is no integer.
    """
    length = max(length, *map(len, prompts)) if prompts else length
    ids = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        if len(prompt):
            ids[row, -len(prompt) :] = _as_token_ids(prompt)
            mask[row, -len(prompt) :] = 1
    return ids, mask


def choose(
    logits: Float[Array, "b v"],
    seen: Bool[Array, "b v"],
    settings: Mapping[str, Any],
    key: PRNGKeyArray,
) -> Int[Array, " b"]:
    """Chooses a token for each row.

    Args:
      logits: logits of the next token, (B, V).
      seen: which tokens each row holds, (B, V).
      settings: the attributes of :class:`Sampling`, as scalar arrays without ``None``.
      key: random key.

    Returns:
      Token ids (B,), int32.
    """
    logits = penalize(logits, seen, settings["repetition_penalty"])

    def draw():
        kept = truncate(logits / settings["temperature"], settings["top_k"], settings["top_p"])
        return jax.random.categorical(key, kept).astype(jnp.int32)

    return jax.lax.cond(
        settings["temperature"] > 0.0, draw, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)
    )


def penalize(
    logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: Float[Array, ""]
) -> Float[Array, "b v"]:
    """Applies the repetition penalty of :class:`Sampling` to the tokens that were seen."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(
    logits: Float[Array, "b v"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "b v"]:
    """Sets the logits that top-k, and then top-p, leave out to -inf.

    Tokens with equal logits are either all kept or all left out.

    Args:
      logits: logits (B, V) that are already divided by the temperature.
      top_k: number of tokens to keep, from 1 to V; V leaves out none.
      top_p: probability to keep, above 0; 1 leaves out none.
    """

    def smallest_kept():
        ordered = jnp.sort(logits, axis=-1, descending=True)
        rank = jnp.arange(logits.shape[-1])
        ordered = jnp.where(rank < top_k, ordered, -jnp.inf)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it have not filled top_p: the likeliest always does.
        before = jnp.cumsum(probability, axis=-1) - probability
        is_kept = (rank < top_k) & ((before < top_p) | (top_p >= 1.0))
        return jnp.min(ordered, axis=-1, keepdims=True, where=is_kept, initial=jnp.inf)

    # Sorting a large vocabulary takes longer than all else that is done to the logits.
    limit = jax.lax.cond(
        (top_k < logits.shape[-1]) | (top_p < 1.0),
        smallest_kept,
        lambda: jnp.full((logits.shape[0], 1), -jnp.inf, logits.dtype),
    )
    return jnp.where(logits < limit, -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class _ByValue:
    """A model as a static argument of jit, which is equal to any other with equal fields.

    Linen hashes a module by its fields, and configs of transformers compare by value but have no
    hash.
    """

    model: Decoder

    def __hash__(self):
        return hash((type(self.model), self.model.ffns, str(self.model.dtype)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(static, max_new_tokens, params, prompt, padding, key, settings, ends):
    batch_size, length = prompt.shape
    is_token = jnp.arange(length) >= padding[:, None]
    unseen = jnp.zeros((batch_size, static.model.config.vocab_size), bool)
    state = DecodeState(
        cache=init_cache(static.model, batch_size, length + max_new_tokens),
        tokens=jnp.pad(prompt, ((0, 0), (0, max_new_tokens))),
        length=jnp.int32(length),
        padding=padding,
        seen=unseen.at[jnp.arange(batch_size)[:, None], prompt].max(is_token),
        done=jnp.zeros(batch_size, bool),
        key=key,
    )
    return append(static.model, params, state, prompt, settings, ends, is_first=True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pack(static, batch_size, platform, params):
    return pack_ffns(static.model, params, batch_size, platform)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode(static, params, packed, state, length, settings, ends):
    def goes_on(state):
        return (state.length < length) & ~jnp.all(state.done)

    def step(state):
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)
        return append(static.model, params, state, last, settings, ends, packed)

    state = jax.lax.while_loop(goes_on, step, state)
    last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)
    is_new = jnp.arange(state.tokens.shape[1]) < state.length
    return state._replace(tokens=jnp.where(is_new, state.tokens, last))


def append(
    model: Decoder,
    params: Any,
    state: DecodeState,
    tokens: Int[Array, "b t"],
    settings: Mapping[str, Any],
    ends: Int[Array, " e"],
    packed: Any = None,
    is_first: bool = False,
) -> DecodeState:
    """Runs the model on the last tokens of the sequences and appends the tokens that it chooses.

    Args:
      model: the decoder.
      params: parameters of the decoder.
      state: the sequences so far.
      tokens: those of their tokens that the cache does not hold yet.
      settings: what :func:`as_data` returns.
      ends: the tokens that end a row.
      packed: weights that :func:`~sparseffn_jax.models.decoder.pack_ffns` packed.
      is_first: whether these are all of the tokens, so that the cache is empty.
    """
    count = tokens.shape[1]
    keys = count if is_first else state.tokens.shape[1]
    places = state.length - count + jnp.arange(count)
    is_token = jnp.arange(keys) >= state.padding[:, None]
    hidden, changed = model.apply(
        {"params": params, "cache": state.cache, PACKED: packed or {}},
        tokens,
        attention_mask=is_token.astype(jnp.int32),
        # What stands on padding is masked: any position will do.
        position_ids=jnp.maximum(places - state.padding[:, None], 0),
        init_cache=is_first,
        mutable=["cache"],
        method="last_hidden_state",
    )
    # The logits of a whole prompt would take T x V numbers, of which one row is read: padding is on
    # the left, so that it is the last.
    head: Any = model.apply({"params": params}, method="head")
    logits = head.logits(hidden[:, -1:])
    key, now = jax.random.split(state.key)
    chosen = choose(logits[:, -1], state.seen, settings, now)
    chosen = jnp.where(state.done, tokens[:, -1], chosen)
    return DecodeState(
        cache=changed["cache"],
        tokens=jax.lax.dynamic_update_slice_in_dim(
            state.tokens, chosen[:, None], state.length, axis=1
        ),
        length=state.length + 1,
        padding=state.padding,
        seen=state.seen.at[jnp.arange(len(chosen)), chosen].set(True),
        done=state.done | jnp.any(chosen[:, None] == ends, axis=1),
        key=key,
    )


def as_data(sampling: Sampling, vocab_size: int) -> dict[str, np.number]:
    """Returns settings as scalars for a program, without ``None``.

    Args:
      sampling: how tokens are chosen.
      vocab_size: number of tokens in the vocabulary.

    Raises:
      ValueError: if ``top_k`` exceeds the vocabulary.
    """
    if sampling.top_k is not None and sampling.top_k > vocab_size:
        raise ValueError(f"top_k={sampling.top_k} must lie between 1 and vocab_size={vocab_size}")
    return {
        "repetition_penalty": np.float32(sampling.repetition_penalty),
        "temperature": np.float32(sampling.temperature),
        "top_k": np.int32(sampling.top_k or vocab_size),
        "top_p": np.float32(1.0 if sampling.top_p is None else sampling.top_p),
    }


def _as_token_ids(prompt: Any) -> Int[np.ndarray, "..."]:
    try:
        ids = np.asarray(prompt)
    except ValueError as error:
        raise ValueError(
            "the prompts that prompt_mask masks differ in length: pad them on the left, or leave "
            "prompt_mask out"
        ) from error
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"the prompt holds {ids.flat[0].item()!r}, of dtype {ids.dtype}: give token ids, which "
            "are integers"
        )
    return ids


def _as_ids(token_ids: int | Sequence[int] | None) -> Int[np.ndarray, " e"]:
    return np.atleast_1d(np.asarray(_NO_TOKEN if token_ids is None else token_ids, np.int32))


def _check_border(border: int | None, longest: int, max_new_tokens: int) -> None:
    # The last new token is never read.
    if border is not None and longest <= border < longest + max_new_tokens - 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} would take a prompt of {longest} tokens past "
            f"{border}, where longrope's frequencies change and what is cached no longer fits: "
            f"generate at most {border - longest + 1} tokens, or give a longer prompt"
        )


def _check_prompt(prompt: np.ndarray, mask: np.ndarray, vocab_size: int) -> None:
    if prompt.ndim != 2 or not prompt.size:
        raise ValueError(
            f"the prompt is empty: give at least one token, not an array of shape {prompt.shape}"
        )
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        wrong = prompt.min() if prompt.min() < 0 else prompt.max()
        raise ValueError(f"the prompt holds token id {wrong}, vocab_size={vocab_size}")
    if mask.shape != prompt.shape:
        raise ValueError(f"prompt_mask has shape {mask.shape}, the prompt {prompt.shape}")
    real = mask != 0
    if not real[:, -1].all():
        row = int(np.argmin(real[:, -1]))
        raise ValueError(
            f"prompt {row} is empty or padded on the right: give at least one token, and padding "
            "on the left"
        )
    if (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError("prompt_mask has a gap: padding belongs on the left of each prompt")
