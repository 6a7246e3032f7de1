"""Counts on paper, by hand; tests of the layer and of the counter compare them with programs."""

import dataclasses

import pytest

from sparseffn_jax.config import CoreConfig, MicroRefinementConfig, SparseFFNConfig
from sparseffn_jax.measure.costs import dense_flops, flops_per_token, flops_ratio


@pytest.mark.parametrize(("gated", "maps"), [(False, 2), (True, 3)])
def test_dense_flops_are_those_of_the_stand_in(gated, maps):
    config = SparseFFNConfig(8, 32, micro=MicroRefinementConfig(core=CoreConfig(32)))
    config = dataclasses.replace(config, gated=gated)
    assert dense_flops(8, 32, gated) == 2 * maps * 8 * 32
    assert sum(flops_per_token(config).values()) == 2 * maps * 8 * 32
    assert flops_ratio(config) == 1.0
