"""Text in, text out: prompts of any lengths, stop strings, and pieces of text as they come."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.models.generation import Sampling, advance, left_pad, pack, start

# What decoders give for bytes that are no UTF-8, such as a character whose end is still to come.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Between two looks at the text for a stop string: few enough to waste little, many enough to
# hardly cost.
_TOKENS_BETWEEN_LOOKS = 16


def generate_text(
    model: Decoder,
    params: Any,
    tokenizer: Any,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[str] = (),
    key: PRNGKeyArray | None = None,
    least_length: int = 0,
) -> list[str]:
    """Returns the text that a model writes after each prompt.

    Args:
      model: the decoder.
      params: parameters of the decoder.
      tokenizer: a transformers tokenizer; its end-of-text token ends a row.
      prompts: one prompt for each row, as text or as token ids; a string is one prompt.
      max_new_tokens: largest number of tokens to add to each row.
      sampling: how tokens are chosen; by default the likeliest token is taken.
      stop: strings that end a row; the text ends before the first of them.
      key: random key for sampling; needed if the temperature is above 0.
      least_length: smallest number of tokens to pad the prompts to: calls with prompts of different
        lengths then share one compiled program.

    Returns:
      One text for each prompt, without the prompt.

    Raises:
      ValueError: if a stop string is empty, and under the conditions that
        :func:`sparseffn_jax.generate` lists.

    Example:
      >>> import sparseffn_jax as sf
      >>> loaded = sf.load_pretrained(sf.EMBEDDED_MODEL)
      >>> tokenizer = sf.load_tokenizer(sf.EMBEDDED_MODEL)
      >>> prompt = "if __name__ =="
      >>> sf.generate_text(loaded.model(), loaded.params, tokenizer, prompt, max_new_tokens=5)
      [" '__main__':"]
    """
    chunk = _TOKENS_BETWEEN_LOOKS if stop else max(1, max_new_tokens)
    pieces = stream_text(
        model, params, tokenizer, prompts, max_new_tokens, sampling,
        stop=stop, key=key, chunk=chunk, least_length=least_length,
    )  # fmt: skip
    return ["".join(row) for row in zip(*pieces, strict=True)]


def stream_text(
    model: Decoder,
    params: Any,
    tokenizer: Any,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[str] = (),
    key: PRNGKeyArray | None = None,
    chunk: int = 1,
    least_length: int = 0,
) -> Iterator[tuple[str, ...]]:
    """Yields the text that a model writes after each prompt, piece by piece.

    A piece ends with a whole character. Text that may turn out to be the beginning of a stop string
    is held back until it is certain that it is none.

    Args:
      model: the decoder.
      params: parameters of the decoder.
      tokenizer: a transformers tokenizer; its end-of-text token ends a row.
      prompts: one prompt for each row, as text or as token ids; a string is one prompt.
      max_new_tokens: largest number of tokens to add to each row.
      sampling: how tokens are chosen; by default the likeliest token is taken.
      stop: strings that end a row; the text ends before the first of them.
      key: random key for sampling; needed if the temperature is above 0.
      chunk: number of tokens between two pieces, at least 1.
      least_length: smallest number of tokens to pad the prompts to: calls with prompts of different
        lengths then share one compiled program.

    Yields:
      A tuple with one piece for each prompt; a piece may be empty.

    Raises:
      ValueError: if a stop string is empty or ``chunk`` below 1, and under the conditions that
        :func:`sparseffn_jax.generate` lists.

    Example:
      >>> import sparseffn_jax as sf
      >>> loaded = sf.load_pretrained(sf.EMBEDDED_MODEL)
      >>> tokenizer = sf.load_tokenizer(sf.EMBEDDED_MODEL)
      >>> pieces = sf.stream_text(
      ...     loaded.model(), loaded.params, tokenizer, ["if __name__ =="], 10, stop=[":"]
      ... )
      >>> for (piece,) in pieces:
      ...     print(repr(piece))
      " '"
      '__'
      'main'
      '__'
      "'"
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if "" in stop:
        raise ValueError("a stop string is empty: it would stop before the first token")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    sampling = Sampling() if sampling is None else sampling
    end = tokenizer.eos_token_id
    encoded = [tokenizer.encode(text) if isinstance(text, str) else text for text in prompts]
    ids, mask = left_pad(encoded, least_length)
    state = start(
        model, params, ids, max_new_tokens, sampling, eos_token_id=end, prompt_mask=mask, key=key
    )
    packed = pack(model, params, len(ids))
    rows = [
        _Row(tokenizer, row[is_token == 1].tolist(), stop)
        for row, is_token in zip(ids, mask, strict=True)
    ]
    read, capacity = ids.shape[1], state.tokens.shape[1]
    while True:
        # A copy: a view would keep the state's buffers from being donated.
        tokens, length = np.array(state.tokens), int(state.length)
        is_last = length == capacity
        yield tuple(
            row.add(new, is_last)
            for row, new in zip(rows, tokens[:, read:length].tolist(), strict=True)
        )
        done = np.array([row.is_over for row in rows])
        if is_last or done.all():
            return
        read = length
        state = advance(
            model, params, state._replace(done=done), min(length + chunk, capacity), sampling,
            eos_token_id=end, packed=packed,
        )  # fmt: skip


class _Row:
    """The continuation of one prompt, and the length of the text that was given out already."""

    def __init__(self, tokenizer: Any, prompt: list[int], stop: Sequence[str]):
        self.is_over = False
        self._tokenizer, self._stop = tokenizer, stop
        # Decoded with the prompt: some tokenizers drop the space at a text's beginning.
        self._ids = prompt
        self._given = len(self._decode())

    def add(self, ids: list[int], is_last: bool) -> str:
        """Appends new tokens and returns the text that has become certain."""
        if self.is_over:
            return ""
        end = self._tokenizer.eos_token_id
        if end in ids:
            ids, self.is_over = ids[: ids.index(end)], True
        self._ids = self._ids + ids
        text = self._decode()[self._given :]
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.is_over = True
            return text[: min(found)]
        if not (self.is_over or is_last):
            text = text.rstrip(_REPLACEMENT)
            text = text[: len(text) - _overlap(text, self._stop)]
        self._given += len(text)
        return text

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Returns the length of the longest end of ``text`` with which a stop string begins."""
    longest = max((len(string) - 1 for string in stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-size:]) for string in stop):
            return size
    return 0
