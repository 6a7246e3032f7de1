"""A hidden layer between block-circulant maps as GPU kernels, whose hidden units stay on the chip.

XLA writes to memory after every step: the components of each frequency, the hidden units before and
behind their function, and their components again. Here one kernel goes from the components of the
inputs to those of the hidden units: it multiplies by the filter of each frequency, transforms back,
applies the function and transforms forth. The backward pass computes the hidden units again. Two
more kernels are the transforms at the narrow ends, each the other's transpose.

Products take operands in their own precision and accumulate in float32; everything elementwise is
in float32, the transforms of hidden units too. The kernels are written in Pallas and compiled by
Triton.

Shape letters: T tokens, b block size, n, p and q blocks, k components behind each other as
:func:`~sparseffn_jax.ops.filters.in_a_row` has them.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from sparseffn_jax.ops import fused
from sparseffn_jax.ops.divided import divided
from sparseffn_jax.ops.filters import Blocks, Filter, in_pairs, mix_all, spectral_matrices
from sparseffn_jax.ops.fourier import Spectrum, complex_frequencies
from sparseffn_jax.ops.fused import (
    Tile,
    arithmetic,
    call,
    derivatives,
    dot,
    hidden_units,
    pad,
    round_up,
)
from sparseffn_jax.ops.fused_transforms import analyse, synthesise
from sparseffn_jax.ops.hidden import Activate, Channels

# Sides of blocks: powers of two, as Triton wants them, and so small that the components of a block
# lie in registers side by side.
_SIZES = (2, 4, 8, 16)
# Its units are blocks: as many as the shortest side of a matrix product may have.
_TILE = Tile(rows=64, units=16, warps=4, stages=2)
# Blocks of the inputs that a product sums over at a time; the first that divides them is taken.
_DEPTHS = (64, 32, 16)
_NARROWEST = _DEPTHS[-1]
# The most components that a product at the ends takes of a block.
_GROUP = 4


class Operands(NamedTuple):
    """The arrays of a layer, or the kernels' references to them.

    Attributes:
      components: (k, p, T); the components of the inputs.
      filters: real and, where it has entries, imaginary part of each map's filter.
      biases: (b, q) of each of them; empty if there are none.
      coefficients: (terms, b, q) or (terms, 1, 1) of a polynomial; empty for a plain activation.
    """

    components: Any
    filters: tuple[tuple[Any, ...], ...]
    biases: tuple[Any, ...]
    coefficients: tuple[Any, ...]


class _Layer(NamedTuple):
    """What the kernels know when they are compiled.

    Attributes:
      blocks: block size and kept frequencies.
      activate: the elementwise function of the hidden units.
      interpret: whether to run in Pallas's interpreter.
    """

    blocks: Blocks
    activate: Activate
    interpret: bool


def refusal(blocks: Blocks, activate: Activate, dtype: Any) -> str | None:
    """Returns the reason why the kernels cannot run, or ``None`` if they can.

    Args:
      blocks: block size and kept frequencies.
      activate: the elementwise function of the hidden units.
      dtype: dtype of the operands.
    """
    if blocks.size not in _SIZES:
        return f"it takes blocks of {', '.join(map(str, _SIZES))} channels, not {blocks.size}"
    return fused.refusal(activate, dtype)


def hidden_components(
    components: Float[Array, "k p T"],
    filters: Sequence[Filter],
    blocks: Blocks,
    activate: Activate,
    channels: Channels,
    *,
    interpret: bool = False,
) -> Float[Array, "k q T"]:
    """Returns the components of the hidden units from those of the inputs.

    Args:
      components: the components of the inputs, as :func:`enter` returns them.
      filters: the filter of each map into the hidden units.
      blocks: block size and kept frequencies; :func:`refusal` says which sizes there may be.
      activate: the elementwise function that is applied to the hidden units.
      channels: biases and coefficients of ``activate``.
      interpret: whether to run the kernels in Pallas's interpreter, which needs no GPU.

    Returns:
      The components, in the dtype of ``components``.
    """

    def by_place(leaf: Array) -> Array:
        if leaf.shape[-1] == 1:
            return leaf[..., None]
        return jnp.swapaxes(leaf.reshape(*leaf.shape[:-1], -1, blocks.size), -1, -2)

    coefficients = () if channels.coefficients is None else (by_place(channels.coefficients),)
    biases = tuple(map(by_place, channels.biases))
    operands = Operands(components, tuple(map(tuple, filters)), biases, coefficients)
    return _hidden(_Layer(blocks, activate, interpret), operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def enter(blocks: Blocks, interpret: bool, x: Float[Array, "T nb"]) -> Float[Array, "k n T"]:
    """Returns the kept components of every block of channels; the tokens come last."""
    run = functools.partial(_enter, interpret)
    operands = _of_channels(blocks, x.dtype), x.reshape(len(x), -1, blocks.size)
    return divided(run, "g c m, t n b -> k n t", ("t", "n"), *operands)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def leave(
    blocks: Blocks, interpret: bool, components: Float[Array, "k n T"]
) -> Float[Array, "T nb"]:
    """Returns channels from their components; this is the transpose of :func:`enter`."""
    run = functools.partial(_leave, blocks.size, interpret)
    operands = _of_channels(blocks, components.dtype), components
    (x,) = divided(run, "g c m, k n t -> t n b", ("t", "n"), *operands)
    return x.reshape(len(x), -1)


enter.defvjp(
    lambda blocks, interpret, x: (enter(blocks, interpret, x), None),
    lambda blocks, interpret, _, dc: (leave(blocks, interpret, dc),),
)
leave.defvjp(
    lambda blocks, interpret, components: (leave(blocks, interpret, components), None),
    lambda blocks, interpret, _, dx: (enter(blocks, interpret, dx),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hidden(layer, operands):
    return _run(functools.partial(_forward, layer), operands, (), ["k u t"])[0]


def _hidden_forward(layer, operands):
    return _hidden(layer, operands), operands


def _hidden_backward(layer, operands, dz):
    components, filters, biases, coefficients = operands
    results = [
        *("k u t" for _ in filters),
        *("b u" for _ in biases),
        *("d b u" for _ in coefficients),
    ]
    run = functools.partial(_gradients, layer)
    gradients = iter(_run(run, operands, (dz,), results))
    dus = [in_pairs(next(gradients), layer.blocks) for _ in filters]

    def filtered(components, filters):
        pairs = in_pairs(components, layer.blocks)
        matrices = [spectral_matrices(Filter(*parts), layer.blocks) for parts in filters]
        return [mix_all(each, pairs) for each in matrices]

    _, pullback = jax.vjp(filtered, components, filters)
    of_channels = [
        d.sum(axis=(1, 2), keepdims=True) if d.ndim == 3 and given.shape[1:] == (1, 1) else d
        for d, given in zip(gradients, (*biases, *coefficients), strict=True)
    ]
    d_components, d_filters = pullback(dus)
    d_biases, d_coefficients = of_channels[: len(biases)], of_channels[len(biases) :]
    found = Operands(d_components, d_filters, tuple(d_biases), tuple(d_coefficients))
    return (jax.tree.map(lambda d, given: d.astype(given.dtype), found, operands),)


_hidden.defvjp(_hidden_forward, _hidden_backward)


def _run(
    run: Callable[..., Sequence[Array]],
    operands: Operands,
    others: tuple[Array, ...],
    results: Sequence[str],
) -> Sequence[Array]:
    """Runs a function of the operands, and of gradients of outputs, for the axes of its results.

    The axes are t tokens, u blocks of hidden units, and p of the inputs.
    """
    # Kernels take no arrays without entries.
    filters = tuple(tuple(part for part in filter if len(part)) for filter in operands.filters)
    operands = operands._replace(filters=filters)
    leaves, structure = jax.tree.flatten(operands)

    def kernel(*arrays: Array) -> Sequence[Array]:
        return run(jax.tree.unflatten(structure, arrays[: len(leaves)]), *arrays[len(leaves) :])

    given = [
        "k p t",
        *(axes for filter in filters for axes in ("f p u", "c p u")[: len(filter)]),
        *("b u" for _ in operands.biases),
        *("d one two" if c.shape[1:] == (1, 1) else "d b u" for c in operands.coefficients),
        *("k u t" for _ in others),
    ]
    rule = f"{', '.join(given)} -> {', '.join(results)}"
    return divided(kernel, rule, ("t", "u"), *leaves, *others)


def _basis(blocks: Blocks) -> np.ndarray:
    """Returns the orthonormal basis (b, k) of the kept components."""
    pairs, single = Spectrum.of(*blocks)
    return pairs if single is None else np.concatenate([pairs, single], axis=1)


def _of_channels(blocks: Blocks, dtype: Any) -> Array:
    """Returns what takes the channels of some blocks to their components: (k / g, g n, n b).

    A product gives g components of n blocks: the more of them, the fewer of its entries are zero.
    """
    basis = _basis(blocks)
    count = _TILE.units // math.gcd(basis.shape[1], _GROUP)
    each = np.stack([np.kron(np.eye(count), column) for column in basis.T])
    return jnp.asarray(each.reshape(-1, _TILE.units, count * blocks.size), dtype)


def _enter(interpret: bool, basis: Array, x: Float[Array, "T n b"]) -> list[Array]:
    tokens, count, size = x.shape
    units = basis.shape[2] // size
    group = _TILE.units // units
    rows, columns = round_up(tokens, _TILE.rows), round_up(count, units)

    def enter_kernel(basis_ref: Any, x_ref: Any, components_ref: Any) -> None:
        n, t = _here(units)
        tile = x_ref[t, _channels_of(n, size)]
        for i in range(len(basis_ref)):
            some = dot(basis_ref[i], tile, (1, 1)).astype(tile.dtype)
            components_ref[_group(i, group), n, t] = some.reshape(group, units, _TILE.rows)

    out = jax.ShapeDtypeStruct((group * len(basis), columns, rows), x.dtype)
    operands = (basis, pad(x, rows, columns, size).reshape(rows, -1))
    grid = (columns // units, rows // _TILE.rows)
    components = call(enter_kernel, _TILE, grid, operands, out, interpret=interpret)
    return [components[:, :count, :tokens]]


def _leave(
    size: int, interpret: bool, basis: Array, components: Float[Array, "k n T"]
) -> list[Array]:
    kept, count, tokens = components.shape
    units = basis.shape[2] // size
    group = _TILE.units // units
    rows, columns = round_up(tokens, _TILE.rows), round_up(count, units)

    def leave_kernel(basis_ref: Any, components_ref: Any, x_ref: Any) -> None:
        n, t = _here(units)
        total = jnp.zeros((_TILE.rows, units * size), jnp.float32)
        for i in range(len(basis_ref)):
            some = components_ref[_group(i, group), n, t]
            total += dot(some.reshape(_TILE.units, _TILE.rows), basis_ref[i], (0, 0))
        x_ref[t, _channels_of(n, size)] = total.astype(x_ref.dtype)

    out = jax.ShapeDtypeStruct((rows, columns * size), components.dtype)
    operands = (basis, pad(components, kept, columns, rows))
    grid = (columns // units, rows // _TILE.rows)
    x = call(leave_kernel, _TILE, grid, operands, out, interpret=interpret)
    return [x.reshape(rows, columns, size)[:tokens, :count]]


def _forward(layer: _Layer, given: Operands) -> list[Array]:
    """Returns the components (k, q, T) of the hidden units."""
    (kept, _, tokens), basis = given.components.shape, _basis(layer.blocks)
    padded, by = _padded(given), arithmetic(given.components.dtype, interpret=layer.interpret)
    columns, rows = padded.filters[0][0].shape[2], padded.components.shape[2]

    def circulant_kernel(given: Operands, z_ref: Any) -> None:
        n, t = _here()
        us = [synthesise(basis, each, by) for each in _filtered(layer.blocks, given, n, t)]
        hidden = [
            hidden_units(layer.activate, *_of_units(layer, given, place, n, at), by)
            for place, at in enumerate(zip(*us, strict=True))
        ]
        for k, component in enumerate(analyse(basis, hidden, by)):
            z_ref[k, n, t] = component.astype(z_ref.dtype)

    out = jax.ShapeDtypeStruct((kept, columns, rows), given.components.dtype)
    z = _call(circulant_kernel, columns, rows, (padded,), out, layer.interpret)
    return [z[:, : given.filters[0][0].shape[2], :tokens]]


def _gradients(layer: _Layer, given: Operands, dz: Float[Array, "k q T"]) -> list[Array]:
    """Returns the gradients of what the filters return, of biases, and of coefficients.

    They are (k, q, T) for each map, and in float32 (b, q) for each bias and (terms, b, q).
    """
    kept, count, tokens = dz.shape
    padded, maps, size = _padded(given), len(given.filters), layer.blocks.size
    columns, rows = padded.filters[0][0].shape[2], padded.components.shape[2]
    tiles, biases, basis = rows // _TILE.rows, len(given.biases), _basis(layer.blocks)
    by = arithmetic(dz.dtype, interpret=layer.interpret)

    def circulant_gradients_kernel(given: Operands, dz_ref: Any, *out: Any) -> None:
        (n, t), tile = _here(), pl.program_id(1)
        us = [synthesise(basis, each, by) for each in _filtered(layer.blocks, given, n, t)]
        dz = [dz_ref[k, n, t].astype(jnp.float32) for k in range(kept)]
        dus = []
        for place, (dh, *at) in enumerate(zip(synthesise(basis, dz, by), *us, strict=True)):
            at, coefficients = _of_units(layer, given, place, n, at)
            _, du, terms = derivatives(layer.activate, at, coefficients, dh, by)
            dus.append(du)
            for ref, each in zip(out[maps : maps + biases], du, strict=False):
                ref[tile, place, n] = each.sum(axis=1)
            for term, each in enumerate(terms):
                out[-1][tile, term, place, n] = each.sum(axis=1)
        for ref, du in zip(out, zip(*dus, strict=True), strict=False):
            for k, component in enumerate(analyse(basis, du, by)):
                ref[k, n, t] = component.astype(ref.dtype)

    of_channels = [
        *((tiles, size, columns) for _ in given.biases),
        *((tiles, len(c), size, columns) for c in given.coefficients),
    ]
    out = [
        *(jax.ShapeDtypeStruct((kept, columns, rows), dz.dtype) for _ in given.filters),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in of_channels),
    ]
    operands = (padded, pad(dz, kept, columns, rows))
    results = _call(circulant_gradients_kernel, columns, rows, operands, out, layer.interpret)
    return [
        *(du[:, :count, :tokens] for du in results[:maps]),
        *(each.sum(axis=0)[..., :count] for each in results[maps:]),
    ]


def _padded(given: Operands) -> Operands:
    """Returns the operands with sides that tiles divide."""
    _, p, tokens = given.components.shape
    rows, columns = round_up(p, _NARROWEST), round_up(given.filters[0][0].shape[2], _TILE.units)
    return Operands(
        pad(given.components, len(given.components), rows, round_up(tokens, _TILE.rows)),
        jax.tree.map(lambda part: pad(part, len(part), rows, columns), given.filters),
        tuple(pad(bias, len(bias), columns) for bias in given.biases),
        tuple(c if c.shape[2] == 1 else pad(c, *c.shape[:2], columns) for c in given.coefficients),
    )


def _call(
    kernel: Callable[..., None],
    columns: int,
    rows: int,
    operands: tuple[Any, ...],
    out: Any,
    interpret: bool,
) -> Any:
    # Programs that share their tokens run at the same time, and find them in the cache.
    grid = (columns // _TILE.units, rows // _TILE.rows)
    return call(kernel, _TILE, grid, operands, out, interpret=interpret)


def _here(units: int = _TILE.units) -> tuple[Any, Any]:
    """Returns the blocks and the tokens of a program's tile."""
    return (
        pl.ds(pl.program_id(0) * units, units),
        pl.ds(pl.program_id(1) * _TILE.rows, _TILE.rows),
    )


def _channels_of(n: Any, size: int) -> Any:
    return pl.ds(n.start * size, n.size * size)


def _group(i: int, components: int) -> Any:
    return pl.ds(i * components, components)


def _of_units(
    layer: _Layer, given: Operands, place: int, n: Any, us: Sequence[Array]
) -> tuple[Sequence[Array], dict[int, Array] | None]:
    """Returns pre-activations with their biases, and the coefficients of their polynomial."""

    def beside(ref: Any, *at: Any) -> Array:
        return ref[(*at, place, n)].astype(jnp.float32)[:, None]

    if given.biases:
        us = [u + beside(bias) for u, bias in zip(us, given.biases, strict=True)]
    if not given.coefficients:
        return us, None
    (ref,), degrees = given.coefficients, layer.activate.degrees
    if ref.shape[2] == 1:
        return us, {k: ref[term, 0, 0].astype(jnp.float32) for term, k in enumerate(degrees)}
    return us, {k: beside(ref, term) for term, k in enumerate(degrees)}


def _filtered(blocks: Blocks, given: Operands, n: Any, t: Any) -> list[list[Array]]:
    """Returns the components of a tile's pre-activations by each map, in float32."""
    kept, p, _ = given.components.shape
    depth = next(depth for depth in _DEPTHS if p % depth == 0)

    def turn(i: Array, sums: list[list[Array]]) -> list[list[Array]]:
        rows, sums = pl.ds(i * depth, depth), [list(each) for each in sums]
        for places, products in _products(blocks):
            inputs = {place: given.components[place, rows, t] for place in places}
            for each, filter in zip(sums, given.filters, strict=True):
                weights = {}
                for output, place, part, frequency, sign in products:
                    if (part, frequency) not in weights:
                        weights[part, frequency] = filter[part][frequency, rows, n]
                    weight = weights[part, frequency]
                    each[output] += dot(weight if sign > 0 else -weight, inputs[place], (0, 0))
        return sums

    zeros = [jnp.zeros((_TILE.units, _TILE.rows), jnp.float32)] * kept
    return jax.lax.fori_loop(0, p // depth, turn, [zeros for _ in given.filters])


def _products(
    blocks: Blocks,
) -> Iterator[tuple[Sequence[int], Sequence[tuple[int, int, int, int, int]]]]:
    """Yields the products with each frequency of a filter, and the components that they take.

    A product says the place of the component that it is added to, that of the component of the
    inputs, the part of the filter, 0 for real and 1 for imaginary, the place of the frequency in
    it, and the sign.
    """
    size, frequencies = blocks
    with_imag = complex_frequencies(frequencies, size)
    ends = [f for f in frequencies if f not in with_imag]
    # DC and Nyquist are a pair, the first; alone, one of them comes last.
    first = 2 if len(ends) == 2 else 0
    for place, f in enumerate(ends, 0 if first else 2 * len(with_imag)):
        yield (place,), [(place, place, 0, frequencies.index(f), 1)]
    for i, f in enumerate(with_imag):
        real, a = frequencies.index(f), first + 2 * i
        b = a + 1
        yield (a, b), [(a, a, 0, real, 1), (b, b, 0, real, 1), (a, b, 1, i, -1), (b, a, 1, i, 1)]
