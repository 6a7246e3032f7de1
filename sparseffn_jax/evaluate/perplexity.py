"""How likely a model finds a text: log-probabilities of rows, and loss in strided windows."""

from collections.abc import Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from sparseffn_jax.evaluate.fused_loss import token_losses
from sparseffn_jax.evaluate.losses import OnBatch, forward
from sparseffn_jax.evaluate.windows import smaller_batches
from sparseffn_jax.measure.memory import CheckedJit

Params = dict[str, Any]
Row = Sequence[int] | Int[np.ndarray, " n"]


class Scorer(Protocol):
    """Scores the last tokens of rows, as :func:`make_scorer` describes."""

    def __call__(
        self,
        params: Params,
        rows: Sequence[Row],
        counts: Sequence[int],
        on_batch: OnBatch | None = None,
    ) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Returns log-probabilities in nats, and whether greedy decoding gives the same tokens."""
        ...


def make_scorer(model: nn.Module, window: int, batch_size: int) -> Scorer:
    """Returns a function that scores the last tokens of rows.

    It takes ``(params, rows, counts)`` and returns, for each row i, the log-probability in nats of
    its last ``counts[i]`` tokens, each given all tokens before it in the row, and whether each of
    these tokens is the likeliest at its place. A row has at most ``window + 1`` tokens, of which
    the first cannot be counted. Rows are batched by length and padded to powers of two, so that a
    few programs, each compiled once, serve all calls. On request, a fourth argument is called after
    every batch with the numbers of rows done and to be done.

    Args:
      model: a decoder.
      window: the largest number of tokens that the model reads at once.
      batch_size: number of rows in one forward pass; it changes the result by rounding alone.
    """

    def score_batch(params, ids, counted):
        outputs, _ = forward(model, params, ids[:, :-1])
        losses, is_likeliest = token_losses(outputs, ids[:, 1:])
        is_greedy = jnp.all(is_likeliest, axis=1, where=counted)
        return -jnp.sum(losses, axis=1, where=counted), is_greedy

    run = CheckedJit(score_batch, "scoring", smaller_batches)

    def score(params, rows, counts, on_batch=None):
        lengths = np.array([len(row) for row in rows])
        order = np.argsort(-lengths, kind="stable")
        log_probs, is_greedy = np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            longest = int(lengths[batch[0]]) - 1
            width = min(window, 1 << (longest - 1).bit_length())
            ids = np.zeros((batch_size, width + 1), np.int32)
            counted = np.zeros((batch_size, width), bool)
            for i, row in enumerate(batch):
                ids[i, : lengths[row]] = rows[row]
                counted[i, lengths[row] - 1 - counts[row] : lengths[row] - 1] = True
            sums, matches = run(params, ids, counted)
            log_probs[batch] = sums[: len(batch)]
            is_greedy[batch] = matches[: len(batch)]
            if on_batch is not None:
                on_batch(start + len(batch), len(rows))
        return log_probs, is_greedy

    return score


def strided_loss(
    model: nn.Module,
    params: Params,
    tokens: Int[np.ndarray, " n"],
    window: int,
    stride: int,
    batch_size: int,
    on_batch: OnBatch | None = None,
) -> float:
    """Returns the mean cross-entropy of a text in overlapping windows, in nats a token.

    A window of tokens moves along the text by ``stride``. Each token but the text's first is
    predicted once, in the first window that contains it; behind the first window, that is from at
    least ``window - stride`` tokens before it. This is Hugging Face's method
    (https://huggingface.co/docs/transformers/perplexity), where the tokens that a window shares
    with the previous one have the label -100. There a window weighs one token less than it
    predicts; here all tokens weigh the same.

    Args:
      model: a decoder.
      params: parameters of the decoder.
      tokens: token ids of the text, at least two.
      window: number of tokens in a window.
      stride: number of tokens by which the window moves, from 1 to ``window - 1``.
      batch_size: number of windows in one forward pass; it changes the result by rounding alone.
      on_batch: function that is called after every forward pass, with the number of windows that
        are done and that of all.

    Raises:
      ValueError: if the stride is out of its range.
      MemoryError: if a forward pass needs more memory than there is.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride} must lie between 1 and window - 1 = {window - 1}")
    rows, counts, predicted = [], [], 1
    while predicted < len(tokens):
        begin = stride * len(rows)
        rows.append(tokens[begin : begin + window])
        end = begin + len(rows[-1])
        counts.append(end - predicted)
        predicted = end
    score = make_scorer(model, window - 1, batch_size)
    log_probs, _ = score(params, rows, counts, on_batch)
    return -float(log_probs.sum(dtype=np.float64)) / (len(tokens) - 1)
