"""The choice of the hidden units of a dense FFN that a layer keeps, and of the branch for each.

The core keeps units as they are; the spectral branch shares few components among many units. The
units whose loss would cost most, or that the branch would approximate worst, go to the core.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sparseffn_jax.sparsify.dense import DenseFFN
from sparseffn_jax.sparsify.streams import LayerActivations


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


def score_units(dense: DenseFFN, activations: LayerActivations, *, centred: bool) -> Scores:
    """Scores the hidden units of a dense FFN.

    Args:
      dense: the dense FFN.
      activations: inputs of the FFN on calibration text.
      centred: whether a bias can make up for the mean of a lost unit; otherwise the mean counts as
        lost too.
    """
    norms = np.linalg.norm(dense.down.weight, axis=1)
    shift, totals = None, [0.0] * (2 + len(dense.up_maps))
    for x, _ in activations.chunks():
        hidden, slopes = dense.hidden([up(x) for up in dense.up_maps])
        shift = jnp.mean(hidden, 0) * centred if shift is None else shift
        sums = _unit_sums(hidden - shift, slopes)
        totals = [
            total + np.asarray(part, np.float64) for total, part in zip(totals, sums, strict=True)
        ]
    mean, square, *slope_squares = (total / len(activations.x) for total in totals)
    variance = square - mean**2 if centred else square
    return Scores(
        variance * norms**2, tuple(floored(np.sqrt(square) * norms) for square in slope_squares)
    )


@jax.jit
def _unit_sums(hidden, slopes):
    return jnp.sum(hidden, 0), *(jnp.sum(jnp.square(part), 0) for part in (hidden, *slopes))


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


def floored(sensitivity: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Returns sensitivities that are safe to divide by, even for a unit that never fires."""
    floor = 1e-3 * sensitivity.mean() + np.finfo(np.float64).tiny
    return np.maximum(sensitivity, floor)
