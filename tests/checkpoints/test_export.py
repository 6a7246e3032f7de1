"""export_dense: PyTorch computes what the sparse model computed, or one error says why not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tiny_models import D, make_model, shapes_of

from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.export import export_dense
from sparseffn_jax.checkpoints.pretrained import load_pretrained
from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.models.families import FAMILIES
from sparseffn_jax.ops.masks import BlockMask

WIDTH = 32
# The first and third quarter of the units live; the first of these sees half of the channels.
UP = BlockMask.from_array(np.outer([1, 0, 1, 1], [1, 0, 1, 1]), (8, 8))
DOWN = BlockMask.from_array(np.outer([1, 0, 1, 0], [1, 1, 0, 1]), (8, 8))
UNSTRUCTURED = BlockMask.from_array(np.eye(4), (8, 8))


def core(spec, width=WIDTH, **masks):
    micro = MicroRefinementConfig(CoreConfig(width, **masks))
    return SparseFFNConfig(
        D, spec.d_ff, spec.activation, micro=micro, gated=spec.gated, bias=spec.ffn_bias
    )


def assert_pytorch_computes_the_same(folder, model, params):
    torch = pytest.importorskip("torch")
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not set(info["missing_keys"]) - {"lm_head.weight"}
    ids = np.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected = reference.eval()(torch.tensor(ids)).logits.numpy()
    actual = model.apply({"params": params}, ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_pytorch_computes_the_same(tmp_path, name, masked):
    spec = make_model(name)[0].spec
    masks = {"up_mask": UP, "down_mask": DOWN} if masked else {}
    ffn = core(spec, **masks)
    model, params = make_model(name, (ffn, ffn))
    export_dense(tmp_path / "model", model, params)
    assert_pytorch_computes_the_same(tmp_path / "model", model, params)
    exported = load_pretrained(tmp_path / "model")
    assert exported.ffns == ()
    assert exported.spec == dataclasses.replace(spec, d_ff=WIDTH // 2 if masked else WIDTH)
    # The model itself is as it was.
    assert model.spec == spec


def test_what_is_not_dense_is_named(tmp_path):
    spec = make_model("llama")[0].spec
    plain = core(spec)
    spectral = dataclasses.replace(plain, spectral=SpectralConfig("low_rank", 16, rank=4))
    corrections = dataclasses.replace(plain.micro, corrections=(UNSTRUCTURED,))
    corrected = dataclasses.replace(plain, micro=corrections)
    for ffns, message in [
        ((spectral, plain), "layer 0 has a spectral branch. Save it with save_pretrained"),
        ((corrected, spectral), "layer 0 has linear corrections; layer 1 has a spectral branch"),
        ((plain, core(spec, up_mask=UNSTRUCTURED)), "layer 1 has a core with an unstructured mask"),
        ((plain, core(spec, 16)), "layer 0 has 32 units, layer 1 has 16 units"),
        ((plain, None), "layer 0 has 32 units, layer 1 has 88 units"),
    ]:
        model, params = make_model("llama", ffns)
        with pytest.raises(CheckpointError, match=message):
            export_dense(tmp_path / "model", model, params)
    bypass = dataclasses.replace(plain, spectral=SpectralConfig("low_rank", rank=4))
    for ffn, what in [
        (dataclasses.replace(plain, bias=True), "biases"),
        (bypass, "a bypass, which units with biases compute"),
    ]:
        model, params = make_model("mistral", (ffn, plain))
        with pytest.raises(CheckpointError, match=f"layer 0 has {what}, for which its family"):
            export_dense(tmp_path / "model", model, params)
    assert not (tmp_path / "model").exists()


def test_a_dense_model_is_exported_as_it_is(tmp_path):
    model, params = make_model("gpt2")
    export_dense(tmp_path / "model", model, params, dtype=jnp.float16)
    loaded = load_pretrained(tmp_path / "model", param_dtype=None)
    assert loaded.spec == model.spec
    assert shapes_of(loaded.model()).keys() == loaded.params.keys()
    assert loaded.params["transformer"]["wte"]["embedding"].dtype == jnp.float16


@pytest.mark.parametrize(("name", "units"), [("gpt2", 2), ("gptj", 2), ("llama", 1)])
def test_a_bypass_becomes_units(tmp_path, name, units):
    spec = make_model(name)[0].spec
    beside = dataclasses.replace(core(spec, 16), spectral=SpectralConfig("low_rank", rank=4))
    model, params = make_model(name, (beside, core(spec, 16 + 4 * units)))
    export_dense(tmp_path / "model", model, params)
    assert_pytorch_computes_the_same(tmp_path / "model", model, params)
    exported = load_pretrained(tmp_path / "model").spec
    assert exported == dataclasses.replace(spec, d_ff=16 + 4 * units, ffn_bias=True)
