"""Counts on paper, by hand; tests of the layer and of the counter compare them with programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.measure.costs import (
    dense_flops,
    flops_per_token,
    flops_ratio,
    parameters_ratio,
)
from sparseffn_jax.nn.sparse_ffn import SparseFFN


@pytest.mark.parametrize(("gated", "maps"), [(False, 2), (True, 3)])
def test_dense_flops_are_those_of_the_stand_in(gated, maps):
    config = SparseFFNConfig(8, 32, micro=MicroRefinementConfig(core=CoreConfig(32)))
    config = dataclasses.replace(config, gated=gated)
    assert dense_flops(8, 32, gated) == 2 * maps * 8 * 32
    assert sum(flops_per_token(config).values()) == 2 * maps * 8 * 32
    assert flops_ratio(config) == 1.0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_parameters_are_those_that_the_layer_stores(gated, bias):
    layers = {
        width: SparseFFNConfig(
            8, 32, "silu", spectral=bypass, micro=MicroRefinementConfig(core=CoreConfig(width)),
            gated=gated, bias=bias,
        )
        for width, bypass in ((32, None), (12, SpectralConfig("low_rank", rank=3)))
    }  # fmt: skip
    stored = {
        width: sum(leaf.size for leaf in jax.tree.leaves(
            SparseFFN(layer).init(jax.random.key(0), jnp.zeros((1, 8)))))
        for width, layer in layers.items()
    }  # fmt: skip
    assert parameters_ratio(layers[32]) == 1.0
    assert parameters_ratio(layers[12]) == stored[12] / stored[32]
