"""Measures the plans of a layer's operators, for the shapes and the dtype that it will run in."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.measure.timing import chained, time_in_turn
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.ops import planning
from sparseffn_jax.ops.planning import Choice, PlanTable

# A plan that is estimated to cost this many times the cheapest is not worth a compilation.
_HOPELESS = 12.0
# A forward pass on at most so many tokens is timed as a chain of so many.
_FEW, _CHAIN = 64, 32


@dataclasses.dataclass(frozen=True)
class PlanTimes:
    """The measured plans of one choice, the others of the layer being what they were.

    Attributes:
      choice: what the cost model or the table in use had picked.
      seconds: median of the whole layer, by plan.
    """

    choice: Choice
    seconds: dict[str, float]

    @property
    def best(self) -> str:
        """The fastest plan."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def loss(self) -> float:
        """Time with the picked plan over time with the best one."""
        return self.seconds[self.choice.plan] / self.seconds[self.best]


def autotune(
    config: SparseFFNConfig,
    shapes: Sequence[int],
    dtype: Any = jnp.float32,
    *,
    train: bool = False,
    repeats: int = 9,
) -> PlanTable:
    """Measures every plan of every operator of a layer and returns the fastest.

    Always the whole jitted layer is timed, never an operator by itself: what surrounds it decides
    what XLA makes of it. Plans that the configuration forces stay.

    Args:
      config: of the layer.
      shapes: numbers of tokens, such as 1 for decoding and a batch's for training.
      dtype: of the computation.
      train: time forward and backward pass together instead of the forward pass.
      repeats: runs of each plan, taken in turn.
    """
    plans: dict[tuple[str, planning.Problem], str] = {}
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
    """Times the plans of every operator of a layer that has more than one; see :func:`autotune`."""
    layer = SparseFFN(config, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (tokens, config.d_model), dtype)
    with planning.recorded() as chosen:
        shapes = jax.eval_shape(layer.init, jax.random.key(1), x)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.02, leaf.dtype), shapes)
    results = []
    by_problem = {(choice.operator, choice.problem): choice for choice in chosen}
    for picked in by_problem.values():
        limit = _HOPELESS * min(picked.costs.values())
        candidates = [plan for plan, cost in picked.costs.items() if cost <= limit]
        if len(candidates) < 2 or _is_forced(config, picked):
            continue
        runs = [_compiled(layer, params, x, picked, plan, train) for plan in candidates]
        calls = _CHAIN if _is_chained(tokens, train) else 1
        medians = [float(np.median(times)) / calls for times in time_in_turn(runs, repeats=repeats)]
        results.append(PlanTimes(picked, dict(zip(candidates, medians, strict=True))))
    return results


def _is_chained(tokens: int, train: bool) -> bool:
    return not train and tokens <= _FEW


def _is_forced(config: SparseFFNConfig, choice: Choice) -> bool:
    if choice.operator != "block_sparse_matmul":
        return config.spectral is not None and config.spectral.implementation is not None
    micro = config.micro
    core = micro and micro.core
    return bool(micro and micro.implementation) or bool(core and core.implementation)


def _compiled(layer, params, x, choice: Choice, plan: str, train: bool) -> Callable[[], Any]:
    def forward(params, x):
        return layer.apply(params, x)

    def training(params, x):
        y, vjp = jax.vjp(forward, params, x)
        return vjp(y)

    run = training if train else forward
    table = PlanTable(jax.devices()[0].device_kind, {(choice.operator, choice.problem): plan})
    with planning.use(table):
        if _is_chained(len(x), train):
            # As decoding does.
            run, params = chained(forward, _CHAIN), layer.prepare(params, len(x))
        program = jax.jit(run).lower(params, x).compile()
    return lambda: program(params, x)
