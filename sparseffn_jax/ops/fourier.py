"""The kept part of a real DFT of blocks of channels: its basis and its transforms.

Shape letters: T tokens, b block size, n blocks, k pairs of components.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The largest blocks that are filled by a product, whose constant has as many entries as a block's
# side cubed; larger ones are gathered.
_MOST_PLACED = 64


def complex_frequencies(frequencies: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Returns the frequencies whose component has an imaginary part: all but DC and Nyquist."""
    return tuple(f for f in frequencies if f != 0 and 2 * f != block_size)


def circulant_products(frequencies: Sequence[int], block_size: int) -> int:
    """Counts the real products behind one entry of the filter, summed over kept frequencies.

    A complex frequency costs four products. DC or Nyquist alone costs one; both together cost four,
    because they share one real ``2q x 2p`` GEMM, as the two parts of a complex frequency do.
    """
    complex_count = len(complex_frequencies(frequencies, block_size))
    alone = len(frequencies) - complex_count
    return 4 * complex_count + (4 if alone == 2 else alone)


def dft_basis(block_size: int, frequencies: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the orthonormal real DFT, split by kind of component, in float64.

    Args:
      block_size: number b of points.
      frequencies: the f kept frequencies, ascending, of which c are complex.

    Returns:
      The real and imaginary analysis vectors of the complex frequencies, ``(b, c, 2)``, and the
      analysis vectors of DC and Nyquist, ``(b, f - c)``. Synthesis is the transpose.
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
    dtype: Any = jnp.float32,
) -> Float[Array, "pb qb"]:
    """Returns the block-circulant matrix C of the map ``y = x C``.

    Args:
      real: real part of the filter at every kept frequency, (f, p, q).
      imag: imaginary part at the c kept frequencies that have one, (c, p, q).
      block_size: side b of a block.
      frequencies: the f kept frequencies, ascending.
      dtype: dtype of the matrix, whose entries are computed in float32.

    Returns:
      The matrix (p * b, q * b).
    """
    pair, single = (part.astype(np.float32) for part in dft_basis(block_size, frequencies))
    at_complex, at_real = split_by_kind(real, block_size, frequencies)
    h = jnp.stack([jnp.stack([at_complex, imag], -1), jnp.stack([-imag, at_complex], -1)], -2)
    highest = jax.lax.Precision.HIGHEST
    # The first row of each block says all: the others are the same, shifted.
    row = jnp.einsum("ci,cpqij,mcj->pqm", pair[0], h.astype(jnp.float32), pair, precision=highest)
    row += jnp.einsum("f,fpq,mf->pqm", single[0], at_real, single, precision=highest)
    n, m = np.indices((block_size, block_size))
    row = row.astype(dtype)
    if block_size <= _MOST_PLACED:
        # A product with zeros and ones is exact in any precision, and so is its gradient a product.
        place = jnp.asarray((m - n) % block_size == np.arange(block_size)[:, None, None], dtype)
        c = jnp.einsum("pqk,knm->pnqm", row, place)
    else:
        c = row[..., (m - n) % block_size].transpose(0, 2, 1, 3)
    _, p, q = real.shape
    return c.reshape(p * block_size, q * block_size)


def split_by_kind(real, block_size, frequencies):
    """Splits the real part: first the complex frequencies, then DC and Nyquist."""
    # DC comes first and Nyquist last, so both parts are slices.
    first = int(frequencies[0] == 0)
    last = first + len(complex_frequencies(frequencies, block_size))
    return real[first:last], jnp.concatenate([real[:first], real[last:]])


class Spectrum(NamedTuple):
    """The kept part of a b-point real DFT along the first axis of channel-major arrays.

    Components come in *pairs* that one GEMM mixes: the real and the imaginary part of a frequency,
    or DC and Nyquist. If only one of DC and Nyquist is kept, it is the *single* component.

    Attributes:
      pairs: orthonormal basis, ``(b, 2 k)``, with the first and the second component of every pair
        side by side.
      single: basis of the single component, ``(b, 1)``; ``None`` where there is none.
    """

    pairs: np.ndarray
    single: np.ndarray | None

    @classmethod
    def of(cls, block_size: int, frequencies: Sequence[int]) -> "Spectrum":
        """Returns the transform that keeps some frequencies of a ``block_size``-point DFT."""
        pair, single = dft_basis(block_size, frequencies)
        pairs = pair.reshape(block_size, -1)
        if single.shape[1] == 2:
            return cls(np.concatenate([single, pairs], axis=1), None)
        return cls(pairs, single if single.shape[1] else None)

    def analyse(self, x: Float[Array, "b n T"]) -> tuple[Array | None, Array | None]:
        """Returns the components of the pairs (k, 2 n, T) and the single component (1, n, T)."""
        return self._split(_transform, x)

    def enter(self, x: Float[Array, "T nb"]) -> tuple[Array | None, Array | None]:
        """Returns the components that :meth:`analyse` would, of channels with the tokens first."""
        return self._split(_enter, x)

    def synthesise(self, components: tuple[Array | None, Array | None]) -> Float[Array, "b n T"]:
        """Returns channels from their components; this is the transpose of :meth:`analyse`."""
        return self._join(_transform, components)

    def leave(self, components: tuple[Array | None, Array | None]) -> Float[Array, "T nb"]:
        """Returns channels from their components; this is the transpose of :meth:`enter`."""
        return self._join(_leave, components)

    def _split(self, transform: Callable[..., Any], x: Array) -> tuple[Array | None, Array | None]:
        pairs = single = None
        if self.pairs.size:
            parts = transform(self.pairs, x)
            pairs = parts.reshape(len(parts) // 2, 2 * parts.shape[1], parts.shape[2])
        if self.single is not None:
            single = transform(self.single, x)
        return pairs, single

    def _join(self, transform: Callable[..., Any], components: Sequence[Array | None]) -> Array:
        pairs, single = components
        parts = []
        if pairs is not None:
            split = pairs.reshape(2 * len(pairs), pairs.shape[1] // 2, pairs.shape[2])
            parts.append(transform(self.pairs.T, split))
        if single is not None and self.single is not None:
            parts.append(transform(self.single.T, single))
        return sum(parts[1:], parts[0])


# What follows has its backward pass written out, because autodiff's transposes the wide arrays
# on their way into a GEMM. The basis is contracted along its first axis: XLA's CPU kernels read
# the wide operand of such a product in place.


def _with_transpose(
    function: Callable[[np.ndarray, Array], Array], transpose: Callable[[np.ndarray, Array], Array]
) -> Callable[[np.ndarray, Array], Array]:
    """Returns a linear function of a basis and an array with its transpose as backward pass."""
    linear = jax.custom_vjp(function, nondiff_argnums=(0,))
    # Both rules are plain functions, which are differentiated forwards too: for the products of a
    # Hessian with vectors.
    linear.defvjp(
        lambda basis, x: (function(basis, x), None),
        lambda basis, _, dy: (transpose(basis.T, dy),),
    )
    return linear


def _transformed(basis: np.ndarray, x: Float[Array, "b n T"]) -> Float[Array, "k n T"]:
    """Applies ``basis`` (b, k) along the first axis."""
    basis = np.ascontiguousarray(basis).astype(x.dtype)
    b, n, tokens = x.shape
    y = jnp.einsum("bk,bt->kt", basis, x.reshape(b, n * tokens))
    return y.reshape(len(y), n, tokens)


def _entered(basis: np.ndarray, x: Float[Array, "T nb"]) -> Float[Array, "k n T"]:
    """Applies ``basis`` (b, k) to every block of channels; the tokens come last."""
    tokens, channels = x.shape
    b = len(basis)
    return _transformed(basis, x.reshape(tokens, channels // b, b).transpose(2, 1, 0))


def _left(basis: np.ndarray, x: Float[Array, "k n T"]) -> Float[Array, "T nb"]:
    """Applies ``basis`` (k, b) along the first axis; the tokens come first."""
    k, n, tokens = x.shape
    # The product comes last: what a loop writes into its result can then be written as it is.
    rows = x.transpose(2, 1, 0).reshape(tokens * n, k)
    return (rows @ jnp.asarray(basis, x.dtype)).reshape(tokens, n * basis.shape[1])


_transform = _with_transpose(_transformed, _transformed)
_enter = _with_transpose(_entered, _left)
_leave = _with_transpose(_left, _entered)
