"""Least squares in closed form, from second moments, for the start of each part of a SparseFFN.

All fits are ridge regressions of targets Y on features X, both of which are centred if the map has
a bias. They need the moments of X and Y alone and are computed by NumPy in float64. A ridge is
relative: it is multiplied by the mean of the diagonal that it is added to. Shape letters: N tokens,
i features, o targets.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Int

from sparseffn_jax.config import PolynomialConfig
from sparseffn_jax.ops import polynomial
from sparseffn_jax.ops.fourier import complex_frequencies, dft_basis
from sparseffn_jax.ops.masks import BlockMask

RIDGE = 1e-4
# What stands for a mean of zero, of units that are silent on the whole text: its inverse is finite,
# and so is the square of that.
_LEAST = 1e-140
# Share of the pre-activations that lie inside the polynomial's interval.
_INSIDE = 0.999
# Features whose products with all features behind them are computed at once.
_FEATURES = 1024
# Rows of a matrix that are eliminated at once. SciPy's LAPACK holds the interpreter's lock, so that
# a whole matrix of 5000 rows would stop progress bars and Ctrl-C for seconds; NumPy's products,
# which do the rest, let it go.
_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of features X and targets Y over N tokens.

    Attributes:
      xx: ``X'X / N``, shape (i, i), of the centred features if the moments are centred.
      xy: ``X'Y / N``, shape (i, o), of centred features and targets if the moments are centred.
      x_mean: means of the features, shape (i,); zero if the moments are not centred.
      y_mean: means of the targets, shape (o,); zero if the moments are not centred.
    """

    xx: Float[np.ndarray, "i i"]
    xy: Float[np.ndarray, "i o"]
    x_mean: Float[np.ndarray, " i"]
    y_mean: Float[np.ndarray, " o"]

    @classmethod
    def of(
        cls,
        chunks: Iterable[tuple[Float[Array, "c i"], Float[Array, "c o"]]],
        *,
        centred: bool = True,
    ) -> "Moments":
        """Accumulates the moments of features and targets, chunk by chunk.

        A chunk's sums are computed where the chunk lies, in float32, some features at a time, and
        added up in float64. As ``X'X`` is symmetric, half of it is computed.

        Args:
          chunks: features and targets of some tokens at a time, at least one chunk.
          centred: whether to subtract the means; a map that is fitted to moments that are not
            centred needs no bias.
        """
        n, shifts, totals = 0, None, []
        for x, y in chunks:
            if shifts is None:
                # The means of one chunk are near those of all: sums of squares around them lose no
                # digits to a large mean.
                shifts = [jnp.mean(part, 0) for part in (x, y)]
                i, o = x.shape[1], y.shape[1]
                totals = [np.zeros(shape) for shape in ((i, i), (i, o), i, o)]
            if centred:
                x, y = x - shifts[0], y - shifts[1]
            _add_sums(totals, x, y)
            n += len(x)
        assert shifts is not None
        _mirror(totals[0], _FEATURES)
        for total in totals:
            total /= n
        xx, xy, x_sum, y_sum = totals
        if not centred:
            return cls(xx, xy, np.zeros(len(xx)), np.zeros(xy.shape[1]))
        x_shift, y_shift = (np.asarray(shift, np.float64) for shift in shifts)
        for i, mean in enumerate(x_sum):
            xx[i] -= mean * x_sum
            xy[i] -= mean * y_sum
        return cls(xx, xy, x_shift + x_sum, y_shift + y_sum)

    def select(self, rows: Int[np.ndarray, " k"]) -> "Moments":
        """Returns the moments of some features, in the order of ``rows``."""
        return Moments(self.xx[np.ix_(rows, rows)], self.xy[rows], self.x_mean[rows], self.y_mean)

    def without(
        self, i: slice, given: slice, axes: Float[np.ndarray, "g k"] | None = None
    ) -> "Moments":
        """Returns the moments of features ``i`` after regressing out the features ``given``.

        By the theorem of Frisch, Waugh and Lovell, a fit of ``i`` to these moments, in any form
        that is linear in its weights, equals a joint fit of ``i`` and of ``given`` with
        unrestricted weights.

        Args:
          i: the features that stay.
          given: the features that are regressed out.
          axes: if given, what is regressed out are only the k components ``given @ axes``.
        """
        inner, across, xy = self.xx[given, given], self.xx[given, i], self.xy[given]
        if axes is not None:
            inner, across, xy = axes.T @ inner @ axes, axes.T @ across, axes.T @ xy
        width = across.shape[1]
        explained = ridge_solve(inner, np.hstack([across, xy]), overwrite_xy=True)
        xx = across.T @ explained[:, :width]
        np.subtract(self.xx[i, i], xx, out=xx)
        return Moments(
            xx, self.xy[i] - across.T @ explained[:, width:], self.x_mean[i], self.y_mean
        )

    def residual(self, i: slice, given: slice, weight: Float[np.ndarray, "g o"]) -> "Moments":
        """Returns the moments of features ``i`` and of the error of ``given @ weight`` on Y."""
        xy = self.xy[i] - self.xx[i, given] @ weight
        y_mean = self.y_mean - self.x_mean[given] @ weight
        return Moments(self.xx[i, i], xy, self.x_mean[i], y_mean)


def _add_sums(totals: Sequence[np.ndarray], x: Array, y: Array) -> None:
    """Adds a chunk's ``X'X`` from the diagonal on, ``X'Y``, and sums of X and Y, in place."""
    xx, xy, x_sum, y_sum = totals
    for start in range(0, len(xx), _FEATURES):
        rows = slice(start, start + _FEATURES)
        of_xx, of_xy = _products(x, y, start)
        xx[rows, start:] += np.asarray(of_xx)
        xy[rows] += np.asarray(of_xy)
    x_sum += np.asarray(jnp.sum(x, 0))
    y_sum += np.asarray(jnp.sum(y, 0))


@functools.partial(jax.jit, static_argnames="start")
def _products(x: Array, y: Array, start: int) -> tuple[Array, Array]:
    some = x[:, start : start + _FEATURES].T
    product = functools.partial(jnp.matmul, some, precision="highest")
    return product(x[:, start:]), product(y)


def _mirror(xx: Float[np.ndarray, "i i"], block: int) -> None:
    """Copies what lies right of the diagonal's blocks to below them."""
    for start in range(0, len(xx), block):
        rows, after = slice(start, start + block), slice(start + block, None)
        xx[after, rows] = xx[rows, after].T


def ridge_solve(
    xx: Float[np.ndarray, "i i"],
    xy: Float[np.ndarray, "i o"],
    ridge: float = RIDGE,
    *,
    overwrite_xy: bool = False,
) -> Float[np.ndarray, "i o"]:
    """Returns ``(xx + ridge * mean(diag(xx)) I)^-1 xy`` for a real or complex Hermitian ``xx``.

    Args:
      xx: second moments of the features.
      xy: second moments of features and targets.
      ridge: relative ridge.
      overwrite_xy: whether ``xy`` may be lost; no copy of it is made then.
    """
    solved = xy if overwrite_xy else np.array(xy, np.result_type(xx, xy))
    _solve_in_place(_ridged(xx, ridge), solved)
    return solved


def _solve_in_place(system: Float[np.ndarray, "i i"], xy: Float[np.ndarray, "i o"]) -> None:
    """Overwrites ``xy`` by ``system^-1 xy``, by Gaussian elimination in blocks; loses ``system``.

    As the system is Hermitian, what lies below its diagonal's blocks is neither read nor written.
    """
    starts = range(0, len(system), _ROWS)
    for start in starts:
        rows, after = slice(start, start + _ROWS), slice(start + _ROWS, None)
        across = np.conjugate(system[rows]).T
        solved = _solve_definite(system[rows, rows], np.hstack([system[rows, after], xy[rows]]))
        system[rows, after], xy[rows] = np.hsplit(solved, [solved.shape[1] - xy.shape[1]])
        xy[after] -= across[after] @ xy[rows]
        for other in starts[start // _ROWS + 1 :]:
            block = slice(other, other + _ROWS)
            system[block, other:] -= across[block] @ system[rows, other:]
    for start in reversed(starts):
        rows, after = slice(start, start + _ROWS), slice(start + _ROWS, None)
        xy[rows] -= system[rows, after] @ xy[after]


def _solve_definite(
    system: Float[np.ndarray, "i i"], xy: Float[np.ndarray, "i o"]
) -> Float[np.ndarray, "i o"]:
    try:
        factor = scipy.linalg.cho_factor(system, check_finite=False)
    except np.linalg.LinAlgError:
        # Sums in float32 of activations that differ much in size are not always definite.
        return np.linalg.solve(system, xy)
    return scipy.linalg.cho_solve(factor, xy, check_finite=False)


def ridge_inverse(
    xx: Float[np.ndarray, "i i"], *, overwrite_xx: bool = False
) -> Float[np.ndarray, "i i"]:
    """Returns ``(xx + ridge * mean(diag(xx)) I)^-1`` for a real symmetric ``xx``.

    The inverse is made in place by sweeping (Goodnight 1979, A tutorial on the SWEEP operator), a
    block of rows at a time.

    Args:
      xx: second moments of the features.
      overwrite_xx: whether ``xx`` may be lost; no copy of it is made then.
    """
    inverse = _ridged(xx, RIDGE, copy=not overwrite_xx)
    starts = range(0, len(inverse), _ROWS)
    for start in starts:
        rows = slice(start, start + _ROWS)
        # Blocks below the diagonal are those above it, transposed, and are not kept up to date.
        column = np.vstack([inverse[:start, rows], inverse[rows, start:].T])
        pivot = np.linalg.inv(column[rows])
        scaled = column @ pivot
        for other in starts:
            block = slice(other, other + _ROWS)
            if other != start:
                inverse[block, other:] -= scaled[block] @ column[other:].T
        inverse[:start, rows], inverse[rows, start:] = scaled[:start], scaled[start:].T
        inverse[rows, rows] = -pivot
    np.negative(inverse, out=inverse)
    _mirror(inverse, _ROWS)
    return inverse


def _ridged(xx: np.ndarray, ridge: float, *, copy: bool = True) -> np.ndarray:
    """Returns ``xx + ridge * mean(diag(xx)) I``, free to be overwritten."""
    system = np.array(xx) if copy else xx
    scale = max(float(np.trace(xx).real) / max(1, len(xx)), _LEAST)
    system.flat[:: len(xx) + 1] += ridge * scale
    return system


def whitened_svd(
    weight: Float[np.ndarray, "i o"],
    xx: Float[np.ndarray, "i i"],
    rank: int,
    output_scale: Float[np.ndarray, " o"],
) -> tuple[Float[np.ndarray, "i r"], Float[np.ndarray, "r o"]]:
    """Returns the rank-r factors whose outputs are nearest to those of ``weight``.

    They minimise ``E |x' (weight - axes filter) diag(output_scale)|^2``. The solution is the SVD of
    the weight whitened by the inputs' second moments (Yuan et al. 2023, ASVD; Wang et al. 2024,
    SVD-LLM, 2403.07378), which is the Karhunen-Loeve transform of the outputs.

    Args:
      weight: the matrix to approximate, (i, o).
      xx: second moments of the inputs, (i, i).
      rank: number r of components to keep.
      output_scale: weight of each output's error, (o,); all positive.

    Returns:
      The factors ``axes`` (i, r) and ``filter`` (r, o).
    """
    values, vectors = np.linalg.eigh(xx)
    values = np.maximum(values, RIDGE * values.mean())
    root = np.sqrt(values)
    left, singular, right = np.linalg.svd(
        (root[:, None] * vectors.T) @ (weight * output_scale), full_matrices=False
    )
    # The singular values are shared out evenly: training moves both factors alike.
    share = np.sqrt(singular[:rank])
    axes = vectors @ (left[:, :rank] / root[:, None]) * share
    return axes, share[:, None] * right[:rank] / output_scale


def reduced_rank_regression(
    moments: Moments, rank: int
) -> tuple[Float[np.ndarray, "i r"], Float[np.ndarray, "r o"]]:
    """Returns the rank-r factors with the least squared error on the targets (Izenman 1975).

    Args:
      moments: moments of features and targets.
      rank: number r of components to keep.
    """
    full = ridge_solve(moments.xx, moments.xy)
    _, vectors = np.linalg.eigh(full.T @ moments.xy)
    directions = vectors[:, ::-1][:, :rank]
    factor = full @ directions
    # Balanced columns; the fit itself does not care, an optimizer does.
    share = np.sqrt(np.linalg.norm(factor, axis=0) + np.finfo(np.float64).tiny)
    return factor / share, share[:, None] * directions.T


def block_circulant_regression(
    moments: Moments, block_size: int, frequencies: tuple[int, ...]
) -> tuple[Float[np.ndarray, "f p q"], Float[np.ndarray, "c p q"]]:
    """Returns the filter ``(real, imag)`` with the least squared error on the targets.

    The orthonormal DFT leaves the squared error unchanged and makes the map diagonal in frequency,
    so that each frequency is a small complex least-squares problem of its own.

    Args:
      moments: moments of features and targets.
      block_size: side b of a circulant block.
      frequencies: the kept frequencies, ascending.
    """
    b = block_size
    p, q = moments.xx.shape[0] // b, moments.xy.shape[1] // b
    xx, xy = moments.xx.reshape(p, b, p, b), moments.xy.reshape(p, b, q, b)
    pair, single = dft_basis(b, frequencies)
    complex_ones = complex_frequencies(frequencies, b)
    real, imag = np.zeros((len(frequencies), p, q)), np.zeros((len(complex_ones), p, q))
    for j, f in enumerate(frequencies):
        if f in complex_ones:
            at = complex_ones.index(f)
            wave = pair[:, at, 0] + 1j * pair[:, at, 1]
        else:
            wave = single[:, [g for g in frequencies if g not in complex_ones].index(f)]
        # A row vector's coefficients are x_f = x wave; its moments conj(x_f)' x_f.
        xx_f = np.einsum("n,pnrm,m->pr", wave.conj(), xx, wave)
        xy_f = np.einsum("n,pnqm,m->pq", wave.conj(), xy, wave)
        h = ridge_solve(xx_f, xy_f)
        real[j] = np.real(h)
        if f in complex_ones:
            imag[complex_ones.index(f)] = np.imag(h)
    return real, imag


def masked_regression(moments: Moments, mask: BlockMask | None) -> Float[np.ndarray, "i o"]:
    """Returns the weights with the least squared error on the targets that the mask allows.

    Each output block is a ridge regression on the input blocks that reach it.

    Args:
      moments: moments of features and targets.
      mask: mask of the weights; ``None`` allows all of them.

    Returns:
      A dense matrix (i, o), which is zero where it is masked.
    """
    if mask is None:
        return ridge_solve(moments.xx, moments.xy)
    bi, bo = mask.block_shape
    weights = np.zeros(mask.shape)
    for column, live in enumerate(np.array(mask.blocks).T):
        rows = np.flatnonzero(np.repeat(live, bi))
        outputs = slice(column * bo, (column + 1) * bo)
        if len(rows):
            weights[rows, outputs] = ridge_solve(
                moments.xx[np.ix_(rows, rows)], moments.xy[rows, outputs]
            )
    return weights


def fit_polynomial(
    config: PolynomialConfig,
    us: Sequence[Float[np.ndarray, "n m"]],
    target: Float[np.ndarray, "n m"],
    weights: Float[np.ndarray, " m"],
) -> tuple[PolynomialConfig, Float[np.ndarray, "groups k"]]:
    """Fits the polynomial to what the branch should output, by least squares weighted by channel.

    Args:
      config: configuration of the polynomial.
      us: the branch's pre-activations, ``(u,)`` or, where units are ``poly(gate) * up``,
        ``(gate, up)``.
      target: the values that the hidden units should have.
      weights: weight of each channel's squared error.

    Returns:
      The config with the radius that holds nearly all pre-activations, and the coefficients
      (groups, k).
    """
    u, *up = us
    radius = max(round(float(np.quantile(np.abs(u), _INSIDE)), 3), 1e-3)
    groups, terms = config.groups, len(config.degrees)
    xx, xy = np.zeros((groups, terms, terms)), np.zeros((groups, terms))
    for start in range(0, len(u), 1024):
        rows = slice(start, start + 1024)
        basis = polynomial.basis(u[rows], config.degrees, radius)
        if up:
            basis *= up[0][rows][..., None]
        basis = basis.reshape(len(basis), groups, -1, terms)
        weighted = basis * weights.reshape(groups, -1, 1)
        xx += np.einsum("ngmk,ngml->gkl", weighted, basis, optimize=True)
        wanted = target[rows].reshape(len(basis), groups, -1)
        xy += np.einsum("ngmk,ngm->gk", weighted, wanted, optimize=True)
    coefficients = np.stack(
        [ridge_solve(a, b[:, None], 1e-6)[:, 0] for a, b in zip(xx, xy, strict=True)]
    )
    return dataclasses.replace(config, radius=radius), coefficients
