"""Costs of a SparseFFN by formula: floating-point operations, weights and intermediate numbers.

Operations are counted on nonzeros, and a multiply-add counts as two. Biases, the core's activation
and the product with the gate are left out, as they are in the count of the dense FFN; the
polynomial is counted. :func:`sparseffn_jax.measure.flops.count_flops` counts the operations of a
program instead.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sparseffn_jax.config import SparseFFNConfig, SpectralConfig
from sparseffn_jax.ops.fourier import circulant_products, complex_frequencies


def dense_flops(d_model: int, d_ff: int, gated: bool) -> int:
    """Counts a dense FFN's floating-point operations in one token's forward pass.

    They are those of two matrix products, or of three in a gated FFN.

    Args:
      d_model: number of channels in and out.
      d_ff: number of hidden units.
      gated: whether a hidden unit is ``phi(gate) * up``.

    Example:
      >>> dense_flops(768, 3072, gated=False)
      9437184
    """
    return (6 if gated else 4) * d_model * d_ff


def flops_per_token(config: SparseFFNConfig) -> dict[str, int]:
    """Counts the floating-point operations of one token's forward pass.

    Args:
      config: configuration of the layer.

    Returns:
      The number of operations of each part: ``"spectral"``, ``"polynomial"`` and ``"micro"``. A
      multiply-add counts as two.

    Example:
      >>> import sparseffn_jax as sf
      >>> core = sf.MicroRefinementConfig(core=sf.CoreConfig(width=384))
      >>> sf.flops_per_token(sf.SparseFFNConfig(768, 3072, micro=core))
      {'spectral': 0, 'polynomial': 0, 'micro': 1179648}
    """
    flops = {"spectral": 0, "polynomial": 0, "micro": 2 * micro_weights(config)}
    if (branch := config.spectral) is None:
        return flops
    if config.polynomial is not None:
        # One Clenshaw step is a multiply-add and a subtraction.
        flops["polynomial"] = 3 * config.polynomial.degrees[-1] * branch.width
    if branch.transform == "low_rank":
        flops["spectral"] = 2 * _low_rank_weights(config, branch)
    else:
        flops["spectral"] = 2 * sum(_circulant_multiply_adds(config, branch))
    return flops


def flops_ratio(config: SparseFFNConfig) -> float:
    """Returns a layer's floating-point operations over those of the dense FFN that it replaces.

    Both are counted for one token's forward pass, as :func:`flops_per_token` counts them.

    Args:
      config: configuration of the layer.

    Example:
      >>> import sparseffn_jax as sf
      >>> core = sf.MicroRefinementConfig(core=sf.CoreConfig(width=384))
      >>> sf.flops_ratio(sf.SparseFFNConfig(768, 3072, micro=core))
      0.125
    """
    dense = dense_flops(config.d_model, config.d_ff, config.gated)
    return sum(flops_per_token(config).values()) / dense


def mean_flops_ratio(configs: Sequence[SparseFFNConfig | None]) -> float:
    """Returns the mean of :func:`flops_ratio` over the layers of a model.

    Args:
      configs: configuration of each layer; ``None`` stands for a dense FFN.
    """
    ratios = [1.0 if config is None else flops_ratio(config) for config in configs]
    return sum(ratios) / len(ratios)


def training_flops_per_token(config: SparseFFNConfig) -> dict[str, int]:
    """Counts the floating-point operations of one token's forward and backward pass, by part.

    A linear map costs three times its forward pass, because the gradient of its inputs and the
    gradient of its weights take one more product of the same size each. The transforms of a
    block-circulant map have no weights and cost twice their forward pass.

    The spectral branch does not keep its hidden activations; the backward pass computes them again.
    It does so from the components that a low-rank map has kept, or from the inputs of a
    block-circulant map. It also repeats the transform with which a block-circulant map out of the
    hidden units begins. The polynomial is recomputed and differentiated by its input. For the
    gradient of the coefficients a recurrence gives all terms once more, at two operations each, and
    those that are kept are weighted and summed.

    A core with unstructured masks does not keep its hidden activations either, unless a plan of one
    single product is forced.

    Args:
      config: configuration of the layer.

    Returns:
      The number of operations of each part, as :func:`flops_per_token` returns them.
    """
    training = {part: 3 * count for part, count in flops_per_token(config).items()}
    maps = len(config.up_maps)
    if config.micro is not None and (core := config.micro.core) is not None and core.runs_in_tiles:
        mask = core.without_dead_units().up_mask
        weights = config.d_model * core.width if mask is None else mask.size
        training["micro"] += 2 * maps * weights
    if (branch := config.spectral) is None:
        return training
    if config.polynomial is not None:
        degrees = config.polynomial.degrees
        training["polynomial"] += 2 * (degrees[-1] + len(degrees)) * branch.width
    if branch.transform == "low_rank":
        training["spectral"] += 2 * maps * branch.rank * branch.width
        return training
    filters, transforms = _circulant_multiply_adds(config, branch)
    if branch.is_bypass:
        # The transforms have no gradient of their own; that of the inputs, which is half of them,
        # is computed again.
        training["spectral"] -= transforms
        return training
    # The transforms have no gradient of their own. Computed again are the maps into the hidden
    # units, and of the map out of them the transform of its inputs: all but the last transform.
    last = transforms * config.d_model // (2 * config.d_model + (maps + 1) * branch.width)
    again = maps * filters // (maps + 1) + transforms - last
    training["spectral"] += 2 * (again - transforms)
    return training


def micro_weights(config: SparseFFNConfig) -> int:
    """Counts the entries of the core's and the corrections' kernels, without the masked ones."""
    if (micro := config.micro) is None:
        return 0
    weights = sum(mask.size for mask in micro.corrections)
    if micro.core is not None:
        core = micro.core.without_dead_units()
        full = config.d_model * core.width
        for mask in (*[core.up_mask] * len(config.up_maps), core.down_mask):
            weights += full if mask is None else mask.size
    return weights


class Numbers(NamedTuple):
    """How many numbers a layer's forward pass reads and writes, apart from input and output.

    Attributes:
      weights: number of stored weights, biases and coefficients, each of which is read once.
      between: number of intermediate results of one token, which lie between the layer's products.
    """

    weights: int
    between: int


def count_numbers(config: SparseFFNConfig) -> Numbers:
    """Counts a layer's stored numbers, and one token's intermediate results between products.

    The intermediate results are the hidden units of each branch, once for every map into them; the
    components of every low-rank map; the kept frequencies of the inputs and outputs of
    block-circulant maps; and the layer's output, once for every correction. Elementwise work is
    taken to be fused into the products beside it.
    """
    maps = len(config.up_maps)
    weights, between = micro_weights(config), 0
    if config.bias:
        weights += config.d_model
    if (branch := config.spectral) is not None:
        weights += maps * branch.width * config.bias
        between += maps * branch.width
        if branch.transform == "low_rank":
            weights += _low_rank_weights(config, branch)
            between += sum(_ranks(config, branch))
        else:
            components = _components(branch)
            p, q = config.d_model // branch.block_size, branch.width // branch.block_size
            weights += (p * p if branch.is_bypass else (maps + 1) * p * q) * components
            # The inputs' spectrum is shared by the maps into the hidden units.
            between += (2 * p + (maps + 1) * q) * components
    if config.polynomial is not None:
        weights += config.polynomial.groups * len(config.polynomial.degrees)
    if (micro := config.micro) is not None:
        between += len(micro.corrections) * config.d_model
        if micro.core is not None:
            width = micro.core.without_dead_units().width
            weights += maps * width * config.bias
            between += maps * width
    return Numbers(weights, between)


def parameters_ratio(config: SparseFFNConfig) -> float:
    """Returns a layer's number of stored parameters over that of the dense FFN.

    Args:
      config: configuration of the layer.
    """
    kernels = dense_flops(config.d_model, config.d_ff, config.gated) // 2
    biases = len(config.up_maps) * config.d_ff + config.d_model if config.bias else 0
    return count_numbers(config).weights / (kernels + biases)


def _low_rank_weights(config: SparseFFNConfig, branch: SpectralConfig) -> int:
    return sum(_ranks(config, branch)) * (config.d_model + (branch.width or config.d_model))


def _ranks(config: SparseFFNConfig, branch: SpectralConfig) -> tuple[int, ...]:
    """Returns the number of components that each low-rank map keeps."""
    if branch.is_bypass:
        return (branch.rank,)
    return (branch.rank,) * len(config.up_maps) + (branch.down_rank or branch.rank,)


def _components(branch: SpectralConfig) -> int:
    """Counts the real components that are kept of a block: DC and Nyquist have one each."""
    frequencies = branch.frequencies
    return len(frequencies) + len(complex_frequencies(frequencies, branch.block_size))


def _circulant_multiply_adds(config: SparseFFNConfig, branch: SpectralConfig) -> tuple[int, int]:
    """Counts the multiply-adds of the filters, and of the transforms, of all maps together."""
    b = branch.block_size
    products = circulant_products(branch.frequencies, b)
    p, q = config.d_model // b, branch.width // b
    if branch.is_bypass:
        return p * p * products, 2 * p * b * _components(branch)
    maps = len(config.up_maps) + 1
    # Transformed are the inputs, once for all maps into the hidden units, what each of them gives,
    # the hidden activations and the outputs.
    return maps * p * q * products, (2 * p + maps * q) * b * _components(branch)
