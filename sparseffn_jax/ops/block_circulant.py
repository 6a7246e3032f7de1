"""Block-circulant linear maps: matrices of circulant ``b x b`` blocks (CirCNN, Ding et al. 2017).

Such a matrix is diagonal in the frequencies of a ``b``-point real DFT over channels; a static mask
keeps some of them. The transform never runs over tokens: that would let a position see its future.

:func:`choose` picks a plan, :func:`pack` brings filters into the form that the plan multiplies by,
and :func:`apply` runs a hidden layer between two such maps, which is where the time goes: its
hidden activations are many, and the arithmetic on them is little. :func:`block_circulant_matmul`
runs one map alone.

Shape letters: T tokens, b block size, p and q input and output blocks, f kept frequencies, c those
of them that are complex.
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

from sparseffn_jax.ops import fused_circulant
from sparseffn_jax.ops.filters import (
    Blocks,
    Filter,
    MatricesByKind,
    in_a_row,
    in_pairs,
    mix_all,
    spectral_matrices,
)
from sparseffn_jax.ops.fourier import (
    Spectrum,
    circulant_matrix,
    circulant_products,
    complex_frequencies,
    dft_basis,
)
from sparseffn_jax.ops.hidden import (
    Activate,
    Channels,
    HiddenMaps,
    HiddenPlan,
    MapPlan,
    Packed,
    by_platform,
    over_tokens,
)
from sparseffn_jax.ops.plans import costs
from sparseffn_jax.ops.plans.choice import pick
from sparseffn_jax.ops.plans.costs import Platform
from sparseffn_jax.ops.plans.kernels import devices

_FUSED = "fused"


def hidden_layer(
    x: Float[Array, "*batch pb"],
    weights: HiddenMaps,
    blocks: Blocks,
    activate: Activate,
    channels: Channels,
    *,
    implementation: str | None = None,
    packed: Packed | None = None,
) -> Float[Array, "*batch rb"]:
    """Runs a hidden layer between block-circulant maps, with a plan for each platform.

    Args:
      x: inputs (..., p * b).
      weights: the :class:`Filter` of each map, in the dtype of ``x``.
      blocks: block size and kept frequencies.
      activate: the elementwise function that is applied to the hidden units.
      channels: biases and coefficients of ``activate``.
      implementation: name of the plan to run, or ``None``; :func:`choose` lists the names.
      packed: filters that :func:`pack` returned earlier, by the layout of their plan. A plan whose
        layout is missing has its filters packed by this call.

    Returns:
      The outputs (..., r * b), in the dtype of ``x``.

    Raises:
      ValueError: if filters, block size and frequencies do not fit together, or there is no such
        plan.
    """

    def run(plan: HiddenPlan, x: Array, weights: HiddenMaps, channels: Channels) -> Array:
        ready = (packed or {}).get(plan.layout)
        return apply(x, ready or pack(weights, plan, blocks), plan, blocks, activate, channels)

    tokens = math.prod(x.shape[:-1])
    return by_platform(
        lambda platform: choose(tokens, weights, blocks, activate, platform, implementation),
        run,
        *(x, weights, channels),
    )


def choose(
    tokens: int,
    weights: HiddenMaps,
    blocks: Blocks,
    activate: Activate,
    platform: Platform,
    implementation: str | None = None,
) -> HiddenPlan:
    """Picks the plan for a hidden layer between block-circulant maps; all maps share it.

    The plans are:

    - ``"fft"`` calls ``jnp.fft``; it computes in float32, because XLA has no FFT in half precision;
    - ``"dft"`` writes the b-point DFT as a real orthonormal matrix product, followed by one real
      ``2q x 2p`` GEMM for each frequency;
    - ``"split"`` does the same, but multiplies by the real and the imaginary part of the filter
      separately, as they are stored, which suits few tokens;
    - ``"dense"`` builds the whole matrix and runs one GEMM; it is the reference;
    - ``"fused"`` goes from the components of the inputs to those of the hidden units in a kernel of
      its own, on Hopper GPUs and in half precision; on CPU it is interpreted.

    Args:
      tokens: number of rows of the input.
      weights: the :class:`Filter` of each map, or arrays of the same shapes and dtype.
      blocks: block size and kept frequencies.
      activate: the elementwise function of the hidden units.
      platform: the platform that the program is compiled for.
      implementation: name of the plan to force, or ``None`` to take the cheapest.

    Returns:
      The plan, with the tile of tokens that suits the platform.

    Raises:
      ValueError: if filters, block size and frequencies do not fit together, there is no such plan,
        or it cannot run here.
    """
    maps = (*weights.up, weights.down)
    plan = _pick(tokens, maps, blocks, platform, implementation, activate)
    if plan.name == _FUSED:
        return HiddenPlan(("split",) * len(weights.up), "dft", is_fused=True)
    return HiddenPlan((plan.name,) * len(weights.up), plan.name, plan.tile)


def choose_map(
    tokens: int,
    filter: Filter,
    blocks: Blocks,
    platform: Platform,
    implementation: str | None = None,
) -> MapPlan:
    """Picks the plan of one map; arguments and errors are those of :func:`choose`."""
    return _pick(tokens, (filter,), blocks, platform, implementation)


def _pick(
    tokens: int,
    maps: Sequence[Filter],
    blocks: Blocks,
    platform: Platform,
    implementation: str | None,
    activate: Activate | None = None,
) -> MapPlan:
    """Picks the plan that all maps share; the last map's inputs are what a tile has to hold.

    Maps with a function between them may have a kernel for all that is as wide as the hidden units.
    """
    for filter in maps:
        _check(filter, blocks)
    size, frequencies = blocks
    products = circulant_products(frequencies, size)
    components = len(frequencies) + len(complex_frequencies(frequencies, size))
    sides = [(filter.real.shape[1], filter.real.shape[2]) for filter in maps]
    each = [
        costs.block_circulant_costs(tokens, p, q, size, components, products, platform)
        for p, q in sides
    ]
    estimates = {plan: sum(cost[plan] for cost in each) for plan in each[0]}
    dtype, refused = maps[-1].real.dtype, {}
    if activate is not None and (platform == "gpu" or implementation == _FUSED):
        estimates |= costs.fused_circulant_costs(
            tokens, sides, size, components, products, estimates, devices()
        )
        if reason := fused_circulant.refusal(blocks, activate, dtype):
            refused[_FUSED] = reason
    problem = (
        tokens,
        size,
        ",".join(map(str, frequencies)),
        *itertools.chain.from_iterable(sides),
        dtype.name,
    )
    plan = pick("block_circulant", implementation, estimates, refused, problem, platform)
    tile = None
    if plan == "dft":
        token_bytes = maps[-1].real.shape[1] * size * dtype.itemsize
        tile = costs.token_tile("block_circulant", tokens, token_bytes, platform)
    return MapPlan(plan, tile)


def pack(weights: HiddenMaps, plan: HiddenPlan, blocks: Blocks) -> HiddenMaps:
    """Returns the arrays that each map multiplies by under a plan.

    The plan ``"fft"`` takes complex64, the others take the dtype of the filter.

    Args:
      weights: the :class:`Filter` of each map.
      plan: a plan that :func:`choose` picked.
      blocks: block size and kept frequencies.
    """
    return HiddenMaps(
        tuple(
            pack_map(filter, name, blocks) for filter, name in zip(weights.up, plan.up, strict=True)
        ),
        pack_map(weights.down, plan.down, blocks),
    )


def apply(
    x: Float[Array, "*batch pb"],
    packed: HiddenMaps,
    plan: HiddenPlan,
    blocks: Blocks,
    activate: Activate,
    channels: Channels,
) -> Float[Array, "*batch rb"]:
    """Applies block-circulant maps, an elementwise function and another block-circulant map.

    The ``"dft"`` plan keeps the hidden activations channel-major, ``(b, q, T)``: the frequencies
    of a block come first and the tokens last, so that both transforms are one thin GEMM, every
    frequency is one plain GEMM, and nothing is transposed but the narrow ends. It works in tiles
    of tokens that the backward pass recomputes. The ``"fused"`` plan has the same order, and a
    kernel between both products that keeps the hidden activations on the chip.

    Args:
      x: inputs (..., p * b).
      packed: filters that :func:`pack` returned for ``plan``.
      plan: a plan that :func:`choose` picked.
      blocks: block size and kept frequencies.
      activate: the elementwise function that is applied to the hidden units.
      channels: biases and coefficients of ``activate``.

    Returns:
      The outputs (..., r * b), in the dtype of ``x``.
    """

    def apart(x: Array, packed: HiddenMaps, channels: Channels) -> Array:
        with jax.named_scope("spectral_up"):
            maps = zip(packed.up, plan.up, strict=True)
            us = [multiply(x, weights, name, blocks) for weights, name in maps]
        with jax.named_scope("polynomial"):
            hidden = activate(us, channels)
        with jax.named_scope("spectral_down"):
            return multiply(hidden, packed.down, plan.down, blocks)

    def fused(interpret: bool, x: Array, packed: HiddenMaps, channels: Channels) -> Array:
        with jax.named_scope("spectral_up"):
            components: Any = fused_circulant.enter(blocks, interpret, x)
            z = fused_circulant.hidden_components(
                components, packed.up, blocks, activate, channels, interpret=interpret
            )
        with jax.named_scope("spectral_down"):
            y = in_a_row(mix_all(packed.down, in_pairs(z, blocks)))
            return fused_circulant.leave(blocks, interpret, y)

    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if plan.is_fused:
        # Other platforms have no compiler for the kernel.
        y = jax.lax.platform_dependent(
            *(rows, packed, channels),
            cpu=functools.partial(fused, True),
            cuda=functools.partial(fused, False),
            default=apart,
        )
    elif plan.down == "dft":
        y = over_tokens(_channel_major(packed, blocks, activate, channels), rows, plan.tile)
    else:
        y = apart(rows, packed, channels)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def block_circulant_matmul(
    x: Float[Array, "*batch pb"],
    filter: Filter,
    blocks: Blocks,
    *,
    implementation: str | None = None,
    packed: Packed | None = None,
) -> Float[Array, "*batch qb"]:
    """Applies one block-circulant map, with a plan for each platform.

    Args:
      x: inputs (..., p * b).
      filter: the weights, in the dtype of ``x``.
      blocks: block size and kept frequencies.
      implementation: name of the plan to run, or ``None``; :func:`choose` lists the names.
      packed: arrays that :func:`pack_map` returned earlier, by the layout of their plan. A plan
        whose layout is missing has its filter packed by this call.

    Returns:
      The outputs (..., q * b), in the dtype of ``x``.

    Raises:
      ValueError: if filter, block size and frequencies do not fit together, or there is no such
        plan.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def run(plan: MapPlan, rows: Array, filter: Filter) -> Array:
        ready = (packed or {}).get(plan.layout)
        weights = pack_map(filter, plan.name, blocks) if ready is None else ready
        return over_tokens(lambda x: multiply(x, weights, plan.name, blocks), rows, plan.tile)

    y = by_platform(
        lambda platform: choose_map(len(rows), filter, blocks, platform, implementation),
        run,
        *(rows, filter),
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def pack_map(filter: Filter, plan: str, blocks: Blocks) -> Any:
    """Returns the arrays that :func:`multiply` needs to apply one map by a plan."""
    return _PLANS[plan].pack(filter, blocks)


def multiply(x: Float[Array, "t pb"], packed: Any, plan: str, blocks: Blocks) -> Array:
    """Applies one block-circulant map, with weights that were packed for the plan.

    Args:
      x: inputs (tokens, p * b).
      packed: arrays that :func:`pack_map` returned for the same plan.
      plan: name of the plan.
      blocks: block size and kept frequencies.

    Returns:
      The outputs (tokens, q * b), in the dtype of ``x``.
    """
    return _PLANS[plan].multiply(x, packed, blocks)


def _channel_major(
    packed: HiddenMaps, blocks: Blocks, activate: Activate, channels: Channels
) -> Callable[[Float[Array, "t pb"]], Float[Array, "t rb"]]:
    spectrum = Spectrum.of(*blocks)
    channels = jax.tree.map(lambda leaf: _channels_first(leaf, blocks.size), channels)

    def rows(x):
        with jax.named_scope("spectral_up"):
            components = spectrum.enter(x)
            us = [spectrum.synthesise(mix_all(weights, components)) for weights in packed.up]
        with jax.named_scope("polynomial"):
            hidden = activate(us, channels)
        with jax.named_scope("spectral_down"):
            return spectrum.leave(mix_all(packed.down, spectrum.analyse(hidden)))

    return rows


def _channels_first(leaf: Array, block_size: int) -> Array:
    """Lays an array out so that its last axis runs along ``(b, n, T)`` arrays."""
    if leaf.shape[-1] == 1:
        return leaf[..., None, None]
    blocks = leaf.reshape(*leaf.shape[:-1], -1, block_size)
    return jnp.swapaxes(blocks, -1, -2)[..., None]


def _as_stored(filter: Filter, blocks: Blocks) -> Filter:
    del blocks
    return filter


def _split(x: Array, filter: Filter, blocks: Blocks) -> Array:
    (real, imag), (block_size, frequencies) = filter, blocks
    basis = _split_basis(block_size, frequencies).astype(x.dtype)
    count, p, q = real.shape
    tokens = len(x)
    # Filters are multiplied as they are stored, none of it copied: the few tokens are padded.
    spectrum = jnp.einsum("tpb,bfj->fjtp", x.reshape(tokens, p, block_size), basis)
    spectrum = spectrum.reshape(count, 2 * tokens, p)
    out = (spectrum @ real).reshape(count, 2, tokens, q)
    if len(imag):
        first = int(frequencies[0] == 0)
        last = first + len(imag)
        turned = (spectrum[first:last] @ imag).reshape(len(imag), 2, tokens, q)
        turned = jnp.stack([-turned[:, 1], turned[:, 0]], axis=1)
        out += jnp.pad(turned, ((first, count - last), (0, 0), (0, 0), (0, 0)))
    y = jnp.einsum("fjtq,bfj->tqb", out, basis)
    return y.reshape(tokens, q * block_size)


def _split_basis(block_size: int, frequencies: Sequence[int]) -> np.ndarray:
    """Returns the basis of :func:`dft_basis` by frequency, ``(b, f, 2)``.

    The second component of DC and of Nyquist is zero.
    """
    pair, single = dft_basis(block_size, frequencies)
    basis = np.zeros((block_size, len(frequencies), 2))
    is_complex = np.isin(frequencies, complex_frequencies(frequencies, block_size))
    basis[:, is_complex] = pair
    basis[:, ~is_complex, 0] = single
    return basis


def _transfer_function(filter: Filter, blocks: Blocks) -> Array:
    real, imag = (part.astype(jnp.float32) for part in filter)
    before = int(blocks.frequencies[0] == 0)
    after = len(real) - before - len(imag)
    return jax.lax.complex(real, jnp.pad(imag, ((before, after), (0, 0), (0, 0))))


def _fft(x: Array, h: Array, blocks: Blocks) -> Array:
    block_size, kept = blocks.size, np.array(blocks.frequencies)
    _, p, q = h.shape
    parts = x.reshape(len(x), p, block_size).astype(jnp.float32)
    spectrum = jnp.fft.rfft(parts, axis=-1)[..., kept]
    out = jnp.einsum("tpf,fpq->tqf", spectrum, h, precision=jax.lax.Precision.HIGHEST)
    full = jnp.zeros((*out.shape[:-1], block_size // 2 + 1), out.dtype).at[..., kept].set(out)
    y = jnp.fft.irfft(full, n=block_size, axis=-1)
    return y.reshape(len(x), q * block_size).astype(x.dtype)


def _dft(x: Array, weights: MatricesByKind, blocks: Blocks) -> Array:
    spectrum = Spectrum.of(*blocks)
    return spectrum.leave(mix_all(weights, spectrum.enter(x)))


def _materialised(filter: Filter, blocks: Blocks) -> Array:
    return circulant_matrix(*filter, *blocks, dtype=filter.real.dtype)


def _dense(x: Array, matrix: Array, blocks: Blocks) -> Array:
    del blocks
    return x @ matrix


class _Plan(NamedTuple):
    """One way to run a block-circulant map.

    Attributes:
      pack: takes filter and blocks and returns what ``multiply`` needs; one call serves any number
        of multiplications.
      multiply: takes rows, packed filter and blocks and returns the outputs of the map.
    """

    pack: Callable[[Filter, Blocks], Any]
    multiply: Callable[[Array, Any, Blocks], Array]


_PLANS = {
    "fft": _Plan(_transfer_function, _fft),
    "dft": _Plan(spectral_matrices, _dft),
    "split": _Plan(_as_stored, _split),
    "dense": _Plan(_materialised, _dense),
}


def _check(filter: Filter, blocks: Blocks) -> None:
    size, frequencies = blocks
    if not frequencies or any(a >= b for a, b in itertools.pairwise((-1, *frequencies))):
        raise ValueError(f"frequencies={frequencies}: expected non-negative integers, ascending")
    if frequencies[-1] > size // 2:
        raise ValueError(
            f"frequency {frequencies[-1]} does not exist: block_size={size} has 0 .. {size // 2}"
        )
    _, p, q = filter.real.shape
    count = len(complex_frequencies(frequencies, size))
    expected = ((len(frequencies), p, q), (count, p, q))
    for name, array, shape in zip(Filter._fields, filter, expected, strict=True):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
