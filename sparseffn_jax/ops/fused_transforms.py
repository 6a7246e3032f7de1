"""Transforms within the kernels of block-circulant layers, as sums of arrays in registers.

The places i, -i, b/2 - i and b/2 + i of a block go together: there each vector of the basis is the
same but for its sign, which halves the arithmetic, and halves it again.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparseffn_jax.ops.fused import Arithmetic

# Entries of a basis below it are zero: in double precision sines are not.
_ROUNDING = 1e-12


def synthesise(basis: np.ndarray, components: Sequence[Array], by: Arithmetic) -> list[Array]:
    """Returns the channels at each place of the blocks from their components.

    Args:
      basis: the orthonormal basis (b, k) of the components.
      components: one array for each of them, all of one shape.
      by: how to compute them.
    """
    size, parities = len(basis), _parities(basis)
    channels = [jnp.zeros_like(components[0])] * size
    for place in range(size // 4 + 1):
        sums: dict[tuple[bool, bool], Array] = {}
        for parity, weight, component in zip(parities, basis[place], components, strict=True):
            _add_to(sums, parity, float(weight), component, by)
        for at, sign in ((place, 1), (size // 2 - place, -1)):
            even, odd = (
                _sum(sums.get((is_even, True)), sums.get((is_even, False)), sign)
                for is_even in (True, False)
            )
            for mirrored, of_odd in ((at, 1), (-at % size, -1)):
                if (total := _sum(even, odd, of_odd)) is not None:
                    channels[mirrored] = total
    return channels


def analyse(basis: np.ndarray, channels: Sequence[Array], by: Arithmetic) -> list[Array]:
    """Returns components from the channels at each place; the transpose of :func:`synthesise`."""
    size, parities = len(basis), _parities(basis)

    def folded(place: int, sign: int) -> Array | None:
        mirrored = -place % size
        return _sum(channels[place], channels[mirrored] if mirrored != place else None, sign)

    sums: dict[int, Array] = {}
    for place in range(size // 4 + 1):
        far = size // 2 - place
        folds = {
            (is_even, is_same): _sum(
                folded(place, 1 if is_even else -1),
                folded(far, 1 if is_even else -1) if far != place else None,
                1 if is_same else -1,
            )
            for is_even in (True, False)
            for is_same in (True, False)
        }
        for k, weight in enumerate(basis[place]):
            _add_to(sums, k, float(weight), folds[parities[k]], by)
    return [sums[k] for k in range(basis.shape[1])]


def _parities(basis: np.ndarray) -> list[tuple[bool, bool]]:
    """Says of each vector whether it is the same at i and at -i, and at i and at b/2 - i."""
    places = np.arange(len(basis))
    first, second = basis[-places], basis[len(basis) // 2 - places]
    return [
        (np.allclose(vector, once), np.allclose(vector, other))
        for vector, once, other in zip(basis.T, first.T, second.T, strict=True)
    ]


def _add_to(sums: dict[Any, Array], key: Any, weight: float, term: Any, by: Arithmetic) -> None:
    """Adds a weighted term to one of the sums."""
    if abs(weight) > _ROUNDING:
        sums[key] = by.multiply_add(weight, term, sums[key]) if key in sums else weight * term


def _sum(one: Array | None, other: Array | None, sign: int) -> Array | None:
    """Adds or subtracts two arrays, each of which may be missing."""
    if other is None:
        return one
    signed = other if sign > 0 else -other
    return signed if one is None else one + signed
