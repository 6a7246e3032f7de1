"""Next-token losses from hidden states and head, without the logits of all tokens at once.

Logits are computed for a few tokens, reduced to losses, and forgotten (Hsu et al. 2024, 2410.10989;
Wijmans et al. 2024, 2411.09009). The gradient is computed with the loss, while a chunk's logits are
there, so that it takes the three matrix products of the plain form: a backward pass that computed
the logits again would take four. tokamax's ``linear_softmax_cross_entropy_loss`` (0.0.12) does so
on TPU alone; elsewhere it holds all logits, and nowhere does it know a bias or a teacher.

Chunks are cut along T and not along B, which meshes deal out: a chunk lies on as many devices as
the batch. Shape letters are those of :mod:`sparseffn_jax.models.decoder`, and besides t tokens in
a chunk, and G shards of the batch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparseffn_jax.nn.head import Head, HeadGradient, scan


def _at_targets(x: Array, targets: Array) -> Array:
    return jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0]


def _scattered(values: Array, targets: Array, slope: Array) -> Array:
    """Returns zeros of the shape of a slope, with one value for each token at its target.

    It is the transpose of a gather: on a mesh it sends nothing, where ``slope.at[...]`` would
    gather all targets. XLA turns its sum with a slope, but not the difference, into a scatter onto
    the slope itself.
    """
    return jax.vjp(lambda x: _at_targets(x, targets), slope)[1](values)[0]


def _compared(values: Array, targets: Array, slope: Array) -> Array:
    """Returns what :func:`_scattered` does, as part of the operation that computes the slope.

    On a GPU a scatter would read the slope and write it again.
    """
    words = jax.lax.broadcasted_iota(targets.dtype, slope.shape, slope.ndim - 1)
    return jnp.where(words == targets[..., None], values[..., None], 0.0)


class _Work(NamedTuple):
    """How a platform goes through the chunks.

    Attributes:
      entries: entries in the logits of one chunk, of student and teacher together.
      halves: whether the gradient's products with bfloat16 are in bfloat16, as under PyTorch's
        autocast: half of the memory traffic, and more than twice the speed. float16 has not the
        range for it.
      align: whether words are added to the head until they fill whole tiles.
      put: function of values, targets and a slope that puts each token's value at its target.
    """

    entries: int
    halves: bool
    align: bool
    put: Callable[[Array, Array, Array], Array]


# 64 MiB and 256 MiB of float32. A GPU reads and writes the head's gradient in every chunk.
_CPU = _Work(2**24, halves=False, align=False, put=_scattered)
_GPU = _Work(2**26, halves=True, align=True, put=_compared)
# The logit of a word that is not there: its exponential is 0, and its differences are finite.
_NEVER = -1e30


class Outputs(NamedTuple):
    """What a decoder computes before its logits.

    Attributes:
      hidden: the hidden states (B, T, D) behind the last norm.
      head: the head that maps them to logits; ``None`` if they are the logits already, which is
        so of models that are no :class:`~sparseffn_jax.models.decoder.Decoder`.
    """

    hidden: Float[Array, "B T D"]
    head: Head | None

    @property
    def vocab_size(self) -> int:
        """The number of words."""
        return self.hidden.shape[-1] if self.head is None else self.head.vocab_size


class Mixture(NamedTuple):
    """How a loss is made of cross-entropy and distillation.

    Attributes:
      distill_weight: weight of the distillation; that of the cross-entropy is 1 minus it.
      temperature: number above 0 by which the logits of both models are divided.
      batch_shards: the number G of parts in which a mesh deals the batch out. Each part sums up a
        gradient of the head of its own, and these are added once, behind the last chunk.
    """

    distill_weight: float = 0.0
    temperature: float = 1.0
    batch_shards: int = 1


def token_losses(
    outputs: Outputs, targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Returns each token's cross-entropy, and whether the token is the likeliest one.

    Args:
      outputs: the model's outputs.
      targets: ids (B, T) of the tokens to be predicted.

    Returns:
      The cross-entropies in nats, float32, and where the targets have the largest logits.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparseffn_jax.evaluate.fused_loss import Outputs, token_losses
      >>> from sparseffn_jax.nn.head import Head
      >>> outputs = Outputs(jnp.ones((1, 2, 3)), Head(jnp.zeros((3, 8)).at[:, 5].set(1.0)))
      >>> losses, is_likeliest = token_losses(outputs, jnp.array([[5, 0]]))
      >>> losses.round().tolist(), is_likeliest.tolist()
      ([[0.0, 3.0]], [[True, False]])
    """

    def in_chunks(work: _Work, outputs: Outputs, targets: Array) -> tuple[Array, Array]:
        (rows, tokens), head = targets.shape, _prepared(work, outputs)
        cut = partial(_cut, count=_chunk_count(work, rows, tokens, outputs.vocab_size))

        def score(_, chunk):
            hidden, targets = chunk
            logits = _masked(hidden if head is None else head.logits(hidden), outputs.vocab_size)
            log_z = jax.nn.logsumexp(logits, axis=-1)
            is_likeliest = jnp.argmax(logits, axis=-1) == targets
            return None, (log_z - _at_targets(logits, targets), is_likeliest)

        _, (losses, is_likeliest) = scan(score, None, (cut(outputs.hidden), cut(targets)))
        return _join(losses, tokens), _join(is_likeliest, tokens)

    return _by_platform(in_chunks, outputs, targets)


def mean_loss(
    outputs: Outputs,
    targets: Int[Array, "B T"],
    teacher: Outputs | None = None,
    mixture: Mixture | None = None,
    weights: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the loss to train on, and the cross-entropy in it, as means over tokens in nats.

    The loss is ``(1 - w) * cross_entropy + w * temperature**2 * KL(teacher || student)``, of which
    the squared temperature keeps the size of the gradient when the temperature changes (Hinton et
    al. 2015, 1503.02531). It has a gradient with respect to ``outputs``, of which the part that is
    not asked for is not computed; the cross-entropy and the teacher have none.

    Args:
      outputs: the student's outputs.
      targets: ids (B, T) of the tokens to be predicted.
      teacher: the teacher's outputs for the same tokens; ``None`` if the weight is 0.
      mixture: the weight, the temperature, and how the batch is dealt out; ``None`` is the
        cross-entropy alone, on one device.
      weights: how much each token counts in both, float32; ``None`` stands for 1 over the number of
        tokens. Tokens of which nothing is to be learned have the weight 0.

    Returns:
      Two float32 scalars, the sums of the tokens' losses times their weights.

    Raises:
      ValueError: if there is a teacher and no weight, or a weight and no teacher, if the teacher's
        vocabulary has another size, or if the batch cannot be dealt out.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sparseffn_jax.evaluate.fused_loss import Outputs, mean_loss
      >>> from sparseffn_jax.nn.head import Head
      >>> head, targets = Head(jnp.zeros((4, 97))), jnp.zeros((2, 8), int)
      >>> loss, cross_entropy = mean_loss(Outputs(jnp.ones((2, 8, 4)), head), targets)
      >>> round(float(loss), 2)  # A head of zeros does no better than guessing: log(97).
      4.57
      >>> gradient = jax.grad(lambda x: mean_loss(Outputs(x, head), targets)[0])
      >>> gradient(jnp.ones((2, 8, 4))).shape
      (2, 8, 4)
    """
    mixture = mixture or Mixture()
    if (teacher is None) != (mixture.distill_weight == 0.0):
        raise ValueError(
            f"distill_weight={mixture.distill_weight} with teacher={teacher and 'given'}: a "
            "teacher, and no other loss, needs a weight above 0"
        )
    if teacher is not None and teacher.vocab_size != outputs.vocab_size:
        raise ValueError(
            f"the teacher knows {teacher.vocab_size} words and the student {outputs.vocab_size}: "
            "distillation needs models of one vocabulary"
        )
    if targets.shape[0] % mixture.batch_shards:
        raise ValueError(
            f"{targets.shape[0]} rows cannot be dealt out to batch_shards={mixture.batch_shards}"
        )
    if weights is None:
        weights = jnp.full(targets.shape, 1.0 / targets.size, jnp.float32)
    means: Any = _mean_loss(mixture, outputs, targets, weights, jax.lax.stop_gradient(teacher))
    loss, cross_entropy = means
    return loss, jax.lax.stop_gradient(cross_entropy)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_loss(
    mixture: Mixture, outputs: Outputs, targets: Array, weights: Array, teacher: Outputs | None
) -> Any:
    nothing = jax.tree.map(lambda _: False, outputs)
    return _means_and_gradient(mixture, nothing, outputs, targets, weights, teacher)[0]


def _forward(mixture: Mixture, *primals: Any) -> Any:
    wanted = jax.tree.map(lambda leaf: leaf.perturbed, primals[0])
    outputs, *others = jax.tree.map(lambda leaf: leaf.value, primals)
    means, gradient = _means_and_gradient(mixture, wanted, outputs, *others)
    return means, (gradient, outputs)


def _backward(_: Mixture, residuals: Any, cotangents: Any) -> Any:
    gradient, outputs = residuals
    # float32 until it is scaled: in float16 a loss scale saves what would round to zero.
    scale = cotangents[0].astype(jnp.float32)
    gradient = jax.tree.map(
        lambda x, g: None if g is None else (scale * g).astype(x.dtype), outputs, gradient
    )
    return gradient, None, None, None


_mean_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _means_and_gradient(
    mixture: Mixture, wanted: Any, *operands: Any
) -> tuple[tuple[Array, Array], Any]:
    """Returns loss and cross-entropy, and the loss's float32 gradient where it is wanted.

    The operands are outputs, targets, weights and teacher; ``wanted`` and the gradient are trees
    like ``outputs``: of bools, and of arrays or ``None``.
    """
    return _by_platform(partial(_in_chunks, mixture, wanted), *operands)


def _by_platform(compute: Any, *operands: Any) -> Any:
    return jax.lax.platform_dependent(
        *operands, cpu=partial(compute, _CPU), default=partial(compute, _GPU)
    )


def _in_chunks(
    mixture: Mixture,
    wanted: Any,
    work: _Work,
    outputs: Outputs,
    targets: Array,
    weights: Array,
    teacher: Outputs | None,
) -> tuple[tuple[Array, Array], Any]:
    (rows, tokens), head = targets.shape, _prepared(work, outputs)
    soft_head = teacher and _prepared(work, teacher)
    models = 1 if teacher is None else 2
    count = _chunk_count(work, rows // mixture.batch_shards, tokens, models * outputs.vocab_size)
    cut = partial(_cut, count=count)
    # Padding gets the weight 0.
    chunks = jax.tree.map(cut, (outputs.hidden, targets, weights, teacher and teacher.hidden))

    def add_chunk(total, chunk):
        hidden, targets, weights, soft_hidden = chunk
        logits = _logits(head, hidden, outputs.vocab_size)
        soft = None if teacher is None else _logits(soft_head, soft_hidden, teacher.vocab_size)
        loss, cross_entropy, slope = _losses_and_slope(
            mixture, work, logits, targets, soft, weights
        )
        if work.halves and head is not None and head.product_dtype(hidden) == jnp.bfloat16:
            slope = slope.astype(jnp.bfloat16)
        gradient = None
        if wanted.hidden:
            gradient = slope if head is None else head.hidden_gradient(hidden, slope)
        if head is not None:
            total = total.add(head, hidden, slope)
        return total, (weights * loss, weights * cross_entropy, gradient)

    total: Any = None
    if head is not None:
        total = HeadGradient.zeros(head, wanted.head.weight, wanted.head.bias, mixture.batch_shards)
    total, (loss, cross_entropy, gradient) = scan(add_chunk, total, chunks)
    gradient = None if gradient is None else _join(gradient, tokens)
    parts: Any = (gradient, None if head is None else total.total(head, outputs.vocab_size))
    return (loss.sum(), cross_entropy.sum()), Outputs(*parts)


def _losses_and_slope(
    mixture: Mixture,
    work: _Work,
    logits: Array,
    targets: Array,
    soft_logits: Array | None,
    weights: Array,
) -> tuple[Array, Array, Array]:
    """Returns each token's loss and cross-entropy, and the weighted loss's gradient at logits."""
    weight, temperature = mixture.distill_weight, mixture.temperature
    log_p, exponentials, total = _log_softmax(logits)
    cross_entropy = loss = -_at_targets(log_p, targets)
    hard_weights = (1.0 - weight) * weights
    # Numbers of a token are multiplied before they meet its logits, which are many.
    slope = exponentials * (hard_weights[..., None] / total)
    if soft_logits is not None:
        if temperature != 1.0:
            log_p, exponentials, total = _log_softmax(logits / temperature)
        log_soft, soft_exponentials, soft_total = _log_softmax(soft_logits / temperature)
        kl = jnp.sum(soft_exponentials * (log_soft - log_p), axis=-1) / soft_total[..., 0]
        loss = (1.0 - weight) * cross_entropy + weight * temperature**2 * kl
        soft_weights = weight * temperature * weights[..., None]
        slope += exponentials * (soft_weights / total)
        slope -= soft_exponentials * (soft_weights / soft_total)
    return loss, cross_entropy, slope + work.put(-hard_weights, targets, slope)


def _log_softmax(logits: Array) -> tuple[Array, Array, Array]:
    """Returns the logarithms of the softmax, and the exponentials and their sum it is made of."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(shifted)
    total = exponentials.sum(axis=-1, keepdims=True)
    return shifted - jnp.log(total), exponentials, total


def _prepared(work: _Work, outputs: Outputs) -> Head | None:
    head = outputs.head
    return head if head is None or not work.align else head.aligned(outputs.hidden)


def _logits(head: Head | None, hidden: Array, words: int) -> Array:
    return _masked(hidden if head is None else head.logits_by_blocks(hidden), words)


def _masked(logits: Array, words: int) -> Array:
    """Returns float32 logits without those of words that were added."""
    logits = logits.astype(jnp.float32)
    if logits.shape[-1] == words:
        return logits
    numbers = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(numbers < words, logits, _NEVER)


def _chunk_count(work: _Work, rows: int, tokens: int, logits: int) -> int:
    """Returns the number of chunks for rows of tokens that have so many logits each."""
    return math.ceil(tokens / max(1, work.entries // (rows * logits)))


def _cut(x: Array, count: int) -> Array:
    """Cuts (B, T, ...) into ``count`` chunks (count, B, t, ...), the last one padded with zeros."""
    width = math.ceil(x.shape[1] / count)
    padding = [(0, 0), (0, count * width - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.moveaxis(jnp.pad(x, padding).reshape(len(x), count, width, *x.shape[2:]), 1, 0)


def _join(chunks: Array, tokens: int) -> Array:
    """Joins chunks (count, B, t, ...) to (B, T, ...), where T is the number of ``tokens``."""
    whole = jnp.moveaxis(chunks, 0, 1)
    return whole.reshape(len(whole), -1, *chunks.shape[3:])[:, :tokens]
