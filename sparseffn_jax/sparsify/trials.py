"""Trial conversions, from which planners learn how much of each layer's loss later ones repair.

A trial converts in closed form, without gradient steps. Each layer is fitted on one part of the
calibration text, and what is left of the loss behind it is measured on the other part.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseffn_jax.defaults import REPAIR
from sparseffn_jax.evaluate.losses import make_evaluator
from sparseffn_jax.models.decoder import ffn_module
from sparseffn_jax.sparsify.dense import DenseFFN
from sparseffn_jax.sparsify.fit import fit_layer
from sparseffn_jax.sparsify.layers import compiled_ffn, convert_side_by_side
from sparseffn_jax.sparsify.planning import (
    FIT_SHARE,
    Configs,
    Plan,
    Planner,
    fit_and_check,
    root_of,
)
from sparseffn_jax.sparsify.streams import LayerActivations

# Planners whose plans predict more damage than the best one's by up to this share are tried out.
# Where plans without bypasses predicted 6 % more than those with, SmolLM2-135M at 0.25 of the FLOPs
# lost 0.11 nats more by them, and the embedded model at half of the FLOPs about as much.
_UNDECIDED = 0.05


class Trial(NamedTuple):
    """What a trial conversion without gradient steps shows, on text that it was not fitted to.

    Attributes:
      damage: the damage that the last replaced layer sees, in nats a token.
      loss: the converted model's cross-entropy, in nats a token.
    """

    damage: float
    loss: float


class _Lesson:
    """What a planner learns of one plan, layer by layer.

    Attributes:
      damage: the damage that the last replaced layer sees, in nats a token.
    """

    def __init__(self, planner: Planner, configs: Configs, repair: float):
        self.damage = 0.0
        self._planner, self._configs, self._repair = planner, configs, repair

    def fit(self, layer: int, dense: DenseFFN, activations: LayerActivations) -> Any:
        """Fits a layer on a part of the text, and learns from the other part what it repairs."""
        planner, config = self._planner, self._configs[layer]
        assert config is not None
        seen, check = fit_and_check(activations)
        fitted, leaves = fit_layer(dense, config, seen)
        ffns = (fitted,) * len(self._configs)
        module = ffn_module(planner.model.clone(ffns=ffns, dtype=jnp.float32), layer)
        leaves = jax.tree.map(jnp.asarray, leaves)
        run = functools.partial(compiled_ffn(module.clone(name=None)), {"params": leaves})
        before = self.damage
        self.damage = _damage_left(dense, run, check, planner.fisher[layer], self._repair)
        if before > 0.0:
            planner.learn(layer, config, before, self.damage)
        return fitted, leaves


def try_out(
    plans: Sequence[tuple[Planner, Configs]],
    repair: float = REPAIR,
    on_layer: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """Converts one model by several plans at once, and lets each planner learn from its own.

    Args:
      plans: planners of one model and text, and the configuration of each layer.
      repair: share of earlier losses that a layer makes up for, above 0.
      on_layer: function that is called with the numbers of layers done and to be done.

    Returns:
      What the trial of each plan shows.
    """
    planner, _ = plans[0]
    lessons = [_Lesson(planner, configs, repair) for planner, configs in plans]
    conversions = [
        ([i for i, config in enumerate(configs) if config is not None], lesson.fit)
        for lesson, (_, configs) in zip(lessons, plans, strict=True)
    ]
    converted = convert_side_by_side(
        planner.model,
        planner.params,
        conversions,
        planner.tokens,
        repair=repair,
        batch_size=planner.batch_size,
        on_layer=on_layer and (lambda done: on_layer(done.layer + 1, planner.model.spec.n_layer)),
    )
    unseen = planner.tokens[round(FIT_SHARE * len(planner.tokens)) :]
    return [
        Trial(lesson.damage, make_evaluator(model)(params, unseen, planner.batch_size))
        for lesson, (model, params) in zip(lessons, converted, strict=True)
    ]


def try_out_best(
    planners: Sequence[Planner],
    plan: Callable[[Planner], Plan],
    *,
    trials: int = 1,
    repair: float = REPAIR,
    on_layer: Callable[[int, int], None] | None = None,
) -> Planner:
    """Tries out what each planner plans, and returns the one whose model has the least loss.

    Whether bypasses pay is a matter of a few hundredths of a nat, and of a clock's prices; what is
    estimated for single layers is not sure enough to say, unless it says so clearly: planners whose
    first plan predicts much more damage than another's are left out.

    Args:
      planners: planners of one model and text, which all learn from their own trials.
      plan: returns the plan that a planner makes for the budget in question.
      trials: number of trial conversions for each of them, at least 1.
      repair: as in :func:`try_out`.
      on_layer: function that is called with the numbers of layers done and to be done.
    """
    first = [plan(planner) for planner in planners]
    most = (1.0 + _UNDECIDED) * min(each.damage for each in first)
    likely = [i for i, each in enumerate(first) if each.damage <= most]
    planners, plans = [planners[i] for i in likely], [first[i].configs for i in likely]
    tried: dict[Configs, float] = {}
    losses: list[float] = []
    for turn in range(trials):
        if turn:
            plans = [plan(planner).configs for planner in planners]
        new: dict[Configs, Planner] = {}
        for planner, configs in zip(planners, plans, strict=True):
            if configs not in tried:
                new.setdefault(configs, planner)
        if new:
            pairs = [(planner, configs) for configs, planner in new.items()]
            shown = try_out(pairs, repair, on_layer)
            tried |= {configs: trial.loss for configs, trial in zip(new, shown, strict=True)}
        losses = [tried[configs] for configs in plans]
    return planners[int(np.argmin(losses))]


def _damage_left(
    dense: DenseFFN,
    sparse: Callable[[Array], Array],
    activations: LayerActivations,
    fisher: Float[np.ndarray, "d d"],
    repair: float,
) -> float:
    """Returns the damage, in nats a token, that the residual stream has behind a layer."""
    root, total = jnp.asarray(root_of(fisher), jnp.float32), 0.0
    for x, target in activations.chunks():
        y = dense(x)
        lost = (target - y) / repair + y - sparse(x)
        total += float(jnp.sum(jnp.square(lost @ root)))
    return 0.5 * total / len(activations.x)
