"""What tiles add to a layer, and when the layer says so."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import pytest

import sparseffn_jax as sf
from sparseffn_jax.measure.gpus import compile_for, gpus
from sparseffn_jax.nn.padding import padding_share


def layer_of(width=0, rank=0, branch=0, down_rank=0, *, gated=False):
    core = sf.MicroRefinementConfig(core=sf.CoreConfig(width=width)) if width else None
    spectral = None
    if rank:
        spectral = sf.SpectralConfig("low_rank", width=branch, rank=rank, down_rank=down_rank)
    return sf.SparseFFNConfig(256, 1024, spectral=spectral, micro=core, gated=gated)


def circulant():
    return sf.SparseFFNConfig(
        256, 1024, spectral=sf.SpectralConfig("block_circulant", width=96, block_size=16)
    )


def masked():
    mask = sf.BlockMask((16, 8), ((True,) * 12 + (False,) * 12,) * 16)
    core = sf.CoreConfig(width=192, up_mask=mask)
    return sf.SparseFFNConfig(256, 1024, micro=sf.MicroRefinementConfig(core=core))


@pytest.mark.parametrize(
    ("config", "exact", "padded"),
    [
        (layer_of(640), 1, 1),
        # Columns of the maps into 100 units, and rows of the map out of them.
        (layer_of(100), 256 * (100 + 100), 256 * (128 + 112)),
        (layer_of(100, gated=True), 256 * (200 + 100), 256 * (256 + 112)),
        # A bypass shares the core's products.
        (layer_of(544, 224), 1, 1),
        (layer_of(128, 20), 256 * (148 + 148), 256 * (256 + 160)),
        (layer_of(64, 32, gated=True), 256 * (160 + 96), 256 * (256 + 96)),
        (layer_of(0, 24), 1, 32 / 24),
        # The components of each map, and the branch's hidden units.
        (layer_of(0, 24, 96), 24 * (256 + 96) * 2, 32 * (256 + 128) + 32 * (256 + 96)),
        (
            layer_of(0, 24, 128, 16, gated=True),
            (24 + 24 + 16) * (256 + 128),
            (32 + 32 + 16) * (256 + 128),
        ),
        # Beside a core with hidden units of its own.
        (layer_of(128, 24, 128), 1, (512 * 128 + 2 * 32 * 384) / (512 * 128 + 2 * 24 * 384)),
        (circulant(), 1, 1),
        (masked(), 1, 1),
    ],
)
def test_shares_are_those_of_a_hand_count(config, exact, padded):
    assert padding_share(config) == pytest.approx(padded / exact - 1)


def program_of(config):
    layer = sf.SparseFFN(config, dtype=jnp.bfloat16)
    x = jnp.ones((128, 256), jnp.bfloat16)
    return layer.apply, jax.jit(layer.init)(jax.random.key(0), x), x


def test_a_layer_for_a_gpu_warns_once():
    config = dataclasses.replace(layer_of(136, 24), activation="relu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = program_of(config)
    with pytest.warns(
        UserWarning, match=r"adds 30% .* core width=136, rank=24: .* multiples of 128"
    ):
        compile_for(gpus()["h100"], *program)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_for(gpus()["h100"], *program)
        # A tenth at most goes unsaid.
        compile_for(gpus()["h100"], *program_of(layer_of(1000)))
