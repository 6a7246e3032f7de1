"""Shares a budget out among the layers: one candidate for each, with the least damage in sum.

A library of variants of each layer, each with a cost and a damage of its own, and an integer
programme that takes one of them a layer, as in Puzzle (Bercovich et al. 2024, 2411.19146).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from sparseffn_jax.config import SparseFFNConfig

# Share of a limit by which a sum may exceed it: that of rounding, far below any cost's exactness.
_ROUNDING = 1e-9
# Share of the sum by which the choice may miss the best one, far below what damages are known to.
# To prove the last of it the solver once took minutes: where each width costs as much more as the
# next, very many choices are nearly as good.
_GAP = 2e-3


class Candidate(NamedTuple):
    """One way to make a layer.

    Attributes:
      config: its SparseFFN; ``None`` keeps the layer dense.
      cost: what it costs, in the unit of the budget: seconds, operations or parameters.
      damage: by how much it alone raises the loss, in nats a token, as far as is known.
    """

    config: SparseFFNConfig | None
    cost: float
    damage: float


def choose(
    layers: Sequence[Sequence[Candidate]],
    *,
    budget: float | None = None,
    most_damage: float | None = None,
    most_shapes: int | None = None,
) -> list[Candidate]:
    """Chooses one candidate for each layer.

    Args:
      layers: the candidates of each layer.
      budget: the most that all layers may cost together; the damage is then the least possible.
      most_damage: the most damage that all layers may do together; the cost is then the least
        possible. Exactly one of the two is given.
      most_shapes: number of different configs that the layers may have, dense ones included;
        ``None`` for any number.

    Returns:
      The chosen candidates, one a layer; their sum is within 0.2 % of the least possible.

    Raises:
      ValueError: if no choice keeps to the limits; the message states the least that one needs.
    """
    if (budget is None) == (most_damage is None):
        raise ValueError("give either a budget or the most damage, and not both")
    flat = [candidate for layer in layers for candidate in layer]
    owner = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
    costs, damages = (np.array(column, float) for column in list(zip(*flat, strict=True))[1:])
    if budget is not None:
        name, limit, limited, least = "budget", budget, costs, damages
    else:
        assert most_damage is not None
        name, limit, limited, least = "most_damage", most_damage, damages, costs
    lowest = sum(limited[owner == i].min() for i in range(len(layers)))
    # A limit of n times the least of a layer is met by n of them, whichever way they are summed.
    if lowest > limit + _ROUNDING * abs(limit):
        raise ValueError(f"{name}={limit:g} is out of reach: {lowest:.6g} is the least possible")
    configs = list(dict.fromkeys(candidate.config for candidate in flat))
    of_shape = np.array([configs.index(candidate.config) for candidate in flat])
    # The unknowns: whether a candidate is taken, and whether a shape is there at all. The limit and
    # the objective are scaled, because the solver's tolerances are absolute.
    n, shapes = len(flat), len(configs)
    one_a_layer = scipy.sparse.csr_array((np.ones(n), (owner, np.arange(n))))
    rows = scipy.sparse.block_diag([one_a_layer, np.zeros((0, shapes))])
    within = np.append(limited / _scale(limited), np.zeros(shapes))
    constraints = [
        LinearConstraint(rows, 1.0, 1.0),
        LinearConstraint(within[None], -np.inf, limit / _scale(limited)),
    ]
    if most_shapes is not None:
        there = scipy.sparse.csr_array((np.ones(n), (np.arange(n), of_shape)))
        constraints += [
            LinearConstraint(scipy.sparse.hstack([scipy.sparse.eye_array(n), -there]), ub=0.0),
            LinearConstraint(np.append(np.zeros(n), np.ones(shapes))[None], ub=most_shapes),
        ]
    solved = milp(
        np.append(least / _scale(least), np.zeros(shapes)),
        integrality=1,
        bounds=Bounds(0.0, 1.0),
        constraints=constraints,
        options={"mip_rel_gap": _GAP},
    )
    if solved.x is None:
        raise ValueError(
            f"no choice of at most most_shapes={most_shapes} different layers keeps to "
            f"{name}={limit:g}: raise one of the two"
        )
    return [flat[i] for i in np.flatnonzero(solved.x[:n] > 0.5)]


def _scale(values: np.ndarray) -> float:
    return max(float(np.abs(values).max()), np.finfo(float).tiny)
