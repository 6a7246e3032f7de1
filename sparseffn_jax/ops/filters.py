"""The filters of block-circulant maps, and products with them in the domain of frequencies.

Components of blocks come as :class:`~sparseffn_jax.ops.fourier.Spectrum` gives them: pairs, the
real and the imaginary part of a frequency or DC and Nyquist, which one matrix mixes, and the single
component where only one of DC and Nyquist is kept.

Shape letters: T tokens, p and q input and output blocks, f kept frequencies, c those of them that
are complex, k pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseffn_jax.ops.fourier import Spectrum, split_by_kind


class Filter(NamedTuple):
    """The weights of one map: its transfer function H at the kept frequencies, as real arrays.

    Output block j is ``sum_i irfft(H[:, i, j] * rfft(x_i))`` with ``H = real + 1j imag`` at the
    kept frequencies and zero elsewhere.

    Attributes:
      real: (f, p, q); the real part at every kept frequency.
      imag: (c, p, q); the imaginary part at the kept frequencies that have one: DC and, for even
        b, Nyquist have none.
    """

    real: Float[Array, "f p q"]
    imag: Float[Array, "c p q"]


class Blocks(NamedTuple):
    """The static description of a block-circulant map.

    Attributes:
      size: side b of a block; any positive integer that divides the channels.
      frequencies: the kept frequencies of the b-point real FFT, ascending, each from 0 to
        ``b // 2``.
    """

    size: int
    frequencies: tuple[int, ...]


class Matrices(NamedTuple):
    """One matrix for each frequency, in both orders.

    The forward and the backward pass then both read the rows of a matrix as they lie in memory.
    """

    weights: Float[Array, "k i o"]
    transposed: Float[Array, "k o i"]

    @classmethod
    def of(cls, weights: Float[Array, "k i o"]) -> "Matrices":
        """Returns the matrices in both orders."""
        return cls(weights, weights.mT)


# Pairs and the single component, or what is multiplied with them.
ByKind = tuple[Array | None, Array | None]
MatricesByKind = tuple[Matrices | None, Matrices | None]


def spectral_matrices(filter: Filter, blocks: Blocks) -> MatricesByKind:
    """Returns the real matrices of the pairs (2q x 2p) and of the single component (q x p)."""
    real, at_real = split_by_kind(filter.real, *blocks)
    imag = filter.imag
    # As filters are stored: this copies rows, and transposes nothing.
    pairs = jnp.block([[real, imag], [-imag, real]])
    if len(at_real) == 2:
        zero = jnp.zeros_like(at_real[:1])
        ends = jnp.block([[at_real[:1], zero], [zero, at_real[1:]]])
        return Matrices.of(jnp.concatenate([ends, pairs])), None
    return Matrices.of(pairs), Matrices.of(at_real) if len(at_real) else None


def mix_all(weights: MatricesByKind, components: ByKind) -> ByKind:
    """Multiplies the components of every frequency by its matrix."""
    pairs, single = (
        None if w is None or x is None else _mix(*w, x)
        for w, x in zip(weights, components, strict=True)
    )
    return pairs, single


def in_pairs(components: Float[Array, "2k+1 n T"], blocks: Blocks) -> ByKind:
    """Splits components that lie behind each other into pairs (k, 2 n, T) and the single one."""
    width = Spectrum.of(*blocks).pairs.shape[1]
    pairs, single = components[:width], components[width:]
    return (
        pairs.reshape(width // 2, -1, pairs.shape[2]) if width else None,
        single if len(single) else None,
    )


def in_a_row(components: ByKind) -> Float[Array, "2k+1 n T"]:
    """Returns components behind each other; this is the inverse of :func:`in_pairs`."""
    pairs, single = components
    rows = []
    if pairs is not None:
        rows.append(pairs.reshape(2 * len(pairs), -1, pairs.shape[2]))
    if single is not None:
        rows.append(single)
    return jnp.concatenate(rows) if len(rows) > 1 else rows[0]


@jax.custom_vjp
def _mix(
    weights: Float[Array, "k i o"], transposed: Float[Array, "k o i"], x: Float[Array, "k i T"]
) -> Float[Array, "k o T"]:
    """Multiplies every frequency's components by its matrix."""
    return _mix_forward(weights, transposed, x)[0]


def _mix_forward(weights, transposed, x):
    return jnp.matmul(transposed, x).astype(x.dtype), (weights, x)


def _mix_backward(stored, dy):
    weights, x = stored
    dw = jnp.einsum("kit,kot->kio", x, dy).astype(weights.dtype)
    return dw, None, jnp.matmul(weights, dy).astype(x.dtype)


_mix.defvjp(_mix_forward, _mix_backward)
