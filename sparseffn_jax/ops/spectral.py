"""Linear maps applied in a transform domain that keeps only some components.

- :func:`klt`: data-adapted axes, ``(x U) K``; two plain GEMMs.
- :func:`block_circulant`: a matrix of circulant ``b x b`` blocks, diagonal in the frequencies of
  a ``b``-point rFFT over channels (CirCNN, Ding et al. 2017). Never over tokens: that would let a
  position see its future.

Filters are real arrays. ``real`` holds the real part at every kept frequency; ``imag`` the
imaginary part at the kept frequencies that have one (DC and, for even b, Nyquist have none).
Shape letters: T tokens, b block size, p and q input and output blocks, f kept frequencies, c
those of them that are complex.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseffn_jax.ops import planning
from sparseffn_jax.ops.block_sparse import matmul


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
    tokens = math.prod(x.shape[:-1])
    costs = planning.klt_costs(tokens, axes.shape[0], axes.shape[1], filter.shape[1])
    if planning.pick("klt", implementation, costs) == "merged":
        return matmul(x, matmul(axes, filter))
    return matmul(matmul(x, axes), filter)


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
        ``"dft"`` (the b-point DFT as a real orthonormal product, one real ``2p x 2q`` GEMM a
        frequency), ``"dense"`` (the matrix materialised, one GEMM; the reference), or ``None``.

    Returns:
      ``(..., q * block_size)`` in the dtype of ``x``.

    Raises:
      ValueError: if shapes and frequencies do not fit together, or the plan is unknown.
    """
    frequencies = tuple(frequencies)
    if not frequencies or any(a >= b for a, b in itertools.pairwise((-1, *frequencies))):
        raise ValueError(f"frequencies={frequencies}: expected non-negative integers, ascending")
    if frequencies[-1] > block_size // 2:
        raise ValueError(
            f"frequency {frequencies[-1]} does not exist: block_size={block_size} has "
            f"0 .. {block_size // 2}"
        )
    complex_ones = complex_frequencies(frequencies, block_size)
    _, p, q = real.shape
    expected = {"real": (len(frequencies), p, q), "imag": (len(complex_ones), p, q)}
    for name, array in (("real", real), ("imag", imag)):
        if array.shape != expected[name]:
            raise ValueError(f"{name} has shape {array.shape}, expected {expected[name]}")
    if x.shape[-1] != p * block_size:
        raise ValueError(f"x has {x.shape[-1]} channels, expected {p} blocks of {block_size}")
    tokens = math.prod(x.shape[:-1])
    components = len(frequencies) + len(complex_ones)
    products = len(frequencies) + 3 * len(complex_ones)
    costs = planning.block_circulant_costs(tokens, p, q, block_size, components, products)
    plan = planning.pick("block_circulant", implementation, costs)
    blocks = x.reshape(-1, p, block_size)
    if plan == "dense":
        y = matmul(x, circulant_matrix(real, imag, block_size, frequencies).astype(x.dtype))
    elif plan == "dft":
        y = _dft(blocks, real, imag, block_size, frequencies)
    else:
        y = _fft(blocks, real, imag, block_size, frequencies)
    return y.reshape(*x.shape[:-1], q * block_size)


def complex_frequencies(frequencies: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Returns those frequencies whose component has an imaginary part."""
    return tuple(f for f in frequencies if f != 0 and 2 * f != block_size)


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
    at_complex, at_real = _split(real, block_size, frequencies)
    h = jnp.stack([jnp.stack([at_complex, imag], -1), jnp.stack([-imag, at_complex], -1)], -2)
    highest = jax.lax.Precision.HIGHEST
    c = jnp.einsum("nci,cpqij,mcj->pnqm", pair, h.astype(jnp.float32), pair, precision=highest)
    c += jnp.einsum("nf,fpq,mf->pnqm", single, at_real, single, precision=highest)
    _, p, q = real.shape
    return c.reshape(p * block_size, q * block_size)


def _split(real, block_size, frequencies):
    """Splits the real part into that of complex frequencies and that of DC and Nyquist."""
    # DC comes first and Nyquist last, so both parts are slices.
    first = int(frequencies[0] == 0)
    last = first + len(complex_frequencies(frequencies, block_size))
    return real[first:last], jnp.concatenate([real[:first], real[last:]])


def _dft(x, real, imag, block_size, frequencies):
    # Frequency-major: each frequency is one plain (T, 2p) x (2p, 2q) GEMM of a batch.
    tokens, p, _ = x.shape
    q = real.shape[2]
    pair, single = (part.astype(x.dtype) for part in dft_basis(block_size, frequencies))
    at_complex, at_real = _split(real.astype(x.dtype), block_size, frequencies)
    imag = imag.astype(x.dtype)
    parts = []
    if len(imag):
        spectrum = jnp.einsum("tpn,nci->ctip", x, pair).reshape(len(imag), tokens, 2 * p)
        weights = jnp.block([[at_complex, imag], [-imag, at_complex]])
        out = jnp.einsum("ctk,ckl->ctl", spectrum, weights).reshape(len(imag), tokens, 2, q)
        parts.append(jnp.einsum("ctjq,mcj->tqm", out, pair))
    if len(at_real):
        spectrum = jnp.einsum("tpn,nf->ftp", x, single)
        out = jnp.einsum("ftp,fpq->ftq", spectrum, at_real)
        parts.append(jnp.einsum("ftq,mf->tqm", out, single))
    return functools.reduce(jnp.add, parts)


def _fft(x, real, imag, block_size, frequencies):
    kept = np.array(frequencies)
    before = int(frequencies[0] == 0)
    after = len(frequencies) - before - len(imag)
    h = jax.lax.complex(
        real.astype(jnp.float32),
        jnp.pad(imag.astype(jnp.float32), ((before, after), (0, 0), (0, 0))),
    )
    spectrum = jnp.fft.rfft(x.astype(jnp.float32), axis=-1)[..., kept]
    out = jnp.einsum("tpf,fpq->tqf", spectrum, h, precision=jax.lax.Precision.HIGHEST)
    full = jnp.zeros((*out.shape[:-1], block_size // 2 + 1), out.dtype).at[..., kept].set(out)
    return jnp.fft.irfft(full, n=block_size, axis=-1).astype(x.dtype)
