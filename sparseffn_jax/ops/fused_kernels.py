"""The kernels of :mod:`sparseffn_jax.ops.fused_hidden`, as a GPU runs them.

Each reads its operands by reference and works on a tile of tokens and hidden units at a time.
Triton wants powers of two: ranks are cut into pieces of such widths.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from sparseffn_jax.ops.fused import Arithmetic, Tile, derivatives, dot, hidden_units
from sparseffn_jax.ops.hidden import Activate

# The widest piece that a rank is cut into.
_WIDEST = 128


class Operands(NamedTuple):
    """The arrays of a layer, or the kernels' references to them.

    Attributes:
      components: (T, rank) of each map into the hidden units.
      filters: (rank, m) of each of them.
      axes: (m, rank); the axes of the map out of the hidden units.
      biases: (m,) of each map into the hidden units; empty if there are none.
      coefficients: (terms, m or 1) of a polynomial; empty for a plain activation.
    """

    components: tuple[Any, ...]
    filters: tuple[Any, ...]
    axes: Any
    biases: tuple[Any, ...]
    coefficients: tuple[Any, ...]


class _Gradients(NamedTuple):
    """The gradients of some hidden units' weights, in pieces along the ranks, units first."""

    filters: list[list[Array]]
    axes: list[Array]
    biases: list[Array]
    coefficients: list[Array]


def forward_kernel(
    activate: Activate, by: Arithmetic, tile: Tile, given: Operands, z_ref: Any
) -> None:
    """Computes the components of the outputs of some tokens from all hidden units."""
    rows = pl.ds(pl.program_id(0) * tile.rows, tile.rows)
    components = [_pieces(ref, rows) for ref in given.components]

    def turn(j: Array, sums: list[Array]) -> list[Array]:
        units = pl.ds(j * tile.units, tile.units)
        us = _pre_activations(components, given, units, axis=1)
        hidden = hidden_units(activate, us, _coefficients(activate, given, units, axis=1), by)
        return _added(sums, hidden.astype(z_ref.dtype), _pieces(given.axes, units))

    pieces = _cut(z_ref.shape[1])
    zeros = [jnp.zeros((tile.rows, piece.size), jnp.float32) for piece in pieces]
    sums = jax.lax.fori_loop(0, len(given.axes) // tile.units, turn, zeros)
    for piece, total in zip(pieces, sums, strict=True):
        z_ref[rows, piece] = total.astype(z_ref.dtype)


def components_kernel(
    activate: Activate, by: Arithmetic, tile: Tile, given: Operands, dz_ref: Any, *out: Any
) -> None:
    """Adds up the gradient of the components of some tokens over all hidden units."""
    rows = pl.ds(pl.program_id(0) * tile.rows, tile.rows)
    components = [_pieces(ref, rows) for ref in given.components]
    dz = _pieces(dz_ref, rows)

    def turn(j: Array, sums: list[list[Array]]) -> list[list[Array]]:
        units = pl.ds(j * tile.units, tile.units)
        us = _pre_activations(components, given, units, axis=1)
        dh = _sum_of_products(dz, _pieces(given.axes, units))
        coefficients = _coefficients(activate, given, units, axis=1)
        _, dus, _ = derivatives(activate, us, coefficients, dh, by)
        return [
            [
                total + dot(du.astype(dz_ref.dtype), filter[piece, units], (1, 1))
                for total, piece in zip(totals, _cut(len(filter)), strict=True)
            ]
            for totals, du, filter in zip(sums, dus, given.filters, strict=True)
        ]

    zeros = [
        [jnp.zeros((tile.rows, piece.size), jnp.float32) for piece in _cut(ref.shape[1])]
        for ref in out
    ]
    sums = jax.lax.fori_loop(0, len(given.axes) // tile.units, turn, zeros)
    for ref, totals in zip(out, sums, strict=True):
        for piece, total in zip(_cut(ref.shape[1]), totals, strict=True):
            ref[rows, piece] = total.astype(ref.dtype)


def weights_kernel(
    activate: Activate,
    by: Arithmetic,
    tile: Tile,
    turns: int,
    given: Operands,
    dz_ref: Any,
    *out: Any,
) -> None:
    """Adds up the gradients of the weights of some hidden units over a share of the tokens.

    Hidden units are the rows here: what is multiplied by the tokens' components then lies in
    registers as the product wants it, and the tensor cores' smallest number of rows, 64, falls on
    the units and not on a piece of a rank.
    """
    units, share = pl.ds(pl.program_id(0) * tile.units, tile.units), pl.program_id(1)
    coefficients = _coefficients(activate, given, units, axis=0)
    dtype = dz_ref.dtype

    def turn(i: Array, sums: _Gradients) -> _Gradients:
        rows = pl.ds((share * turns + i) * tile.rows, tile.rows)
        components, dz = [_pieces(ref, rows) for ref in given.components], _pieces(dz_ref, rows)
        us = _pre_activations(components, given, units, axis=0)
        dh = _sum_of_products(_pieces(given.axes, units), dz)
        hidden, dus, terms = derivatives(activate, us, coefficients, dh, by)
        return _Gradients(
            [
                _added(totals, du.astype(dtype), parts)
                for totals, du, parts in zip(sums.filters, dus, components, strict=True)
            ],
            _added(sums.axes, hidden.astype(dtype), dz),
            [total + du.sum(axis=1) for total, du in zip(sums.biases, dus, strict=False)],
            [s + term.sum(axis=1) for s, term in zip(sums.coefficients, terms, strict=True)],
        )

    def zeros(*shape: int) -> Array:
        return jnp.zeros((tile.units, *shape), jnp.float32)

    start = _Gradients(
        [[zeros(piece.size) for piece in _cut(len(filter))] for filter in given.filters],
        [zeros(piece.size) for piece in _cut(given.axes.shape[1])],
        [zeros() for _ in given.biases],
        [zeros() for _ in coefficients or ()],
    )
    sums = jax.lax.fori_loop(0, turns, turn, start)
    refs = iter(out)
    for totals in (*sums.filters, sums.axes):
        ref = next(refs)
        for piece, total in zip(_cut(ref.shape[-1]), totals, strict=True):
            ref[share, units, piece] = total
    for total in sums.biases:
        next(refs)[share, units] = total
    for term, total in enumerate(sums.coefficients):
        out[-1][share, term, units] = total


def _cut(rank: int) -> list[Any]:
    """Cuts a rank, a multiple of 16, into slices whose widths are powers of two."""
    pieces, start = [], 0
    while start < rank:
        width = min(_WIDEST, 1 << int(math.log2(rank - start)))
        pieces.append(pl.ds(start, width))
        start += width
    return pieces


def _pieces(ref: Any, rows: Any) -> list[Array]:
    """Reads rows of the components."""
    return [ref[rows, piece] for piece in _cut(ref.shape[1])]


def _sum_of_products(left: Sequence[Array], right: Sequence[Array], over=(1, 1)) -> Any:
    """Returns one product of matrices that are cut into pieces along the axis it sums over."""
    return sum(dot(a, b, over) for a, b in zip(left, right, strict=True))


def _added(totals: Sequence[Array], left: Array, right: Sequence[Array]) -> list[Array]:
    """Adds a product to its sums, which are in pieces as the right operand is."""
    return [total + dot(left, piece) for total, piece in zip(totals, right, strict=True)]


def _pre_activations(
    components: Sequence[Sequence[Array]], given: Operands, units: Any, axis: int
) -> list[Array]:
    """Returns the pre-activations of some units by each map, with its bias, in float32.

    The hidden units lie along ``axis``, the tokens along the other.
    """
    us = []
    for parts, filter in zip(components, given.filters, strict=True):
        weights = [filter[piece, units] for piece in _cut(len(filter))]
        us.append(
            _sum_of_products(parts, weights, (1, 0))
            if axis == 1
            else _sum_of_products(weights, parts, (0, 1))
        )
    biases = [_beside(bias[units], axis) for bias in given.biases]
    return [u + bias for u, bias in zip(us, biases, strict=True)] if biases else us


def _coefficients(
    activate: Activate, given: Operands, units: Any, axis: int
) -> dict[int, Array] | None:
    """Reads the coefficients of some hidden units, which lie along ``axis``, by their degrees."""
    if not given.coefficients:
        return None
    (ref,) = given.coefficients
    if ref.shape[1] == 1:
        return {k: ref[term, 0].astype(jnp.float32) for term, k in enumerate(activate.degrees)}
    return {k: _beside(ref[term, units], axis) for term, k in enumerate(activate.degrees)}


def _beside(numbers: Array, axis: int) -> Array:
    """Returns numbers, one a hidden unit, in float32 and so that they broadcast against units."""
    numbers = numbers.astype(jnp.float32)
    return numbers[None, :] if axis == 1 else numbers[:, None]
