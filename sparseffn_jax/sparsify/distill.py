"""Layer-wise distillation: gradient steps fit one FFN to the outputs that it should have."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from sparseffn_jax.sparsify.streams import LayerActivations

# Of the root mean square of each leaf's weights, which is 0.02 in one model and 0.2 in another.
_RELATIVE_RATE = 0.03
_TOKENS = 1024
# Tokens by which the trained parameters are compared with those that they started from.
_JUDGED_TOKENS = 4096


def distill_layer(
    layer: nn.Module, params: Any, activations: LayerActivations, *, steps: int, seed: int
) -> Any:
    """Trains one FFN on calibration activations.

    The loss is the squared error divided by the variance of the targets. The optimizer is Adam with
    a cosine schedule, on 1024 tokens in each step; the learning rate of a leaf is relative to the
    size of its weights, as in Adafactor (Shazeer & Stern 2018, 1804.04235).

    Args:
      layer: a module that maps (N, d) to (N, d), such as a SparseFFN.
      params: its float32 parameters.
      activations: inputs of the layer, and the outputs that it should have.
      steps: number of gradient steps; 0 returns ``params``.
      seed: seed of the choice of tokens.

    Returns:
      The trained parameters, in host memory; ``params`` where training has not lowered the loss,
      as few steps may not: Adam's first ones lead away from where a closed form is best.
    """
    if not steps:
        return params
    training = _training(layer, steps)
    variance = activations.variance
    trained, state = params, training.optimizer.init(params)
    rng = np.random.default_rng(seed)
    tokens = len(activations.x)
    for _ in range(steps):
        rows = rng.integers(tokens, size=min(_TOKENS, tokens))
        x, y = activations.rows(rows)
        # One step ahead and no more: dozens of steps' tokens would wait in memory for their turn.
        jax.block_until_ready(trained)
        trained, state = training.step(trained, state, x, y, variance)
    judged = *activations.sample(_JUDGED_TOKENS), variance
    if not training.loss(trained, *judged) < training.loss(params, *judged):
        return params
    return jax.tree.map(np.asarray, trained)


class _Training(NamedTuple):
    """The programs that train a layer, which layers of one configuration share."""

    optimizer: optax.GradientTransformation
    loss: Callable[..., Array]
    step: Callable[..., tuple[Any, Any]]


@functools.lru_cache(maxsize=8)
def _training(layer: nn.Module, steps: int) -> _Training:
    optimizer = optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(_RELATIVE_RATE, steps)),
    )

    def loss(params: Any, x: Array, y: Array, variance: float) -> Array:
        output: Any = layer.apply({"params": params}, x)
        return jnp.mean(jnp.sum((output - y) ** 2, -1)) / variance

    def step(params, state, x, y, variance):
        gradient = jax.grad(loss)(params, x, y, variance)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return _Training(optimizer, jax.jit(loss), jax.jit(step))
