"""A hidden layer between low-rank maps as one GPU kernel, whose hidden units never leave the chip.

The layer is attention in other words: the components of the tokens stand for queries, the filter
into the hidden units for keys, the axes out of them for values, and an elementwise function for the
softmax. As in FlashAttention (Dao 2023, 2307.08691) the forward pass goes through the hidden units
tile by tile. The backward pass computes them again in two kernels: one adds up the gradient of the
components over hidden units, the other the gradients of the weights over tokens.

Products take operands in their own precision and accumulate in float32; everything elementwise is
in float32. The kernels are written in Pallas and compiled by Triton.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseffn_jax.ops import fused
from sparseffn_jax.ops.divided import divided
from sparseffn_jax.ops.fused import Tile, arithmetic, call, pad, round_up
from sparseffn_jax.ops.fused_kernels import (
    Operands,
    components_kernel,
    forward_kernel,
    weights_kernel,
)
from sparseffn_jax.ops.hidden import Activate, Channels

# The narrowest operand of a matrix product.
_NARROWEST = 16
# The most hidden units of a tile: others are added until there is a multiple of them.
_UNITS = 128
# Multiprocessors of an H100, and the most shares of the tokens that are taken at the same time for
# one tile of hidden units, so that all of them have work; each share has gradients of its own.
_CORES, _MOST_SHARES = 132, 8
# Bytes of a multiprocessor's shared memory, but for some that hold numbers of single units.
_SHARED = 225 * 2**10


class _Tiles(NamedTuple):
    """The tiles of the three kernels, and the number of shares of the tokens in the third."""

    forward: Tile
    components: Tile
    weights: Tile
    shares: int


def refusal(ranks: Sequence[int], activate: Activate, dtype: Any) -> str | None:
    """Returns the reason why the kernels cannot run, or ``None`` if they can.

    Args:
      ranks: number of components of every map.
      activate: the elementwise function of the hidden units.
      dtype: dtype of the operands.
    """
    components, is_gated = sum(round_up(rank, _NARROWEST) for rank in ranks), len(ranks) > 2
    # As many as can be added up in registers, as the compiler says for an H100.
    most = (192 if is_gated else 256) if activate.degrees else 512
    if components > most:
        return f"ranks add up to {components}, and registers hold {most} components"
    return fused.refusal(activate, dtype)


def hidden_layer(
    components: Sequence[Float[Array, "T r"]],
    filters: Sequence[Float[Array, "r m"]],
    axes: Float[Array, "m s"],
    activate: Activate,
    channels: Channels,
    *,
    interpret: bool = False,
) -> Float[Array, "T s"]:
    """Computes ``activate(components @ filters) @ axes``.

    Args:
      components: the tokens' components for each map into the hidden units, (T, rank).
      filters: the weights of each map's components in the hidden units, (rank, m).
      axes: the axes of the map out of the hidden units, (m, rank); ranks may differ, and
        :func:`refusal` says what they may add up to.
      activate: the elementwise function that is applied to the hidden units.
      channels: biases and coefficients of ``activate``.
      interpret: whether to run the kernels in Pallas's interpreter, which needs no GPU.

    Returns:
      The components (T, rank) of the outputs, in the dtype of ``axes``.
    """
    coefficients = () if channels.coefficients is None else (channels.coefficients,)
    operands = Operands(tuple(components), tuple(filters), axes, channels.biases, coefficients)
    return _layer(activate, interpret, operands)


def _tiles(
    tokens: int, units: int, into: int, out_of: int, is_gated: bool, degrees: Sequence[int]
) -> _Tiles:
    """Returns the tiles that took an H200 the least time.

    Those that needed more registers than there are were left out, unless the clock liked them much
    better: the gradient of the components of wide gated layers took 0.56 ms with them and 0.98
    without.
    """
    components = into + out_of
    # Large tiles would leave multiprocessors without work where there are few tokens.
    has_many, is_wide = tokens > 8192, components > 320
    if has_many and not degrees and not (is_gated and is_wide):
        forward = Tile(128, 64, 8, 2 if is_wide else 3)
    else:
        forward = Tile(64, 64, 4, 3 if is_gated or is_wide else 2)
    # The components of the tokens, and the weights of the units that are loaded ahead.
    entries = forward.rows * into + forward.stages * forward.units * components
    if 2 * entries > _SHARED:
        forward = Tile(64, 64, 4, 2)
    if is_gated:
        of_components = Tile(64, 32 if degrees or is_wide else 64, 4, 3)
    elif is_wide:
        of_components = Tile(128, 32, 8, 3) if has_many else Tile(64, 32, 4, 3)
    else:
        of_components = Tile(64, 64, 4, 2)
    if components > 480:
        weights = Tile(32, 64, 8, 3)
    else:
        weights = Tile(32 if degrees or is_wide else 64, 128, 8, 3)
    count = -(-tokens // weights.rows)

    def turns(shares: int) -> int:
        return -(-(units // weights.units) * shares // _CORES) * -(-count // shares)

    return _Tiles(forward, of_components, weights, min(range(1, _MOST_SHARES + 1), key=turns))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer(activate, interpret, operands):
    (z,) = _run(functools.partial(_forward, activate, interpret), operands, (), ["t s"])
    return z


def _layer_forward(activate, interpret, operands):
    return _layer(activate, interpret, operands), operands


def _layer_backward(activate, interpret, operands, dz):
    axes = _axes_of(operands)
    run = functools.partial(_components_gradient, activate, interpret)
    d_components = _run(run, operands, (dz,), axes.components)
    # Hidden units first, and coefficients for each of them also where units share one.
    of_weights = Operands(
        (),
        tuple(" ".join(reversed(filter.split())) for filter in axes.filters),
        axes.axes,
        axes.biases,
        tuple("k u" for _ in axes.coefficients),
    )
    leaves, structure = jax.tree.flatten(of_weights)
    run = functools.partial(_weights_gradients, activate, interpret)
    sums = jax.tree.unflatten(structure, _run(run, operands, (dz,), leaves))
    gradients = Operands(
        tuple(d_components),
        tuple(d_filter.T for d_filter in sums.filters),
        sums.axes,
        sums.biases,
        tuple(
            dc.sum(axis=1, keepdims=True) if c.shape[1] == 1 else dc
            for dc, c in zip(sums.coefficients, operands.coefficients, strict=True)
        ),
    )
    return (jax.tree.map(lambda d, given: d.astype(given.dtype), gradients, operands),)


_layer.defvjp(_layer_forward, _layer_backward)


def _axes_of(operands: Operands) -> Any:
    """Names the axes of the operands: t tokens, u hidden units, and the components of each map."""
    maps = range(len(operands.components))
    return Operands(
        tuple(f"t r{i}" for i in maps),
        tuple(f"r{i} u" for i in maps),
        "u s",
        tuple("u" for _ in operands.biases),
        tuple("k u" if c.shape[1] > 1 else "k one" for c in operands.coefficients),
    )


def _run(
    run: Any, operands: Operands, others: tuple[Array, ...], results: Sequence[str]
) -> Sequence[Array]:
    """Runs a function of the operands, and of gradients of outputs, for the axes of its results."""
    leaves, structure = jax.tree.flatten(operands)

    def kernel(*arrays: Array) -> Sequence[Array]:
        return run(jax.tree.unflatten(structure, arrays[: len(leaves)]), *arrays[len(leaves) :])

    given = [*jax.tree.leaves(_axes_of(operands)), *("t s" for _ in others)]
    rule = f"{', '.join(given)} -> {', '.join(results)}"
    return divided(kernel, rule, ("t", "u"), *leaves, *others)


def _padded(
    activate: Activate, given: Operands, kernel: Literal["forward", "components", "weights"]
) -> tuple[Operands, Tile, int]:
    """Returns operands with sides that a kernel's tiles divide, its tile, and shares of tokens."""
    tokens, units = len(given.components[0]), len(given.axes)
    ranks = [round_up(len(filter), _NARROWEST) for filter in given.filters]
    into, out_of = sum(ranks), round_up(given.axes.shape[1], _NARROWEST)
    columns = round_up(units, _UNITS)
    tiles = _tiles(tokens, columns, into, out_of, len(ranks) > 1, activate.degrees)
    tile: Tile = getattr(tiles, kernel)
    shares = tiles.shares if kernel == "weights" else 1
    rows = round_up(tokens, tile.rows * shares)
    padded = Operands(
        tuple(pad(c, rows, rank) for c, rank in zip(given.components, ranks, strict=True)),
        tuple(pad(f, rank, columns) for f, rank in zip(given.filters, ranks, strict=True)),
        pad(given.axes, columns, out_of),
        tuple(pad(bias, columns) for bias in given.biases),
        tuple(pad(c, len(c), columns if c.shape[1] > 1 else 1) for c in given.coefficients),
    )
    return padded, tile, shares


def _forward(activate: Activate, interpret: bool, given: Operands) -> list[Array]:
    """Returns the components (T, rank) of the outputs."""
    operands, tile, _ = _padded(activate, given, "forward")
    rows, rank = len(operands.components[0]), operands.axes.shape[1]
    by = arithmetic(operands.axes.dtype, interpret=interpret)
    kernel = functools.partial(forward_kernel, activate, by, tile)
    out = jax.ShapeDtypeStruct((rows, rank), operands.axes.dtype)
    z = call(kernel, tile, (rows // tile.rows,), (operands,), out, interpret=interpret)
    return [z[: len(given.components[0]), : given.axes.shape[1]]]


def _components_gradient(
    activate: Activate, interpret: bool, given: Operands, dz: Array
) -> list[Array]:
    """Returns the gradient (T, rank) of the components for each map into the hidden units."""
    operands, tile, _ = _padded(activate, given, "components")
    rows = len(operands.components[0])
    by = arithmetic(dz.dtype, interpret=interpret)
    kernel = functools.partial(components_kernel, activate, by, tile)
    out = [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in operands.components]
    dz = pad(dz, rows, operands.axes.shape[1])
    gradients = call(kernel, tile, (rows // tile.rows,), (operands, dz), out, interpret=interpret)
    return [d[: len(c), : c.shape[1]] for d, c in zip(gradients, given.components, strict=True)]


def _weights_gradients(
    activate: Activate, interpret: bool, given: Operands, dz: Array
) -> list[Array]:
    """Returns in float32 the gradients (m, rank) of the filters, transposed, and of the axes.

    Behind them are those of biases, (m,), and coefficients, (terms, m).
    """
    operands, tile, shares = _padded(activate, given, "weights")
    rows, units = len(operands.components[0]), len(operands.axes)
    wanted = [
        *((len(given.axes), len(filter)) for filter in given.filters),
        given.axes.shape,
        *(bias.shape for bias in given.biases),
        *((len(c), len(given.axes)) for c in given.coefficients),
    ]
    full = [
        *(filter.shape[::-1] for filter in operands.filters),
        operands.axes.shape,
        *(bias.shape for bias in operands.biases),
        *((len(c), units) for c in operands.coefficients),
    ]
    out = [jax.ShapeDtypeStruct((shares, *shape), jnp.float32) for shape in full]
    turns = rows // tile.rows // shares
    by = arithmetic(dz.dtype, interpret=interpret)
    kernel = functools.partial(weights_kernel, activate, by, tile, turns)
    dz, grid = pad(dz, rows, operands.axes.shape[1]), (units // tile.units, shares)
    leaves = call(kernel, tile, grid, (operands, dz), out, interpret=interpret)
    return [
        leaf.sum(axis=0)[tuple(map(slice, shape))]
        for leaf, shape in zip(leaves, wanted, strict=True)
    ]
