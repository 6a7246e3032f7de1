"""Layer-wise distillation: gradient steps fit each sparse FFN to its dense FFN's outputs."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.nn.sparse_ffn import SparseFFN

_LEARNING_RATE = 1e-3
_TOKENS = 2048


def distill_layers(
    configs: Mapping[int, SparseFFNConfig | nn.Module],
    params: Mapping[int, Any],
    inputs: Mapping[int, Float[np.ndarray, "n d"]],
    targets: Mapping[int, Float[np.ndarray, "n d"]],
    *,
    steps: int,
    seed: int,
) -> dict[int, Any]:
    """Trains all layers at once, each on its own loss: no gradient passes between layers.

    The loss of a layer is its squared error divided by the variance of its targets, so that every
    layer counts alike. The optimizer is Adam with a cosine schedule, on 2048 tokens in each step.

    Args:
      configs: configuration of each layer's SparseFFN, by layer number; or a module of another kind
        that maps (N, d) to (N, d).
      params: float32 parameters of each layer's SparseFFN or module.
      inputs: inputs (N, d) of each layer, in host memory.
      targets: outputs (N, d) of each layer's dense FFN on these inputs, in host memory.
      steps: number of gradient steps.
      seed: seed of the choice of tokens.

    Returns:
      The trained parameters by layer number.
    """
    if not configs:
        return {}
    layers = {
        i: SparseFFN(config) if isinstance(config, SparseFFNConfig) else config
        for i, config in configs.items()
    }
    variance = {i: float(targets[i].var(0).sum()) for i in layers}
    optimizer = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))

    def loss(params: Mapping[int, Any], x: Mapping[int, Array], y: Mapping[int, Array]) -> Array:
        total = jnp.float32(0.0)
        for i, layer in layers.items():
            output: Any = layer.apply({"params": params[i]}, x[i])
            total += jnp.mean(jnp.sum((output - y[i]) ** 2, -1)) / variance[i]
        return total

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = {i: params[i] for i in layers}
    state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    tokens = len(next(iter(inputs.values())))
    for _ in range(steps):
        rows = rng.integers(tokens, size=min(_TOKENS, tokens))
        x, y = ({i: part[i][rows] for i in layers} for part in (inputs, targets))
        params, state = step(params, state, x, y)
    return jax.tree.map(np.asarray, params)
