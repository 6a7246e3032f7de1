"""The choice of the hidden units of a dense FFN that a layer keeps, and of the branch for each.

The core keeps units as they are; the spectral branch shares few components among many units. The
units whose loss would cost most, or that the branch would approximate worst, go to the core.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from sparseffn_jax.sparsify.dense import DenseFFN

Hidden = Float[np.ndarray, "n m"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """The effect of each hidden unit on the output, measured on calibration activations.

    Attributes:
      importance: output variance that each unit contributes, summed over channels, (m,).
      sensitivities: for each map into the hidden units an array (m,) that states how strongly an
        error of each pre-activation moves the output, as a root mean square.
    """

    importance: Float[np.ndarray, " m"]
    sensitivities: tuple[Float[np.ndarray, " m"], ...]


@dataclasses.dataclass(frozen=True)
class Units:
    """The hidden units of each branch, by their numbers in the dense FFN, ascending.

    Attributes:
      core: numbers of the units that the core keeps.
      spectral: numbers of the units that share the components of the spectral branch.
    """

    core: Int[np.ndarray, " c"]
    spectral: Int[np.ndarray, " s"]


def score_units(dense: DenseFFN, hidden: Hidden, slopes: list[Hidden], *, centred: bool) -> Scores:
    """Scores the hidden units of a dense FFN.

    Args:
      dense: the dense FFN.
      hidden: hidden units (n, m) on calibration activations.
      slopes: for each map into the hidden units, their derivatives (n, m) by its pre-activations.
      centred: whether a bias can make up for the mean of a lost unit; otherwise the mean counts as
        lost too.
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
      scores: scores of all units.
      core_width: number of units in the core.
      spectral_width: number of units in the spectral branch.
      spectral_error: function that returns the output error that each unit would cause in the
        spectral branch; the units with the largest errors go to the core. If it is ``None``, the
        most important units go to the core.
    """
    importance = scores.importance.copy()
    ranking = importance if spectral_error is None else spectral_error()
    core = np.sort(np.argsort(-ranking, kind="stable")[:core_width])
    # Units outside the core first, then the core's own, each by importance.
    importance[core] -= importance.max() + 1.0
    spectral = np.sort(np.argsort(-importance, kind="stable")[:spectral_width])
    return Units(core, spectral)


def root_mean_square(x: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " m"]:
    """Returns the root mean square of each column, in float64."""
    return np.sqrt(np.mean(np.square(x), 0, dtype=np.float64))


def floored(sensitivity: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Returns sensitivities that are safe to divide by, even for a unit that never fires."""
    floor = 1e-3 * sensitivity.mean() + np.finfo(np.float64).tiny
    return np.maximum(sensitivity, floor)
