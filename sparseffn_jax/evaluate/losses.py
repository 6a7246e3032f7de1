"""Losses on hidden states, and the evaluation loss of a model on a text."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparseffn_jax.evaluate.fused_loss import Outputs, token_losses
from sparseffn_jax.evaluate.windows import cut_windows, smaller_batches
from sparseffn_jax.measure.memory import CheckedJit
from sparseffn_jax.models.decoder import Decoder

Params = dict[str, Any]
OnBatch = Callable[[int, int], None]


class Evaluator(Protocol):
    """Returns a model's loss on windows, as :func:`make_evaluator` describes."""

    def __call__(
        self,
        params: Params,
        windows: Int[np.ndarray, "n w"],
        batch_size: int,
        counted: Bool[np.ndarray, "n t"] | None = None,
        on_batch: OnBatch | None = None,
    ) -> float:
        """Returns the mean over the predictions that count, in nats a token."""
        ...


def hidden_state_mse(
    states: Sequence[Float[Array, "*b d"]], teacher_states: Sequence[Float[Array, "*b d"]]
) -> Float[Array, ""]:
    """Returns the mean squared difference between two models' residual streams, in float32.

    Args:
      states: residual stream after each block of the student.
      teacher_states: residual stream after each block of the teacher, which gets no gradient.

    Raises:
      ValueError: if the two models differ in their number of blocks.
    """
    if len(states) != len(teacher_states):
        raise ValueError(
            f"hidden states of {len(states)} blocks cannot be compared with the teacher's "
            f"{len(teacher_states)}: leave hidden_weight at 0"
        )
    errors = [
        jnp.mean(jnp.square(x.astype(jnp.float32) - jax.lax.stop_gradient(y).astype(jnp.float32)))
        for x, y in zip(states, teacher_states, strict=True)
    ]
    return jnp.mean(jnp.stack(errors))


def forward(
    model: nn.Module,
    params: Params,
    input_ids: Int[Array, "b t"],
    *,
    dropout_key: PRNGKeyArray | None = None,
    with_hidden_states: bool = False,
) -> tuple[Outputs, list[Float[Array, "b t d"]]]:
    """Applies a decoder up to its head; on request, also returns its residual stream.

    Args:
      model: a :class:`~sparseffn_jax.models.decoder.Decoder`; any other module is called as
        ``model.apply({"params": params}, input_ids, deterministic=...)`` and returns logits. It
        sows its residual stream as ``hidden_states`` under ``intermediates``.
      params: parameters of the decoder.
      input_ids: token ids.
      dropout_key: random key of the dropout; ``None`` switches dropout off.
      with_hidden_states: whether to return the residual stream; otherwise the list is empty.

    Returns:
      The outputs, from which the losses of :mod:`.fused_loss` are computed, and the residual
      stream after each block.
    """
    is_decoder = isinstance(model, Decoder)
    out: Any = model.apply(
        {"params": params},
        input_ids,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        mutable=["intermediates"] if with_hidden_states else False,
        method="last_hidden_state" if is_decoder else None,
    )
    hidden, variables = out if with_hidden_states else (out, {})
    head: Any = model.apply({"params": params}, method="head") if is_decoder else None
    sown: dict[tuple[str, ...], Any] = flatten_dict(variables.get("intermediates", {}))
    states = [x for path, xs in sown.items() if path[-1] == "hidden_states" for x in xs]
    return Outputs(hidden, head), states


def evaluate_loss(
    model: nn.Module,
    params: Params,
    windows: Int[np.ndarray, "n w"],
    batch_size: int,
    counted: Bool[np.ndarray, "n t"] | None = None,
) -> float:
    """Returns the mean cross-entropy over all windows' targets, in nats a token.

    Args:
      model: a decoder.
      params: parameters of the decoder.
      windows: token ids ``(n, window + 1)``; ``[:, :-1]`` are the inputs and ``[:, 1:]`` the
        targets. :func:`sparseffn_jax.load_windows` returns such windows.
      batch_size: number of windows in one forward pass; it changes the result by rounding alone.
      counted: which targets the mean is over, ``(n, window)``; ``None`` takes all.

    Raises:
      ValueError: if there is no window, no target that counts, or a token id that the model does
        not know.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import sparseffn_jax as sf
      >>> from transformers import GPT2Config
      >>> config = GPT2Config(
      ...     vocab_size=97, n_positions=16, n_embd=32, n_layer=1, n_head=2,
      ...     bos_token_id=0, eos_token_id=0,
      ... )
      >>> model = sf.GPT2LMHeadModel(config)
      >>> ids = jnp.zeros((2, 8), int)
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> windows = np.random.default_rng(0).integers(97, size=(10, 17))
      >>> loss = sf.evaluate_loss(model, params, windows, batch_size=4)
      >>> round(loss - np.log(97))  # A model with random weights does no better than guessing.
      0
    """
    check_token_ids(model, params, windows)
    return make_evaluator(model)(params, windows, batch_size, counted)


def evaluate_tokens(
    model: nn.Module,
    params: Params,
    tokens: Int[np.ndarray, " n"],
    window: int,
    batch_size: int,
    on_batch: OnBatch | None = None,
    counted: Bool[np.ndarray, " n"] | None = None,
) -> float:
    """Returns the mean cross-entropy of a whole text, in nats a token.

    The text is cut into windows whose inputs do not overlap. Every token but the first is predicted
    once, from the tokens before it in its window.

    Args:
      model: a decoder.
      params: parameters of the decoder.
      tokens: token ids of the text, at least two.
      window: number of tokens that a window predicts.
      batch_size: number of windows in one forward pass; it changes the result by rounding alone.
      on_batch: function that is called after every forward pass, with the number of windows that
        are done and that of all.
      counted: which tokens the mean is over; ``None`` takes all but the first, which is never
        predicted.

    Raises:
      ValueError: if no token counts.
      MemoryError: if a forward pass needs more memory than there is.
    """
    # The last window is as long as the others, so that one program serves all: what follows a token
    # does not change its loss.
    window = min(window, len(tokens) - 1)
    padding = -(len(tokens) - 1) % window
    counted = np.ones(len(tokens), bool) if counted is None else counted
    rows = cut_windows(np.pad(tokens, (0, padding)), window)
    rows_counted = cut_windows(np.pad(counted, (0, padding)), window)[:, 1:]
    return make_evaluator(model)(params, rows, batch_size, rows_counted, on_batch)


def make_evaluator(
    model: nn.Module, place: Callable[[np.ndarray], Any] = lambda batch: batch
) -> Evaluator:
    """Returns a function that computes :func:`evaluate_loss` for one model, compiled once.

    It takes parameters, windows and batch size; on request, which targets count, and a function
    that is called after every batch with the numbers of windows done and to be done. Unlike
    :func:`evaluate_loss` it does not check the windows, which :func:`check_token_ids` does. It
    raises ``ValueError`` if no target counts.

    Args:
      model: a decoder.
      place: function that puts a batch on the devices on which the parameters lie.
    """

    def sum_losses(params, batch, counted):
        outputs, _ = forward(model, params, batch[:, :-1])
        losses, _ = token_losses(outputs, batch[:, 1:])
        return jnp.sum(losses, where=counted)

    run = CheckedJit(sum_losses, "evaluation", smaller_batches)

    def evaluate(params, windows, batch_size, counted=None, on_batch=None):
        if counted is None:
            counted = np.ones((len(windows), windows.shape[1] - 1), bool)
        if not counted.any():
            raise ValueError("no target counts: there is nothing to evaluate")
        batch_size = min(batch_size, len(windows))
        total = 0.0
        for start in range(0, len(windows), batch_size):
            rows = slice(start, start + batch_size)
            # A last batch of its own shape would compile the model a second time.
            batch = np.resize(windows[rows], (batch_size, windows.shape[1]))
            mask = np.zeros((batch_size, counted.shape[1]), bool)
            mask[: len(counted[rows])] = counted[rows]
            total += float(run(params, place(batch), place(mask)))
            if on_batch is not None:
                on_batch(min(start + batch_size, len(windows)), len(windows))
        return total / int(counted.sum())

    return evaluate


def check_token_ids(model: nn.Module, params: Params, windows: Int[np.ndarray, "n w"]) -> None:
    """Checks that there are windows, and that all their token ids are in the model's vocabulary.

    XLA would take another token's row silently.

    Raises:
      ValueError: if there is no window, or a token id outside the vocabulary.
    """
    if not windows.size:
        raise ValueError("there is no window to evaluate or train on: give more text")
    ids = jax.ShapeDtypeStruct((1, windows.shape[1] - 1), jnp.int32)
    outputs, _ = jax.eval_shape(lambda p, i: forward(model, p, i), params, ids)
    smallest, largest, vocab_size = int(windows.min()), int(windows.max()), outputs.vocab_size
    if smallest < 0:
        raise ValueError(
            f"token id {smallest} is negative: give ids from 0 to {vocab_size - 1}, and a mask of "
            "what counts in the loss apart from them"
        )
    if largest >= vocab_size:
        raise ValueError(
            f"token id {largest} is beyond the model's vocab_size={vocab_size}: the text was "
            "tokenized for another model"
        )
