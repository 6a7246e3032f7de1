"""Linear maps applied in a transform domain that keeps only some components.

- *klt*: data-adapted axes, ``(x U) K``; two plain GEMMs.
- *block-circulant*: a matrix of circulant ``b x b`` blocks, diagonal in the frequencies of a
  ``b``-point rFFT over channels (CirCNN, Ding et al. 2017). Never over tokens: that would let a
  position see its future.

:func:`klt` and :func:`block_circulant` are one map, :func:`klt_ffn` and
:func:`block_circulant_ffn` a pair of them with an elementwise function between, which is where the
time goes: its hidden activations are many, and the arithmetic on them is little.

Filters are real arrays. ``real`` holds the real part at every kept frequency; ``imag`` the
imaginary part at the kept frequencies that have one (DC and, for even b, Nyquist have none).
Shape letters: T tokens, b block size, p and q input and output blocks, f kept frequencies, c
those of them that are complex.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseffn_jax.ops import planning
from sparseffn_jax.ops.block_sparse import matmul
from sparseffn_jax.ops.tiling import kept, over_tokens

# Of what the expansions give, one array each, and of the tree of channel arrays: the elementwise
# function between two maps. Channel arrays broadcast against the hidden activations.
Activate = Callable[[Sequence[Array], Any], Array]


class KLTMap(NamedTuple):
    """The factors of :func:`klt`: ``axes`` (i, r) and ``filter`` (r, o)."""

    axes: Array
    filter: Array


class CirculantMap(NamedTuple):
    """The filter of :func:`block_circulant`: ``real`` (f, p, q) and ``imag`` (c, p, q)."""

    real: Array
    imag: Array


def klt(
    x: Float[Array, "*batch i"],
    axes: Float[Array, "i r"],
    filter: Float[Array, "r o"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch o"]:
    """Projects on ``r`` axes and filters: ``(x axes) filter``.

    Args:
      x: ``(..., d_in)``.
      axes: the kept components' axes, as columns.
      filter: what each component contributes to each output.
      implementation: ``"two_gemms"``, ``"merged"`` (one GEMM with the factors multiplied out), or
        ``None`` to choose.

    Returns:
      ``(..., d_out)`` in the dtype of ``x``, accumulated in float32.
    """
    weights = _klt_weights(
        math.prod(x.shape[:-1]), KLTMap(axes, filter), implementation, planning.lay_out_anew, "klt"
    )
    return _multiply_in_turn(x, weights)


def klt_ffn(
    x: Float[Array, "*batch i"],
    expand: Sequence[KLTMap],
    activate: Activate,
    channel: Any,
    contract: KLTMap,
    *,
    implementation: str | None = None,
    lay_out: planning.LayOut = planning.lay_out_anew,
) -> Float[Array, "*batch o"]:
    """Applies :func:`klt` maps, an elementwise function and another :func:`klt` map.

    In tiles of tokens, recomputed in the backward pass: nothing as wide as the hidden layer is
    kept.

    Args:
      x: ``(..., d_in)``.
      expand: maps to the m hidden channels; two for a gated layer.
      activate: called with one ``(..., m)`` array for each map of ``expand``, and ``channel``.
      channel: a tree of arrays whose last axis is m, or 1.
      contract: the map from the hidden channels.
      implementation: as in :func:`klt`.
      lay_out: gives every map's weights; may keep them from call to call.

    Returns:
      ``(..., d_out)`` in the dtype of ``x``.
    """
    tokens, width = math.prod(x.shape[:-1]), contract.axes.shape[0]
    first = [
        _klt_weights(tokens, factors, implementation, lay_out, f"expand_{i}")
        for i, factors in enumerate(expand)
    ]
    last = _klt_weights(tokens, contract, implementation, lay_out, "contract")

    def rows(x):
        with jax.named_scope("spectral_expand"):
            us = [_multiply_in_turn(x, weights) for weights in first]
        with jax.named_scope("polynomial"):
            hidden = activate(us, channel)
        with jax.named_scope("spectral_contract"):
            return _multiply_in_turn(hidden, last)

    tile = planning.token_tile("klt", width * x.dtype.itemsize)
    y = over_tokens(rows, x.reshape(tokens, x.shape[-1]), tile)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def block_circulant(
    x: Float[Array, "*batch pb"],
    real: Float[Array, "f p q"],
    imag: Float[Array, "c p q"],
    *,
    block_size: int,
    frequencies: Sequence[int],
    implementation: str | None = None,
) -> Float[Array, "*batch qb"]:
    """Applies a block-circulant map given by its filter at the kept frequencies.

    Output block j is ``sum_i irfft(H[:, i, j] * rfft(x_i))`` with ``H = real + 1j imag`` at the
    kept frequencies and zero elsewhere.

    Args:
      x: ``(..., p * block_size)``.
      real: real part of H, one ``(p, q)`` matrix for each kept frequency.
      imag: imaginary part, for the kept frequencies that have one.
      block_size: b; any positive integer that divides the channels.
      frequencies: kept rFFT frequencies out of ``0 .. b // 2``, ascending; static.
      implementation: ``"fft"`` (jnp.fft, float32 inside: XLA has no half-precision FFT),
        ``"dft"`` (the b-point DFT as a real orthonormal product, one real ``2q x 2p`` GEMM a
        frequency), ``"split"`` (the same with real and imaginary part of the filter multiplied
        apart, as they are stored: for few tokens), ``"dense"`` (the matrix materialised, one
        GEMM; the reference), or ``None``.

    Returns:
      ``(..., q * block_size)`` in the dtype of ``x``.

    Raises:
      ValueError: if shapes and frequencies do not fit together, or the plan is unknown.
    """
    weights, frequencies = CirculantMap(real, imag), tuple(frequencies)
    _check_circulant(x.shape[-1], weights, block_size, frequencies)
    tokens = math.prod(x.shape[:-1])
    rows = x.reshape(tokens, x.shape[-1])
    plan = _pick_circulant(tokens, [weights], block_size, frequencies, implementation)
    circulant = _CIRCULANT[plan]
    laid_out = circulant.lay_out(weights, block_size, frequencies, x.dtype)
    y = circulant.apply(rows, laid_out, block_size, frequencies)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def block_circulant_ffn(
    x: Float[Array, "*batch pb"],
    expand: Sequence[CirculantMap],
    activate: Activate,
    channel: Any,
    contract: CirculantMap,
    *,
    block_size: int,
    frequencies: Sequence[int],
    implementation: str | None = None,
    lay_out: planning.LayOut = planning.lay_out_anew,
) -> Float[Array, "*batch rb"]:
    """Applies :func:`block_circulant` maps, an elementwise function and another such map.

    The ``"dft"`` plan keeps the hidden activations channel-major, ``(b, q, T)``: the frequencies
    of a block come first and the tokens last, so that both transforms are one thin GEMM, every
    frequency is one plain GEMM, and nothing is transposed but the narrow ends. Like
    :func:`klt_ffn` it works in tiles of tokens that the backward pass recomputes.

    Args:
      x: ``(..., p * block_size)``.
      expand: maps to the m hidden channels; two for a gated layer.
      activate: called with one array for each map of ``expand``, and ``channel``; the arrays hold
        tokens and hidden channels in an order that depends on the plan.
      channel: a tree of arrays whose last axis is m, or 1; given to ``activate`` so that they
        broadcast against the others. Their other axes stay in front.
      contract: the map from the hidden channels.
      block_size: as in :func:`block_circulant`, for all maps.
      frequencies: likewise.
      implementation: likewise.
      lay_out: gives every map's weights; may keep them from call to call.

    Returns:
      ``(..., r * block_size)`` in the dtype of ``x``.

    Raises:
      ValueError: if shapes and frequencies do not fit together, or the plan is unknown.
    """
    frequencies = tuple(frequencies)
    width = contract.real.shape[1] * block_size
    for weights, channels in (*((e, x.shape[-1]) for e in expand), (contract, width)):
        _check_circulant(channels, weights, block_size, frequencies)
    tokens = math.prod(x.shape[:-1])
    rows = x.reshape(tokens, x.shape[-1])
    plan = _pick_circulant(tokens, [*expand, contract], block_size, frequencies, implementation)
    circulant = _CIRCULANT[plan]
    first = [
        lay_out(
            f"expand_{i}_{plan}",
            functools.partial(circulant.lay_out, weights, block_size, frequencies, x.dtype),
        )
        for i, weights in enumerate(expand)
    ]
    last = lay_out(
        f"contract_{plan}",
        functools.partial(circulant.lay_out, contract, block_size, frequencies, x.dtype),
    )
    if plan == "dft":
        ffn = _dft_ffn(first, activate, channel, last, block_size, frequencies)
        y = over_tokens(ffn, rows, planning.token_tile("dft", width * x.dtype.itemsize))
        return y.reshape(*x.shape[:-1], y.shape[-1])
    with jax.named_scope("spectral_expand"):
        us = [circulant.apply(rows, weights, block_size, frequencies) for weights in first]
    with jax.named_scope("polynomial"):
        hidden = activate(us, channel)
    with jax.named_scope("spectral_contract"):
        y = circulant.apply(hidden, last, block_size, frequencies)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def complex_frequencies(frequencies: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Returns those frequencies whose component has an imaginary part."""
    return tuple(f for f in frequencies if f != 0 and 2 * f != block_size)


def circulant_products(frequencies: Sequence[int], block_size: int) -> int:
    """Returns the real products behind one entry of the filter, summed over kept frequencies.

    Four for a complex product; one for DC or Nyquist, four for both of them together, which share
    one real ``2q x 2p`` GEMM as a complex frequency's parts do.
    """
    complex_count = len(complex_frequencies(frequencies, block_size))
    alone = len(frequencies) - complex_count
    return 4 * complex_count + (4 if alone == 2 else alone)


def dft_basis(block_size: int, frequencies: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the orthonormal real DFT, split by kind of component, in float64.

    Returns:
      ``(b, c, 2)`` real and imaginary analysis vectors of the complex frequencies, and
      ``(b, f - c)`` those of DC and Nyquist. Synthesis is the transpose.
    """
    complex_ones = complex_frequencies(frequencies, block_size)
    real_ones = [f for f in frequencies if f not in complex_ones]
    n = np.arange(block_size)[:, None]
    angle = 2.0 * np.pi * n * np.array(complex_ones, int)[None, :] / block_size
    pair = np.stack([np.cos(angle), -np.sin(angle)], axis=-1) * np.sqrt(2.0 / block_size)
    single = np.cos(2.0 * np.pi * n * np.array(real_ones, int)[None, :] / block_size)
    return pair, single / np.sqrt(block_size)


def circulant_matrix(
    real: Float[Array, "f p q"],
    imag: Float[Array, "c p q"],
    block_size: int,
    frequencies: Sequence[int],
) -> Float[Array, "pb qb"]:
    """Materialises the block-circulant matrix C of :func:`block_circulant`, ``y = x C``."""
    pair, single = (part.astype(np.float32) for part in dft_basis(block_size, frequencies))
    at_complex, at_real = _by_kind(real, block_size, frequencies)
    h = jnp.stack([jnp.stack([at_complex, imag], -1), jnp.stack([-imag, at_complex], -1)], -2)
    highest = jax.lax.Precision.HIGHEST
    c = jnp.einsum("nci,cpqij,mcj->pnqm", pair, h.astype(jnp.float32), pair, precision=highest)
    c += jnp.einsum("nf,fpq,mf->pnqm", single, at_real, single, precision=highest)
    _, p, q = real.shape
    return c.reshape(p * block_size, q * block_size)


def _by_kind(real, block_size, frequencies):
    """Splits the real part into that of complex frequencies and that of DC and Nyquist."""
    # DC comes first and Nyquist last, so both parts are slices.
    first = int(frequencies[0] == 0)
    last = first + len(complex_frequencies(frequencies, block_size))
    return real[first:last], jnp.concatenate([real[:first], real[last:]])


class _Spectrum(NamedTuple):
    """The kept part of a b-point real DFT along the first axis of channel-major arrays.

    Components come in *units* of two that one GEMM mixes: real and imaginary part of a frequency,
    or DC and Nyquist. A single DC or Nyquist is *alone*.

    Attributes:
      units: orthonormal basis, ``(b, 2 k)``: in every unit's first component, then its second.
      alone: ``(b, 1)``, or ``None``.
    """

    units: np.ndarray
    alone: np.ndarray | None

    @classmethod
    def of(cls, block_size: int, frequencies: Sequence[int]) -> "_Spectrum":
        pair, single = dft_basis(block_size, frequencies)
        units = pair.reshape(block_size, -1)
        if single.shape[1] == 2:
            return cls(np.concatenate([single, units], axis=1), None)
        return cls(units, single if single.shape[1] else None)

    def analyse(self, x: Float[Array, "b n T"]) -> tuple[Array | None, Array | None]:
        """Returns the units' components ``(k, 2 n, T)``, and what is alone ``(1, n, T)``."""
        return self._each(_transform, x)

    def enter(self, x: Float[Array, "T nb"]) -> tuple[Array | None, Array | None]:
        """:meth:`analyse` of token-major channels."""
        return self._each(_enter, x)

    def synthesise(self, components: tuple[Array | None, Array | None]) -> Float[Array, "b n T"]:
        """The transpose of :meth:`analyse`."""
        return self._back(_transform, components)

    def leave(self, components: tuple[Array | None, Array | None]) -> Float[Array, "T nb"]:
        """The transpose of :meth:`enter`."""
        return self._back(_leave, components)

    def _each(self, transform: Callable[..., Any], x: Array) -> tuple[Array | None, Array | None]:
        units = alone = None
        if self.units.size:
            split = transform(self.units, x)
            units = split.reshape(len(split) // 2, 2 * split.shape[1], split.shape[2])
        if self.alone is not None:
            alone = transform(self.alone, x)
        return units, alone

    def _back(self, transform: Callable[..., Any], components: Sequence[Array | None]) -> Array:
        units, alone = components
        parts = []
        if units is not None:
            split = units.reshape(2 * len(units), units.shape[1] // 2, units.shape[2])
            parts.append(transform(self.units.T, split))
        if alone is not None and self.alone is not None:
            parts.append(transform(self.alone.T, alone))
        return sum(parts[1:], parts[0])


# What follows has its backward pass written out, because autodiff's transposes the wide arrays
# on their way into a GEMM. The basis is contracted along its first axis: XLA's CPU kernels read
# the wide operand of such a product in place.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transform(basis: np.ndarray, x: Float[Array, "b n T"]) -> Float[Array, "k n T"]:
    """Applies ``basis`` (b, k) along the first axis."""
    basis = np.ascontiguousarray(basis).astype(x.dtype)
    b, n, tokens = x.shape
    y = _contract_first(basis, x.reshape(b, n * tokens)).astype(x.dtype)
    return y.reshape(len(y), n, tokens)


_transform.defvjp(
    lambda basis, x: (_transform(basis, x), None),
    lambda basis, _, dy: (_transform(basis.T, dy),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enter(basis: np.ndarray, x: Float[Array, "T nb"]) -> Float[Array, "k n T"]:
    """Applies ``basis`` (b, k) to every block of channels; the tokens come last."""
    tokens, channels = x.shape
    b = len(basis)
    return _transform(basis, x.reshape(tokens, channels // b, b).transpose(2, 1, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _leave(basis: np.ndarray, x: Float[Array, "k n T"]) -> Float[Array, "T nb"]:
    """Applies ``basis`` (k, b) along the first axis; the tokens come first."""
    k, n, tokens = x.shape
    # The product comes last: what a loop writes into its result can then be written as it is.
    rows = x.transpose(2, 1, 0).reshape(tokens * n, k)
    return matmul(rows, jnp.asarray(basis, x.dtype)).reshape(tokens, n * basis.shape[1])


_enter.defvjp(
    lambda basis, x: (_enter(basis, x), None), lambda basis, _, dy: (_leave(basis.T, dy),)
)
_leave.defvjp(
    lambda basis, x: (_leave(basis, x), None), lambda basis, _, dy: (_enter(basis.T, dy),)
)


class _Matrices(NamedTuple):
    """One matrix a frequency, in both orders: each direction then reads its rows as they lie."""

    weights: Float[Array, "k i o"]
    transposed: Float[Array, "k o i"]

    @classmethod
    def of(cls, weights: Float[Array, "k i o"]) -> "_Matrices":
        return cls(weights, weights.mT)


@jax.custom_vjp
def _mix(
    weights: Float[Array, "k i o"], transposed: Float[Array, "k o i"], x: Float[Array, "k i T"]
) -> Float[Array, "k o T"]:
    """Multiplies every frequency's components by its matrix."""
    return jnp.matmul(transposed, x).astype(x.dtype)


def _mix_backward(stored, dy):
    weights, x = stored
    dw = jnp.einsum("kit,kot->kio", x, dy).astype(weights.dtype)
    return dw, None, jnp.matmul(weights, dy).astype(x.dtype)


_mix.defvjp(
    lambda weights, transposed, x: (_mix(weights, transposed, x), (weights, x)), _mix_backward
)


def _spectral_weights(weights: CirculantMap, block_size, frequencies, dtype):
    """Returns the real matrices of the units, 2q x 2p, and of what is alone, q x p."""
    real, at_real = _by_kind(weights.real.astype(dtype), block_size, frequencies)
    imag = weights.imag.astype(dtype)
    # As filters are stored: this copies rows, and transposes nothing.
    units = jnp.block([[real, imag], [-imag, real]])
    if len(at_real) == 2:
        zero = jnp.zeros_like(at_real[:1])
        ends = jnp.block([[at_real[:1], zero], [zero, at_real[1:]]])
        return _Matrices.of(jnp.concatenate([ends, units])), None
    return _Matrices.of(units), _Matrices.of(at_real) if len(at_real) else None


def _multiply(
    weights: tuple[_Matrices | None, _Matrices | None],
    components: tuple[Array | None, Array | None],
) -> tuple[Array | None, Array | None]:
    units, alone = (
        None if w is None or x is None else _mix(*w, x)
        for w, x in zip(weights, components, strict=True)
    )
    return units, alone


def _dft_ffn(first, activate, channel, last, block_size, frequencies):
    spectrum = _Spectrum.of(block_size, frequencies)
    channel = jax.tree.map(lambda leaf: _channels_first(leaf, block_size), channel)

    def rows(x):
        with jax.named_scope("spectral_expand"):
            components = spectrum.enter(x)
            us = [spectrum.synthesise(_multiply(weights, components)) for weights in first]
        with jax.named_scope("polynomial"):
            hidden = activate(us, channel)
        with jax.named_scope("spectral_contract"):
            return spectrum.leave(_multiply(last, spectrum.analyse(hidden)))

    return rows


def _contract_first(a: Array | np.ndarray, b: Array) -> Array:
    """Returns ``a.T @ b``."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _channels_first(leaf: Array, block_size: int) -> Array:
    """Lays an array out so that its last axis runs along ``(b, n, T)`` arrays."""
    if leaf.shape[-1] == 1:
        return leaf[..., None, None]
    blocks = leaf.reshape(*leaf.shape[:-1], -1, block_size)
    return jnp.swapaxes(blocks, -1, -2)[..., None]


def _as_stored(weights: CirculantMap, block_size, frequencies, dtype):
    del block_size, frequencies
    return CirculantMap(*(part.astype(dtype) for part in weights))


def _split(x, weights: CirculantMap, block_size, frequencies):
    real, imag = weights
    basis = _split_basis(block_size, frequencies).astype(x.dtype)
    count, p, q = real.shape
    tokens = len(x)
    # Filters are multiplied as they are stored, none of it copied: the few tokens are padded.
    spectrum = jnp.einsum("tpb,bfj->fjtp", x.reshape(tokens, p, block_size), basis)
    spectrum = spectrum.reshape(count, 2 * tokens, p)
    out = matmul(spectrum, real).reshape(count, 2, tokens, q)
    if len(imag):
        first = int(frequencies[0] == 0)
        last = first + len(imag)
        turned = matmul(spectrum[first:last], imag).reshape(len(imag), 2, tokens, q)
        turned = jnp.stack([-turned[:, 1], turned[:, 0]], axis=1)
        out += jnp.pad(turned, ((first, count - last), (0, 0), (0, 0), (0, 0)))
    y = jnp.einsum("fjtq,bfj->tqb", out, basis)
    return y.reshape(tokens, q * block_size)


def _split_basis(block_size: int, frequencies: Sequence[int]) -> np.ndarray:
    """Returns :func:`dft_basis` by frequency, ``(b, f, 2)``; DC and Nyquist have zeros."""
    pair, single = dft_basis(block_size, frequencies)
    basis = np.zeros((block_size, len(frequencies), 2))
    is_complex = np.isin(frequencies, complex_frequencies(frequencies, block_size))
    basis[:, is_complex] = pair
    basis[:, ~is_complex, 0] = single
    return basis


def _transfer_function(weights: CirculantMap, block_size, frequencies, dtype):
    del block_size, dtype
    real, imag = (part.astype(jnp.float32) for part in weights)
    before = int(frequencies[0] == 0)
    after = len(frequencies) - before - len(imag)
    return jax.lax.complex(real, jnp.pad(imag, ((before, after), (0, 0), (0, 0))))


def _fft(x, h, block_size, frequencies):
    kept = np.array(frequencies)
    _, p, q = h.shape
    blocks = x.reshape(len(x), p, block_size).astype(jnp.float32)
    spectrum = jnp.fft.rfft(blocks, axis=-1)[..., kept]
    out = jnp.einsum("tpf,fpq->tqf", spectrum, h, precision=jax.lax.Precision.HIGHEST)
    full = jnp.zeros((*out.shape[:-1], block_size // 2 + 1), out.dtype).at[..., kept].set(out)
    y = jnp.fft.irfft(full, n=block_size, axis=-1)
    return y.reshape(len(x), q * block_size).astype(x.dtype)


def _dft(x, weights, block_size, frequencies):
    spectrum = _Spectrum.of(block_size, frequencies)
    return spectrum.leave(_multiply(weights, spectrum.enter(x)))


def _materialised(weights: CirculantMap, block_size, frequencies, dtype):
    return circulant_matrix(*weights, block_size, frequencies).astype(dtype)


def _dense(x, matrix, block_size, frequencies):
    del block_size, frequencies
    return matmul(x, matrix)


class _CirculantPlan(NamedTuple):
    """How a block-circulant map runs.

    Attributes:
      lay_out: of weights, block size, frequencies and dtype; what may be done once.
      apply: of rows, what ``lay_out`` gave, block size and frequencies.
    """

    lay_out: Callable[..., Any]
    apply: Callable[..., Array]


_CIRCULANT = {
    "fft": _CirculantPlan(_transfer_function, _fft),
    "dft": _CirculantPlan(_spectral_weights, _dft),
    "split": _CirculantPlan(_as_stored, _split),
    "dense": _CirculantPlan(_materialised, _dense),
}


def _klt_weights(
    tokens: int, factors: KLTMap, implementation: str | None, lay_out: planning.LayOut, name: str
) -> tuple[Array, ...]:
    axes, filter = factors
    (d_in, rank), d_out = axes.shape, filter.shape[1]
    costs = planning.klt_costs(tokens, d_in, rank, d_out)
    problem = (tokens, d_in, rank, d_out, axes.dtype.name)
    plan = planning.pick("klt", implementation, costs, problem=problem)
    return lay_out(
        f"{name}_{plan}",
        lambda: (matmul(axes, filter),) if plan == "merged" else (axes, filter),
    )


def _multiply_in_turn(x, weights):
    if len(weights) == 1:
        return matmul(x, *weights)
    axes, filter = weights
    # A few components a token: kept for the backward pass, they save it the GEMM behind them.
    return _project(kept(_project(x, axes)), filter)


@jax.custom_vjp
def _project(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]) -> Float[Array, "*batch o"]:
    """:func:`matmul` whose kernel's gradient is computed with its longer side last.

    On CPU a product of few columns and many rows takes several times as long as its transpose.
    """
    return matmul(x, kernel)


def _project_backward(stored, dy):
    x, kernel = stored
    rows, grads = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    if kernel.shape[0] <= kernel.shape[1]:
        dk = _contract_first(rows, grads)
    else:
        dk = _contract_first(grads, rows).T
    return matmul(dy, kernel.T), dk.astype(kernel.dtype)


_project.defvjp(lambda x, kernel: (_project(x, kernel), (x, kernel)), _project_backward)


def _check_circulant(channels, weights: CirculantMap, block_size, frequencies) -> None:
    if not frequencies or any(a >= b for a, b in itertools.pairwise((-1, *frequencies))):
        raise ValueError(f"frequencies={frequencies}: expected non-negative integers, ascending")
    if frequencies[-1] > block_size // 2:
        raise ValueError(
            f"frequency {frequencies[-1]} does not exist: block_size={block_size} has "
            f"0 .. {block_size // 2}"
        )
    _, p, q = weights.real.shape
    count = len(complex_frequencies(frequencies, block_size))
    expected = ((len(frequencies), p, q), (count, p, q))
    for name, array, shape in zip(CirculantMap._fields, weights, expected, strict=True):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if channels != p * block_size:
        raise ValueError(f"x has {channels} channels, expected {p} blocks of {block_size}")


def _pick_circulant(tokens, maps: Sequence[CirculantMap], block_size, frequencies, implementation):
    products = circulant_products(frequencies, block_size)
    components = len(frequencies) + len(complex_frequencies(frequencies, block_size))
    sides = [weights.real.shape[1:] for weights in maps]
    each = [
        planning.block_circulant_costs(tokens, p, q, block_size, components, products)
        for p, q in sides
    ]
    costs = {plan: sum(cost[plan] for cost in each) for plan in each[0]}
    blocks = itertools.chain.from_iterable(sides)
    dtype = maps[0].real.dtype.name
    problem = (tokens, block_size, ",".join(map(str, frequencies)), *blocks, dtype)
    return planning.pick("block_circulant", implementation, costs, problem=problem)
