"""Traffic by hand, and the bounds that follow from it; nothing here is timed."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.measure.roofline import Peak, layer_traffic, roofline
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.ops.masks import BlockMask

D, M, TOKENS = 8, 32, 100
MASK = BlockMask.from_array([[1, 0], [0, 1]], (4, 4))
DENSE = SparseFFNConfig(D, M, micro=MicroRefinementConfig(CoreConfig(M)))
LOW_RANK = SparseFFNConfig(D, M, spectral=SpectralConfig("low_rank", M, rank=3, down_rank=2))
CIRCULANT = SparseFFNConfig(
    D,
    M,
    spectral=SpectralConfig(
        "block_circulant", 16, block_size=4, frequency_mask=(True, True, False)
    ),
    polynomial=PolynomialConfig(4, groups=2),
)
ALL = dataclasses.replace(CIRCULANT, micro=MicroRefinementConfig(CoreConfig(M), (MASK,)))
# Numbers that a token leaves between the products.
HIDDEN = {
    "dense": (DENSE, 32),
    "low rank": (LOW_RANK, 3 + 32 + 2),
    # DC and one complex frequency of each of 2 + 4 blocks, at the inputs and outputs of both maps.
    "circulant": (CIRCULANT, 2 * 3 * (2 + 4) + 16),
    "all": (ALL, 2 * 3 * (2 + 4) + 16 + 32 + 8),
    # Two maps into every hidden unit; a circulant branch transforms its inputs once for both.
    "gated": (dataclasses.replace(DENSE, gated=True), 2 * 32),
    "gated low rank": (dataclasses.replace(LOW_RANK, gated=True), 2 * 3 + 2 * 32 + 2),
    "gated all": (
        dataclasses.replace(ALL, gated=True),
        3 * (2 + 2 * 4 + 4 + 2) + 2 * (16 + 32) + 8,
    ),
    "without biases": (dataclasses.replace(ALL, gated=True, bias=False), 3 * 16 + 2 * 48 + 8),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_traffic_by_hand(name, dtype):
    config, hidden = HIDDEN[name]
    size = jnp.dtype(dtype).itemsize
    traffic = layer_traffic(config, TOKENS, dtype)
    shapes = jax.eval_shape(SparseFFN(config).init, jax.random.key(0), jnp.ones((1, D)))
    assert traffic.weights == size * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert traffic.activations == size * 2 * TOKENS * D
    assert traffic.hidden == size * 2 * TOKENS * hidden
    assert traffic.total == traffic.weights + traffic.activations + traffic.hidden


def test_the_slower_of_arithmetic_and_traffic_is_the_bound():
    peak = Peak("toaster", "float32", flops_per_second=1e6, bytes_per_second=1e6)
    many, one = roofline(DENSE, 1000, peak), roofline(DENSE, 1, peak)
    assert many.flops == 1000 * 4 * D * M
    assert many.compute_seconds == pytest.approx(many.flops / 1e6)
    # Weights are read once for all tokens: a single one pays for them alone.
    assert many.intensity > 3 * one.intensity
    assert one.is_memory_bound
    assert one.seconds == one.memory_seconds == pytest.approx(one.traffic.total / 1e6)
    slow = dataclasses.replace(peak, flops_per_second=1e3)
    assert not roofline(DENSE, 1, slow).is_memory_bound
    assert roofline(DENSE, 1, slow).seconds == pytest.approx(4 * D * M / 1e3)


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="measured in float32, the layer runs in bfloat16"):
        roofline(DENSE, 1, Peak("toaster", "float32", 1.0, 1.0), jnp.bfloat16)
