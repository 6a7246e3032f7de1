"""Layer-wise distillation: gradient steps fit one FFN to the outputs that it should have."""

from typing import Any

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
      The trained parameters, in host memory.
    """
    if not steps:
        return params
    variance = float(activations.target.var(0, dtype=np.float32).sum())
    optimizer = optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(_RELATIVE_RATE, steps)),
    )

    def loss(params: Any, x: Array, y: Array) -> Array:
        output: Any = layer.apply({"params": params}, x)
        return jnp.mean(jnp.sum((output - y) ** 2, -1)) / variance

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    tokens = len(activations.x)
    for _ in range(steps):
        rows = rng.integers(tokens, size=min(_TOKENS, tokens))
        x, y = activations.rows(rows)
        # One step ahead and no more: dozens of steps' tokens would wait in memory for their turn.
        jax.block_until_ready(params)
        params, state = step(params, state, x, y)
    return jax.tree.map(np.asarray, params)
