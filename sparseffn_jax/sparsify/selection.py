"""The choice of the hidden units of a dense FFN that a layer keeps, and of the branch for each.

The core keeps units as they are; the spectral branch shares few components among many units. The
units whose loss would cost most go to the core.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sparseffn_jax.sparsify.closed_form import Moments, ridge_inverse
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


def eliminate(moments: Moments, kept: int, groups: int = 64) -> Int[np.ndarray, " k"]:
    """Chooses the units whose outputs, with their output weights refitted, serve the targets best.

    Args:
      moments: moments of all units' outputs and the targets.
      kept: number of units that stay.
      groups: as in :func:`elimination_path`.

    Returns:
      The numbers of the units that stay, ascending.
    """
    path = elimination_path(moments, [kept], groups)
    # The path lets go of them as soon as it can.
    del moments
    return next(path).units


class Selection(NamedTuple):
    """The units that stay at one width.

    Attributes:
      units: their numbers, ascending.
      weight: their refitted output weights.
      error: by how much the loss of the others raises the squared error of a token, summed over the
        targets' channels.
    """

    units: Int[np.ndarray, " k"]
    weight: Float[np.ndarray, "k o"]
    error: float


def elimination_path(
    moments: Moments, widths: Sequence[int], groups: int = 64
) -> Iterator[Selection]:
    """Yields the units that stay at each of several widths, from one path.

    Units leave in small groups: those whose loss costs least when the weights of all the others
    make up for it, which for one unit is ``|W_j|^2 / [G^-1]_jj``. G is the units' Gram matrix and W
    their refitted output weights; both are brought up to date after every group. This is the
    optimal brain surgeon (Hassibi & Stork 1993) for least squares, as in ZipLM (Kurtic et al.
    2023, 2302.04089).

    Args:
      moments: moments of all units' outputs and the targets.
      widths: numbers of units that stay, from the largest to the smallest.
      groups: a group is that part of the units that are left, and one unit at least: the larger,
        the nearer to leaving one by one.
    """
    left, inverse = np.arange(len(moments.xx)), ridge_inverse(moments.xx)
    weight = inverse @ moments.xy
    del moments
    error = 0.0
    for width in widths:
        while len(left) > width:
            count = min(len(left) - width, max(1, len(left) // groups))
            cost = np.square(weight).sum(1) / np.diag(inverse)
            ranking = np.argsort(cost, kind="stable")
            out, stay = np.sort(ranking[:count]), np.sort(ranking[count:])
            lost = np.linalg.solve(
                inverse[np.ix_(out, out)], np.hstack([inverse[out], weight[out]])
            )
            error += float(np.sum(weight[out] * lost[:, len(left) :]))
            left_to_lost = inverse[np.ix_(stay, out)]
            weight = weight[stay] - left_to_lost @ lost[:, len(left) :]
            inverse = inverse[np.ix_(stay, stay)]
            inverse -= left_to_lost @ lost[:, stay]
            left = left[stay]
        yield Selection(left, weight, error)


def choose_units(
    scores: Scores,
    core: Int[np.ndarray, " c"] | int,
    spectral_width: int,
) -> Units:
    """Splits the hidden units between the core and the spectral branch.

    Args:
      scores: scores of all units.
      core: numbers of the units in the core; or how many there are, the most important ones.
      spectral_width: number of units in the spectral branch, the most important of the others.
    """
    importance = scores.importance.copy()
    if isinstance(core, int):
        core = np.sort(np.argsort(-importance, kind="stable")[:core])
    # Units outside the core first, then the core's own, each by importance.
    importance[core] -= importance.max() + 1.0
    spectral = np.sort(np.argsort(-importance, kind="stable")[:spectral_width])
    return Units(core, spectral)


def floored(sensitivity: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Returns sensitivities that are safe to divide by, even for a unit that never fires."""
    floor = 1e-3 * sensitivity.mean() + np.finfo(np.float64).tiny
    return np.maximum(sensitivity, floor)
