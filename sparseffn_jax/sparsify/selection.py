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

# Rows of a matrix that are brought up to date at once.
_ROWS = 128
# Changes of a matrix wait until they have so many rows: making them takes all of it through memory.
_WAITING = 128


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
        hidden, slopes = dense.hidden_and_slopes([up(x) for up in dense.up_maps])
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


def eliminate(
    moments: Moments, kept: int, groups: int = 64, *, overwrite: bool = False
) -> Int[np.ndarray, " k"]:
    """Chooses the units whose outputs, with their output weights refitted, serve the targets best.

    Args:
      moments: moments of all units' outputs and the targets.
      kept: number of units that stay.
      groups: as in :func:`elimination_path`.
      overwrite: as in :func:`elimination_path`.

    Returns:
      The numbers of the units that stay, ascending.
    """
    path = elimination_path(moments, [kept], groups, overwrite=overwrite)
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
    moments: Moments, widths: Sequence[int], groups: int = 64, *, overwrite: bool = False
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
      overwrite: whether the moments may be lost; no copy of them is made then.
    """
    left = np.arange(len(moments.xx))
    matrix = ridge_inverse(moments.xx, overwrite_xx=overwrite)
    weight = matrix @ moments.xy
    inverse = _Inverse(matrix)
    del moments, matrix
    error = 0.0
    for width in widths:
        while (size := len(left)) > width:
            count = min(size - width, max(1, size // groups))
            cost = np.einsum("io,io->i", weight, weight) / inverse.diagonal
            out = np.argsort(cost, kind="stable")[:count]
            # In place, because a copy would be as large as all else: what leaves changes places
            # with the last ones.
            stay = size - count
            here = out[out < stay]
            there = np.setdiff1d(np.arange(stay, size), out)
            for array in (left, weight, *inverse.by_unit):
                array[np.append(here, there)] = array[np.append(there, here)]
            error += inverse.take_out(weight, stay)
            left, weight = left[:stay], weight[:stay]
        order = np.argsort(left)
        yield Selection(left[order], weight[order], error)


class _Inverse:
    """The inverse Gram matrix of the units that are left.

    Attributes:
      diagonal: its diagonal.

    Args:
      matrix: the inverse while no unit has left; it is overwritten.
    """

    def __init__(self, matrix: Float[np.ndarray, "m m"]):
        self._matrix, self.diagonal = matrix, matrix.diagonal().copy()
        # The inverse is ``matrix - lost.T @ made_up``.
        self._lost = self._made_up = matrix[:0]

    @property
    def by_unit(self) -> tuple[np.ndarray, ...]:
        """Arrays with an entry for each unit, for those to write that change units' places."""
        waiting = self._lost.T, self._made_up.T
        return self.diagonal, self._matrix, self._matrix.T, *waiting

    def take_out(self, weight: Float[np.ndarray, "m o"], stay: int) -> float:
        """Lets the first ``stay`` units make up for those behind them.

        Args:
          weight: refitted output weights of all units, brought up to date in place.
          stay: number of units that stay.

        Returns:
          By how much the squared error rises.
        """
        rows = self._matrix[stay:] - self._lost[:, stay:].T @ self._made_up
        lost, to_lost = weight[stay:], rows[:, :stay]
        made_up = np.linalg.solve(rows[:, stay:], np.hstack([lost, to_lost]))
        of_weight, of_inverse = np.hsplit(made_up, [lost.shape[1]])
        weight[:stay] -= to_lost.T @ of_weight
        self.diagonal = self.diagonal[:stay] - np.einsum("ij,ij->j", to_lost, of_inverse)
        self._matrix = self._matrix[:stay, :stay]
        self._lost = np.vstack([self._lost[:, :stay], to_lost])
        self._made_up = np.vstack([self._made_up[:, :stay], of_inverse])
        if len(self._lost) >= _WAITING:
            self._bring_up_to_date()
        return float(np.sum(lost * of_weight))

    def _bring_up_to_date(self) -> None:
        for start in range(0, len(self._matrix), _ROWS):
            rows = slice(start, start + _ROWS)
            self._matrix[rows] -= self._lost[:, rows].T @ self._made_up
        self._lost = self._made_up = self._matrix[:0]


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
