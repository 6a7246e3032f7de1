"""Measures the plans of a layer's operators, for the shapes and the dtype that it will run in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.measure.timing import chained, time_in_turn
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.ops.plans.autotune import PlanTimes, time_choices
from sparseffn_jax.ops.plans.choice import PlanTable, Problem

# A forward pass on at most so many tokens is taken for decoding: weights are packed before, and it
# is timed as a chain of calls.
FEW_TOKENS, _CHAIN = 64, 32


def autotune(
    config: SparseFFNConfig,
    shapes: Sequence[int],
    dtype: Any = jnp.float32,
    *,
    train: bool = False,
    repeats: int = 9,
) -> PlanTable:
    """Measures every plan of every operator of a layer and returns the fastest plans.

    Plans that the configuration forces are not changed. Plans that are estimated to be far slower
    than the best one are not measured.

    Args:
      config: configuration of the layer.
      shapes: numbers of tokens to measure with, such as 1 for decoding, or the number of tokens of
        a batch for training.
      dtype: dtype of the computation.
      train: whether to time forward and backward pass together; otherwise the forward pass alone is
        timed.
      repeats: number of runs of each plan; the plans take turns, and the median counts.

    Returns:
      The fastest plans on the default device, by operator and problem. An operator of which only
      one plan was worth measuring is left out. :func:`sparseffn_jax.use_plans` follows such a
      table.

    Example:
      >>> import sparseffn_jax as sf
      >>> branch = sf.SpectralConfig("low_rank", width=64, rank=32)
      >>> table = sf.autotune(sf.SparseFFNConfig(64, 128, spectral=branch), [64], repeats=1)
      >>> sorted({operator for operator, _ in table.plans})
      ['low_rank']
    """
    plans: dict[tuple[str, Problem], str] = {}
    for tokens in shapes:
        for times in time_plans(config, tokens, dtype, train=train, repeats=repeats):
            plans[times.choice.operator, times.choice.problem] = times.best
    return PlanTable(jax.devices()[0].device_kind, plans)


def time_plans(
    config: SparseFFNConfig,
    tokens: int,
    dtype: Any = jnp.float32,
    *,
    train: bool = False,
    repeats: int = 9,
) -> list[PlanTimes]:
    """Times the plans of every operator of a layer.

    Args:
      config: configuration of the layer.
      tokens: number of tokens to measure with.
      dtype: dtype of the computation.
      train: whether to time forward and backward pass together; otherwise the forward pass alone is
        timed.
      repeats: number of runs of each plan; the plans take turns, and the median counts.

    Returns:
      The times of each choice for which more than one plan was worth timing.
    """
    layer = SparseFFN(config, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (tokens, config.d_model), dtype)
    shapes = jax.eval_shape(layer.init, jax.random.key(1), x)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.02, leaf.dtype), shapes)
    calls = _CHAIN if not train and tokens <= FEW_TOKENS else 1

    def training(params: Any, x: Any) -> Any:
        y, vjp = jax.vjp(layer.apply, params, x)
        return vjp(y)

    def trace() -> Any:
        variables = shapes
        if calls > 1:
            variables = jax.eval_shape(lambda v: layer.pack(v, tokens), shapes)
        return jax.eval_shape(layer.apply, variables, x)

    def clock(runs: Sequence[Callable[[], Any]]) -> list[float]:
        return [float(np.median(times)) / calls for times in time_in_turn(runs, repeats=repeats)]

    def compile() -> Callable[[], Any]:
        if train:
            program = jax.jit(training).lower(params, x).compile()
            return lambda: program(params, x)
        if calls == 1:
            program = jax.jit(layer.apply).lower(params, x).compile()
            return lambda: program(params, x)
        # As decoding does: weights packed before, calls one after the other.
        packed = layer.pack(params, len(x))
        chain = jax.jit(chained(layer.apply, calls)).lower(packed, x).compile()
        return lambda: chain(packed, x)

    return time_choices(trace, compile, clock)
