"""Sparse folders in transformers: its classes and the JAX layer share a file format alone."""

import json

import numpy as np
import pytest
import transformers
from tiny_models import D, make_config, make_model
from transformers import AutoModelForCausalLM, dynamic_module_utils

from sparseffn_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from sparseffn_jax.checkpoints.tokenizers import load_tokenizer
from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.defaults import EMBEDDED_MODEL
from sparseffn_jax.models.families import FAMILIES
from sparseffn_jax.models.generation import generate
from sparseffn_jax.ops.activations import ACTIVATIONS
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.sparsify.convert import sparsify
from sparseffn_jax.sparsify.sizing import size_ffn
from sparseffn_jax.train.data import load_windows

torch = pytest.importorskip("torch")

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


@pytest.fixture(autouse=True)
def code_of_folders(tmp_path, monkeypatch):
    """Where transformers copies the code of model folders to."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def check_logits(folder, model, params):
    ids = np.arange(20).reshape(2, 10)
    expected = model.apply({"params": params}, ids)
    save_pretrained(folder, model, params)
    with torch.no_grad():
        actual = load(folder)(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_logits(tmp_path, name):
    layer = LAYERS[name]
    config = make_config("gpt2", n_embd=layer.d_model, n_head=2)
    # The other layer stays dense.
    check_logits(tmp_path / "model", *make_model("gpt2", (layer, None), config))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_other_families(tmp_path, family):
    spec = make_model(family)[0].spec
    layer = SparseFFNConfig(
        D, spec.d_ff, spec.activation, spectral=SpectralConfig("low_rank", 48, rank=8),
        polynomial=SLOPE, micro=micro(up_mask=SCATTERED_IN, down_mask=SCATTERED_OUT),
        gated=spec.gated, bias=spec.ffn_bias,
    )  # fmt: skip
    check_logits(tmp_path / "model", *make_model(family, (layer, layer)))


def test_a_model_that_was_evaluated_can_be_trained(tmp_path):
    model, params = make_model("gpt2", (LAYERS["unstructured masks"], None))
    save_pretrained(tmp_path / "model", model, params)
    loaded, ids = load(tmp_path / "model"), torch.arange(20).view(2, 10)
    with torch.inference_mode():
        loaded(ids)
    loaded(ids, labels=ids).loss.backward()
    assert loaded.transformer.h[0].mlp.core.up.kernel.grad.abs().sum() > 0


def test_without_leave_to_run_code_transformers_refuses(tmp_path):
    save_pretrained(tmp_path / "model", *make_model("gpt2", (LAYERS["corrections"], None)))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)


def test_the_folder_is_read_as_before_and_by_this_library_without_its_code(tmp_path):
    ffns = (LAYERS["corrections"], None)
    save_pretrained(tmp_path / "model", *make_model("gpt2", ffns))
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["model_type"] == "sparseffn_gpt2"
    (tmp_path / "model" / "modeling_sparseffn.py").write_text("raise RuntimeError('run')")
    loaded = load_pretrained(tmp_path / "model")
    assert (loaded.config.model_type, loaded.ffns) == ("gpt2", ffns)
    assert not hasattr(loaded.config, "auto_map")
    # As folders were before they had a type of their own.
    values["model_type"] = "gpt2"
    del values["auto_map"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    assert load_pretrained(tmp_path / "model").ffns == ffns


def test_a_pipeline_writes_what_generate_does(tmp_path):
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    spec = load_pretrained(EMBEDDED_MODEL).spec
    ffn = size_ffn(spec.d_model, spec.d_ff, 0.5, spec.activation, bypass=True)
    dense = load_pretrained(EMBEDDED_MODEL)
    text = load_windows("stdlib", tokenizer, 256).train[:8, :-1]
    model, params = sparsify(dense.model(), dense.params, ffn, text, distill_steps=0)
    save_pretrained(tmp_path / "model", model, params, tokenizer=tokenizer)
    prompt = "def read_config(path):\n"
    ids = load_tokenizer(tmp_path / "model").encode(prompt)
    expected = generate(model, params, [ids], 24)[0].tolist()
    writer = transformers.pipeline(
        "text-generation", str(tmp_path / "model"), trust_remote_code=True
    )
    (written,) = writer(prompt, max_new_tokens=24, do_sample=False)
    assert written["generated_text"] == tokenizer.decode(expected)


def test_transformers_knows_every_activation():
    assert set(ACTIVATIONS) <= set(transformers.activations.ACT2FN)
