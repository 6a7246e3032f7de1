"""The closed forms against NumPy's own least squares and SVD on the data themselves."""

import copy

import numpy as np
import pytest

from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.sparsify import closed_form
from sparseffn_jax.sparsify.closed_form import (
    RIDGE,
    Moments,
    block_circulant_regression,
    masked_regression,
    reduced_rank_regression,
    ridge_inverse,
    ridge_solve,
    whitened_svd,
)
from sparseffn_jax.sparsify.selection import eliminate, elimination_path

N = 4000


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def correlated(rng, channels, mean=0.0):
    # Far from singular, so that the ridge of the fits is out of sight.
    mixing = 0.4 * rng.normal(size=(channels, channels)) / channels**0.5 + np.eye(channels)
    return (rng.normal(size=(N, channels)) @ mixing + mean).astype(np.float32)


def lstsq(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.lstsq(x.astype(np.float64), y.astype(np.float64), rcond=None)[0]


def error(x, y, weight):
    x, y = x - x.mean(0), y - y.mean(0)
    return np.mean(np.sum((y - x @ weight) ** 2, 1))


def test_moments_are_the_covariances(rng):
    x, y = correlated(rng, 6, mean=3.0), correlated(rng, 4, mean=-1.0)
    moments = Moments.of([(x, y)])
    joint = np.cov(np.hstack([x, y]).T.astype(np.float64), bias=True)
    np.testing.assert_allclose(moments.xx, joint[:6, :6], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.xy, joint[:6, 6:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.x_mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.y_mean, y.mean(0), rtol=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_moments_of_more_features_than_are_taken_at_once(rng, centred):
    x, y = rng.normal(2.0, 1.0, (48, 1100)), rng.normal(size=(48, 3))
    chunks = [(np.float32(x[rows]), np.float32(y[rows])) for rows in (slice(0, 32), slice(32, 48))]
    moments = Moments.of(chunks, centred=centred)
    x, y = x - centred * x.mean(0), y - centred * y.mean(0)
    np.testing.assert_allclose(moments.xx, x.T @ x / 48, atol=1e-5)
    np.testing.assert_allclose(moments.xy, x.T @ y / 48, atol=1e-5)


def test_ridge_solve_is_least_squares(rng):
    x = correlated(rng, 8)
    y = (x @ rng.normal(size=(8, 3)) + rng.normal(size=(N, 3))).astype(np.float32)
    moments = Moments.of([(x, y)])
    np.testing.assert_allclose(ridge_solve(moments.xx, moments.xy), lstsq(x, y), atol=2e-3)


@pytest.mark.parametrize("n", [511, 512, 1100])
def test_systems_larger_than_a_block_of_rows(rng, n):
    x, y = rng.normal(size=(n + 100, n)), rng.normal(size=(n, 3))
    xx = x.T @ x / len(x)
    ridged = xx + RIDGE * np.mean(np.diag(xx)) * np.eye(n)
    before = xx.copy()
    np.testing.assert_allclose(ridged @ ridge_solve(xx, y), y, atol=1e-10)
    inverse = ridge_inverse(xx)
    np.testing.assert_array_equal(xx, before)
    np.testing.assert_allclose(ridged @ inverse, np.eye(n), atol=1e-10)
    np.testing.assert_allclose(inverse, inverse.T, rtol=0, atol=1e-10)
    assert ridge_inverse(xx, overwrite_xx=True) is xx
    np.testing.assert_array_equal(xx, inverse)


def test_systems_of_nothing():
    """Units that are silent on the text, no units, and no targets."""
    assert not ridge_solve(np.zeros((3, 3)), np.zeros((3, 2))).any()
    silent = ridge_inverse(np.zeros((600, 600)))
    assert np.isfinite(silent**2).all()
    assert ridge_inverse(np.zeros((0, 0))).shape == (0, 0)
    assert ridge_solve(np.eye(600), np.zeros((600, 0))).shape == (600, 0)


@pytest.mark.parametrize("rows", [2, 512])
@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize("least", [0.5, -0.5])
def test_ridge_solve_needs_no_definite_moments(rng, dtype, least, rows, monkeypatch):
    """Rounding of float32 sums can make the least eigenvalues negative."""
    monkeypatch.setattr(closed_form, "_ROWS", rows)
    draw = rng.normal(size=(2, 6, 6)) + (1j * rng.normal(size=(2, 6, 6)) if dtype is complex else 0)
    vectors = np.linalg.qr(draw[0])[0]
    xx = vectors @ np.diag([least, 1.0, 2.0, 3.0, 4.0, 5.0]) @ vectors.conj().T
    before = xx.copy()
    solved = ridge_solve(xx, draw[1], ridge=1e-9)
    np.testing.assert_allclose(xx @ solved, draw[1], atol=1e-6)
    np.testing.assert_array_equal(xx, before)


def test_without_gives_the_joint_fit(rng):
    x = correlated(rng, 10)
    y = (x @ rng.normal(size=(10, 3))).astype(np.float32)
    moments, ours, given = Moments.of([(x, y)]), slice(0, 6), slice(6, None)
    left = moments.without(ours, given)
    weight = ridge_solve(left.xx, left.xy)
    np.testing.assert_allclose(weight, lstsq(x, y)[:6], atol=5e-3)
    rest = moments.residual(given, ours, weight)
    np.testing.assert_allclose(ridge_solve(rest.xx, rest.xy), lstsq(x, y)[6:], atol=5e-3)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_whitened_svd_is_the_best_low_rank_map_of_the_data(rng, rank):
    x = correlated(rng, 8)
    weight, scale = rng.normal(size=(8, 12)), rng.uniform(0.5, 2.0, 12)
    axes, filter = whitened_svd(weight, x.T.astype(np.float64) @ x / N, rank, scale)
    lost = np.mean(np.sum((x @ (weight - axes @ filter) * scale) ** 2, 1))
    singular = np.linalg.svd(x @ (weight * scale), compute_uv=False)
    assert lost == pytest.approx(np.sum(singular[rank:] ** 2) / N, rel=1e-3, abs=1e-6)
    plain = np.linalg.svd(weight, full_matrices=False)
    truncated = (plain[0][:, :rank] * plain[1][:rank]) @ plain[2][:rank]
    assert lost <= np.mean(np.sum((x @ (weight - truncated) * scale) ** 2, 1)) + 1e-6


@pytest.mark.parametrize("rank", [1, 3])
def test_reduced_rank_regression_reaches_the_optimum(rng, rank):
    x = correlated(rng, 8, mean=1.0)
    y = (x @ rng.normal(size=(8, 5)) + rng.normal(size=(N, 5))).astype(np.float32)
    axes, filter = reduced_rank_regression(Moments.of([(x, y)]), rank)
    assert axes.shape == (8, rank)
    assert filter.shape == (rank, 5)
    # Izenman 1975: the least-squares fit, projected on its leading principal directions.
    full = lstsq(x, y)
    _, _, right = np.linalg.svd((x - x.mean(0)) @ full, full_matrices=False)
    best = full @ right[:rank].T @ right[:rank]
    assert error(x, y, axes @ filter) == pytest.approx(error(x, y, best), rel=1e-3)


@pytest.mark.parametrize(
    ("b", "frequencies"), [(4, (0, 1, 2)), (5, (0, 1, 2)), (6, (1, 3)), (1, (0,))]
)
def test_block_circulant_regression_recovers_the_filter(rng, b, frequencies):
    p, q = 3, 2
    has_imag = [f for f in frequencies if f and 2 * f != b]
    real = rng.normal(size=(len(frequencies), p, q))
    imag = rng.normal(size=(len(has_imag), p, q))
    response = np.zeros((b // 2 + 1, p, q), complex)
    response[list(frequencies)] += real
    response[has_imag] += 1j * imag
    x = correlated(rng, p * b, mean=0.5)
    spectrum = np.fft.rfft(x.reshape(N, p, b), axis=-1)
    y = np.fft.irfft(np.einsum("npf,fpq->nqf", spectrum, response), n=b, axis=-1)
    moments = Moments.of([(x, y.reshape(N, q * b).astype(np.float32))])
    fitted_real, fitted_imag = block_circulant_regression(moments, b, frequencies)
    np.testing.assert_allclose(fitted_real, real, atol=5e-3)
    np.testing.assert_allclose(fitted_imag, imag, atol=5e-3)


def test_masked_regression_is_least_squares_on_the_living_inputs(rng):
    mask = BlockMask((2, 3), ((True, False), (False, True), (True, True), (False, False)))
    x = correlated(rng, 8)
    y = (x @ rng.normal(size=(8, 6)) + rng.normal(size=(N, 6))).astype(np.float32)
    weight = masked_regression(Moments.of([(x, y)]), mask)
    living = np.repeat(np.repeat(np.array(mask.blocks), 2, 0), 3, 1)
    assert np.all(weight[~living] == 0)
    for column in range(6):
        rows = np.flatnonzero(living[:, column])
        expected = lstsq(x[:, rows], y[:, column : column + 1])
        np.testing.assert_allclose(weight[rows, column], expected[:, 0], atol=5e-3)


@pytest.mark.parametrize("seed", range(6))
def test_elimination_removes_what_the_others_can_make_up_for(seed):
    """Against greedy elimination by brute force: each step tries every unit, others refitted."""
    rng = np.random.default_rng(seed)
    # Units that repeat each other, so that importance alone would keep the wrong ones.
    x = rng.standard_normal((400, 4)) @ rng.standard_normal((4, 10))
    x += 0.3 * rng.standard_normal((400, 10))
    y = x @ rng.standard_normal((10, 3))
    moments = Moments(x.T @ x / 400, x.T @ y / 400, np.zeros(10), np.zeros(3))
    gram = moments.xx + RIDGE * np.trace(moments.xx) / 10 * np.eye(10)

    def error(units):
        weight = np.linalg.solve(gram[np.ix_(units, units)], moments.xy[units])
        return -np.sum(weight * moments.xy[units])

    left, widths = list(range(10)), list(range(9, 2, -1))
    whole = error(left)
    path = dict(zip(widths, elimination_path(moments, widths), strict=True))
    for kept in widths:
        left = min(([j for j in left if j != i] for i in left), key=error)
        np.testing.assert_array_equal(eliminate(moments, kept), left)
        np.testing.assert_array_equal(path[kept].units, left)
        np.testing.assert_allclose(path[kept].error, error(left) - whole, rtol=1e-6)
        refitted = np.linalg.solve(gram[np.ix_(left, left)], moments.xy[left])
        np.testing.assert_allclose(path[kept].weight, refitted, rtol=1e-6)
    lost = copy.deepcopy(moments)
    np.testing.assert_array_equal(eliminate(lost, widths[-1], overwrite=True), left)
    assert not np.array_equal(lost.xx, moments.xx)


@pytest.mark.parametrize("groups", [4, 64])
def test_groups_leave_as_a_refit_of_what_stays(groups):
    """Groups of many units, some of which are among the last ones already, and of few."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 300)) @ (np.eye(300) + 0.1 * rng.standard_normal((300, 300)))
    y = x @ rng.standard_normal((300, 5))
    moments = Moments(x.T @ x / 2000, x.T @ y / 2000, np.zeros(300), np.zeros(5))
    kept = copy.deepcopy(moments)
    gram = moments.xx + RIDGE * np.trace(moments.xx) / 300 * np.eye(300)
    whole = np.sum(moments.xy * np.linalg.solve(gram, moments.xy))
    for selection in elimination_path(moments, [260, 200, 40], groups):
        units = selection.units
        assert (np.diff(units) > 0).all()
        refitted = np.linalg.solve(gram[np.ix_(units, units)], moments.xy[units])
        np.testing.assert_allclose(selection.weight, refitted, rtol=1e-6, atol=1e-8)
        error = whole - np.sum(moments.xy[units] * refitted)
        np.testing.assert_allclose(selection.error, error, rtol=1e-6)
    np.testing.assert_array_equal(moments.xx, kept.xx)
