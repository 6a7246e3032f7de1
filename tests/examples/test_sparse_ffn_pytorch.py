"""The PyTorch reference and the JAX layer share a file format and nothing else."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tiny_models import D, make_config, make_model
from transformers.activations import ACT2FN

from sparseffn_jax.checkpoints.pretrained import save_pretrained
from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.ops.activations import ACTIVATIONS
from sparseffn_jax.ops.masks import BlockMask

torch = pytest.importorskip("torch")

EXAMPLE = Path(__file__).parents[2] / "examples" / "sparse_ffn_pytorch.py"
RNG = np.random.default_rng(0)
SCATTERED = BlockMask.from_array(RNG.random((4, 4)) < 0.5, (8, 8))
SCATTERED_IN = BlockMask.from_array(RNG.random((4, 6)) < 0.5, (8, 4))
# Units 8 to 15 are read by nothing: stored are 16 of the 24.
SCATTERED_OUT = BlockMask.from_array([[1, 0], [0, 0], [1, 1]], (8, 16))
STRUCTURED_IN = BlockMask.from_array(np.outer([1, 0, 1, 1], [1, 0, 1]), (8, 8))
STRUCTURED_OUT = BlockMask.from_array(np.outer([1, 1, 0], [0, 1, 1, 0]), (8, 8))
WHOLE_UNITS = BlockMask.from_array(np.outer([1, 0, 1, 1, 0, 1], np.ones(1)), (4, D))
# The first 8 dead units go with the one mask's blocks, and with that mask; then 4 more can.
HALF_READ = BlockMask.from_array(np.outer(np.ones(4), [1, 0, 1]), (8, 8))
COARSE_THEN_FINE = BlockMask.from_array(np.outer([1, 0, 0, 0, 1, 1], np.ones(1)), (4, D))
SLOPE = PolynomialConfig(degree=3, degree_mask=(False, True, False, True), radius=0.4)


def circulant(b, *frequencies, width=64):
    mask = tuple(f in frequencies for f in range(b // 2 + 1)) if frequencies else None
    return SpectralConfig("block_circulant", width, block_size=b, frequency_mask=mask)


def micro(width=24, **masks):
    return MicroRefinementConfig(CoreConfig(width, **masks))


LAYERS = {
    "low rank, polynomial, core": SparseFFNConfig(
        D, 128, spectral=SpectralConfig("low_rank", 48, rank=8, down_rank=5),
        polynomial=PolynomialConfig(degree=4, radius=0.5, groups=6), micro=micro(),
    ),
    "circulant, odd polynomial": SparseFFNConfig(
        D, 128, spectral=circulant(8), polynomial=SLOPE
    ),
    "low rank bypass, core": SparseFFNConfig(
        D, 128, spectral=SpectralConfig("low_rank", rank=5), micro=micro()
    ),
    "circulant bypass": SparseFFNConfig(D, 128, spectral=circulant(8, 0, 1, width=0)),
    "circulant without DC and Nyquist": SparseFFNConfig(
        D, 128, "gelu", spectral=circulant(8, 1, 3)
    ),
    "circulant of DC and Nyquist alone": SparseFFNConfig(
        D, 128, "silu", spectral=circulant(4, 0, 2)
    ),
    "odd circulant": SparseFFNConfig(
        30, 120, spectral=circulant(5, 0, 2, width=60), polynomial=SLOPE
    ),
    "unstructured masks": SparseFFNConfig(
        D, 128, "relu", micro=micro(up_mask=SCATTERED_IN, down_mask=SCATTERED_OUT)
    ),
    "structured masks": SparseFFNConfig(
        D, 128, micro=micro(up_mask=STRUCTURED_IN, down_mask=STRUCTURED_OUT)
    ),
    "dead units alone": SparseFFNConfig(D, 128, micro=micro(down_mask=WHOLE_UNITS)),
    "masks that fall away": SparseFFNConfig(
        D, 128, micro=micro(up_mask=HALF_READ, down_mask=COARSE_THEN_FINE)
    ),
    "corrections": SparseFFNConfig(
        D, 128, spectral=SpectralConfig("low_rank", 48, rank=8), bias=False,
        micro=MicroRefinementConfig(corrections=(SCATTERED, BlockMask((D, D), ((True,),)))),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_logits(example, folder, model, params):
    ids = np.arange(20).reshape(2, 10)
    expected = model.apply({"params": params}, ids)
    save_pretrained(folder, model, params)
    with torch.no_grad():
        actual = example.load(folder)(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_logits(tmp_path, example, name):
    layer = LAYERS[name]
    config = make_config("gpt2", n_embd=layer.d_model, n_head=2)
    # The other layer stays dense.
    check_logits(example, tmp_path, *make_model("gpt2", (layer, None), config))


@pytest.mark.parametrize("family", ["gptj", "llama", "mistral"])
def test_other_families(tmp_path, example, family):
    spec = make_model(family)[0].spec
    layer = SparseFFNConfig(
        D, spec.d_ff, spec.activation, spectral=SpectralConfig("low_rank", 48, rank=8),
        polynomial=SLOPE, micro=micro(up_mask=SCATTERED_IN, down_mask=SCATTERED_OUT),
        gated=spec.gated, bias=spec.ffn_bias,
    )  # fmt: skip
    check_logits(example, tmp_path, *make_model(family, (layer, layer)))


def test_tensors_that_do_not_fit_are_named(tmp_path, example):
    model, params = make_model("gpt2", (LAYERS["corrections"], None))
    save_pretrained(tmp_path, model, params)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"bias": false', '"bias": true'))
    with pytest.raises(ValueError, match=r"lacks .*mlp\.bias.* and has \[\] besides"):
        example.load(tmp_path)


def test_transformers_knows_every_activation():
    assert set(ACTIVATIONS) <= set(ACT2FN)
