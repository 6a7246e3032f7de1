"""What each plan of an operator is estimated to cost on a platform.

A cost is counted in multiply-adds of a large GEMM. The constants are the handicaps that other kinds
of work carry, as measured on CPU; only their order of magnitude matters.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

Platform = Literal["cpu", "gpu"]

_GATHERED_GEMM = 4.2
_SMALL_GEMM = 1.2
_SPLIT_GEMM = 2.0
_COMPLEX_GEMM = 9.0
# What it costs to take one number through a transform, mostly to memory and back. On a GPU it goes
# there after every step, as the programs that XLA compiles for an H100 show.
_FFT = {"cpu": 150.0, "gpu": 1800.0}
_TRANSFORM = {"cpu": 80.0, "gpu": 600.0}
# What it costs to copy one weight into the matrix of its frequency, and, on a GPU, to put it into
# its place in a dense matrix beyond the copies that the cost model counts as products.
_COPIED = 40.0
_EXPANDED = {"cpu": 0.0, "gpu": 1500.0}
# A product with fewer tokens takes as long as with so many: as long as its weights are read.
_LEAST_TOKENS = {"cpu": 1, "gpu": 256}
# Operations of a map with transforms, beyond its product.
_TRANSFORM_CALLS = 6
# What it costs to add one product of a block row to others, to copy one number beside others for a
# joint GEMM, and to put one weight into its place among the zeros of a dense matrix.
_ADDED = {"cpu": 32.0, "gpu": 750.0}
_GATHERED = {"cpu": 120.0, "gpu": 750.0}
_SCATTERED = 120.0
# What it costs to read or write one number that lies in memory.
_MOVED = {"cpu": 20.0, "gpu": 200.0}
# What any operation costs: a task for the CPU's thread pool, a kernel's launch on a GPU.
_CALL = {"cpu": 2.4e5, "gpu": 1e9}
# What products cost in the kernel that keeps hidden units on the chip, what each hidden unit costs
# there besides, as an H200 measured, and how many tokens a GPU needs to be busy with it.
_FUSED_GEMM, _FUSED_UNIT, _FUSED_TOKENS = 1.7, 360.0, 8192
# The same of block-circulant layers: products have few rows there, and each hidden unit goes
# through as many transforms as there are maps.
_CIRCULANT_GEMM, _CIRCULANT_UNIT, _CIRCULANT_TOKENS = 4.0, 420.0, 4096
# Bytes of hidden activations that a tile of tokens may have on CPU: what the cores' own caches hold
# while the operations on them are still large enough to spread over the cores.
_TILE_BYTES = {"low_rank": 6 << 20, "block_circulant": 3 << 20, "block_sparse": 3 << 20}


def low_rank_costs(tokens: int, d_in: int, rank: int, d_out: int) -> dict[str, float]:
    """Estimates the cost of each plan of the low-rank map ``(x axes) filter``, in multiply-adds.

    Args:
      tokens: number of rows of the input.
      d_in: number of input channels.
      rank: number of components kept.
      d_out: number of output channels.
    """
    return {
        "two_gemms": tokens * rank * (d_in + d_out),
        "merged": (tokens + rank) * d_in * d_out,
    }


def low_rank_layer_costs(
    tokens: int, d_in: int, width: int, d_out: int, up: Sequence[int], down: int, devices: int = 1
) -> dict[str, float]:
    """Estimates the cost on GPUs of both plans of a hidden layer between low-rank maps.

    Args:
      tokens: number of rows of the input, on all devices together.
      d_in: number of input channels.
      width: number of hidden units.
      d_out: number of output channels.
      up: number of components of each map into the hidden units.
      down: number of components of the map out of them.
      devices: number of GPUs that may share the tokens.
    """
    # Hidden units are written and read before their function, and behind it.
    moved = 4 * _MOVED["gpu"] * tokens * width * len(up)
    each = [(d_in, rank, width) for rank in up] + [(width, down, d_out)]
    maps = sum(min(low_rank_costs(tokens, *sides).values()) for sides in each)
    ends = tokens * (sum(up) * d_in + down * d_out)
    # Each multiprocessor has a tile of tokens and goes through all hidden units by itself, in a
    # kernel that is slower than the vendor's.
    rows = max(tokens, _FUSED_TOKENS * devices)
    fused = rows * width * (_FUSED_GEMM * (sum(up) + down) + _FUSED_UNIT)
    return {
        "maps": maps + moved + 2 * len(each) * _CALL["gpu"],
        "fused": ends + fused + (len(each) + 1) * _CALL["gpu"],
    }


def core_and_bypass_costs(
    tokens: int,
    d_in: int,
    maps: int,
    width: int,
    rank: int,
    d_out: int,
    *,
    is_packed: bool,
    platform: Platform,
) -> dict[str, float]:
    """Estimates the cost of each plan of a core beside a low-rank bypass, in multiply-adds.

    Args:
      tokens: number of rows of the input.
      d_in: number of input channels.
      maps: number of maps into the hidden units.
      width: number of hidden units.
      rank: number of components of the bypass.
      d_out: number of output channels.
      is_packed: whether the weights are brought into the plan's form before the call.
      platform: the platform that the program is compiled for.
    """
    moved = _MOVED[platform]
    core = tokens * width * (maps * d_in + d_out)
    bypass = low_rank_costs(tokens, d_in, rank, d_out)
    # The inputs are read once more; one part's outputs are written, and read beside the other's for
    # the sum.
    apart = core + moved * tokens * (d_in + 3 * d_out) + 2 * _CALL[platform]
    weights = 0 if is_packed else width * (maps * d_in + d_out) + rank * (d_in + d_out)
    if platform == "cpu":
        # XLA copies weights, hidden units and components number by number. At 1,024 tokens a bypass
        # of rank 64 took 0.18 of a dense FFN beside 1,024 of SmolLM2's units, and takes 0.01 to
        # 0.03 apart; beside 256 of them it took 0.045 joined and 0.052 apart.
        joining = _GATHERED["cpu"] * (weights + tokens * (width + rank))
    else:
        joining = moved * 2 * (weights + tokens * rank)
    joined = core + bypass["two_gemms"] + joining
    return {"joined": joined, **{name: cost + apart for name, cost in bypass.items()}}


def block_circulant_costs(
    tokens: int,
    p: int,
    q: int,
    block_size: int,
    components: int,
    products: int,
    platform: Platform,
) -> dict[str, float]:
    """Estimates the cost of each plan of the block-circulant map, in multiply-adds.

    Args:
      tokens: number of rows of the input.
      p: number of circulant blocks along the input.
      q: number of circulant blocks along the output.
      block_size: side b of a block.
      components: number of real components, out of b, that are kept of a block.
      products: number of real products for one entry of the filter, summed over the kept
        frequencies.
      platform: the platform that the program is compiled for.
    """
    d_in, d_out = p * block_size, q * block_size
    transforms = tokens * (d_in + d_out) * (_TRANSFORM[platform] + components)
    rows = max(tokens, _LEAST_TOKENS[platform])
    product = rows * p * q * products
    # A CPU's calls are short beside all this.
    calls = _TRANSFORM_CALLS * _CALL[platform] if platform == "gpu" else 0.0
    fft = tokens * _FFT[platform] * (d_in + d_out)
    return {
        "dft": _SMALL_GEMM * product + transforms + _COPIED * p * q * products + calls,
        "split": _SPLIT_GEMM * product + 2 * transforms + 2 * calls,
        "fft": _COMPLEX_GEMM * product + fft + calls,
        "dense": (rows + components + _EXPANDED[platform]) * d_in * d_out,
    }


def fused_circulant_costs(
    tokens: int,
    sides: Sequence[tuple[int, int]],
    block_size: int,
    components: int,
    products: int,
    others: Mapping[str, float],
    devices: int = 1,
) -> dict[str, float]:
    """Estimates the cost on GPUs of all plans of a hidden layer between block-circulant maps.

    Args:
      tokens: number of rows of the input, on all devices together.
      sides: numbers of input and output blocks of each map; the map out of the hidden units last.
      block_size: side b of a block.
      components: number of real components, out of b, that are kept of a block.
      products: number of real products for one entry of a filter, as for
        :func:`block_circulant_costs`.
      others: cost of the maps alone under each of the other plans.
      devices: number of GPUs that may share the tokens.
    """
    *up, (width, d_out) = sides
    d_in = up[0][0]
    moved = _MOVED["gpu"]
    # Hidden units are written and read before their function, and behind it.
    between = 4 * moved * tokens * width * block_size * len(up)
    rows = max(tokens, _CIRCULANT_TOKENS * devices)
    # Both ends go through a transform, and are read or written once more as components.
    ends = (d_in + d_out) * (block_size + 2 * components)
    traffic = moved * rows * (ends + 2 * width * components)
    into = _CIRCULANT_GEMM * products * sum(p * q for p, q in up)
    units = _CIRCULANT_UNIT * width * block_size * len(sides)
    fused = rows * (into + units + _SMALL_GEMM * products * width * d_out)
    return {
        **{plan: cost + between for plan, cost in others.items()},
        "fused": traffic + fused + (len(sides) + 3) * _CALL["gpu"],
    }


def block_sparse_costs(
    tokens: int,
    shape: tuple[int, int],
    block_shape: tuple[int, int],
    weights: int,
    live: tuple[int, int],
    platform: Platform,
) -> dict[str, float]:
    """Estimates the cost of each plan of a block-sparse product, in multiply-adds.

    Args:
      tokens: number of rows of the input.
      shape: ``(inputs, outputs)`` of the whole weight matrix.
      block_shape: rows and columns of a block.
      weights: number of entries that the mask keeps.
      live: numbers of block rows and of block columns with a living block.
      platform: the platform that the program is compiled for.
    """
    full = shape[0] * shape[1]
    products, call = tokens * weights, _CALL[platform]
    added, gathered = (products / side for side in block_shape)
    return {
        "slice": products,
        "rows": products + _ADDED[platform] * added + _COPIED * weights + call * live[0],
        "columns": products + _GATHERED[platform] * gathered + call * live[1],
        "gather": _GATHERED_GEMM * products,
        "masked": (tokens + _SCATTERED) * full,
    }


def token_tile(operator: str, tokens: int, token_bytes: int, platform: Platform) -> int | None:
    """Returns how many tokens to take at a time, or ``None`` for all of them.

    Args:
      operator: ``"low_rank"``, ``"block_circulant"`` or ``"block_sparse"``.
      tokens: number of rows of the input.
      token_bytes: size of one token's hidden activations, in bytes.
      platform: the platform that the program is compiled for.
    """
    if platform != "cpu":
        return None
    tile = max(16, _TILE_BYTES[operator] // token_bytes)
    return tile if tile < tokens else None
