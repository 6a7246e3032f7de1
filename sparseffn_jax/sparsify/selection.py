"""Which hidden units of a dense FFN a layer keeps, and where.

The core keeps units as they are; the spectral branch shares few components among many units. The
units whose loss would cost most, or that the branch would serve worst, go to the core.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from sparseffn_jax.sparsify.dense import DenseFFN

Hidden = Float[np.ndarray, "n m"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What each hidden unit means to the output, from calibration activations.

    Attributes:
      importance: (m,); the output variance that each unit carries, summed over channels.
      sensitivities: for each map into the hidden units (m,): how strongly an error of its
        pre-activation moves the output, root mean square.
    """

    importance: Float[np.ndarray, " m"]
    sensitivities: tuple[Float[np.ndarray, " m"], ...]


@dataclasses.dataclass(frozen=True)
class Units:
    """Numbers of hidden units, ascending.

    Attributes:
      core: units that the core keeps.
      spectral: units that the spectral branch shares its components among.
    """

    core: Int[np.ndarray, " c"]
    spectral: Int[np.ndarray, " s"]


def score_units(dense: DenseFFN, hidden: Hidden, slopes: list[Hidden], *, centred: bool) -> Scores:
    """Scores the hidden units of a dense FFN.

    Args:
      dense: the FFN.
      hidden: (n, m) hidden units on calibration activations.
      slopes: for each map into the hidden units their derivative by its pre-activations.
      centred: whether a bias stands in for a lost unit's mean; otherwise the mean counts too.
    """
    norms = np.linalg.norm(dense.down.weight, axis=1)
    spread = hidden.std(0, dtype=np.float64) if centred else root_mean_square(hidden)
    return Scores(
        (spread * norms) ** 2,
        tuple(floored(root_mean_square(slope) * norms) for slope in slopes),
    )


def choose_units(
    scores: Scores,
    core_width: int,
    spectral_width: int,
    spectral_error: Callable[[], Float[np.ndarray, " m"]] | None,
) -> Units:
    """Splits the hidden units between the core and the spectral branch.

    Args:
      scores: of all units.
      core_width: number of units in the core.
      spectral_width: number of units in the spectral branch.
      spectral_error: gives each unit's share of the output error if the spectral branch had it,
        which decides who goes to the core; ``None`` lets importance decide.
    """
    importance = scores.importance.copy()
    ranking = importance if spectral_error is None else spectral_error()
    core = np.sort(np.argsort(-ranking, kind="stable")[:core_width])
    # Units outside the core first, then the core's own, each by importance.
    importance[core] -= importance.max() + 1.0
    spectral = np.sort(np.argsort(-importance, kind="stable")[:spectral_width])
    return Units(core, spectral)


def root_mean_square(x: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " m"]:
    """Returns the root of each column's mean square, in float64."""
    return np.sqrt(np.mean(np.square(x), 0, dtype=np.float64))


def floored(sensitivity: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Returns sensitivities that are safe to divide by: a unit that never fires has one too."""
    floor = 1e-3 * sensitivity.mean() + np.finfo(np.float64).tiny
    return np.maximum(sensitivity, floor)
