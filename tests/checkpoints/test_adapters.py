"""LoRA adapters apart from their model, beside peft on the PyTorch model."""

import json
import shutil
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny_models import D_FF, D, make_ids, make_model
from transformers import dynamic_module_utils

from sparseffn_jax.checkpoints.adapters import load_adapter, save_adapter
from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.export import export_dense
from sparseffn_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from sparseffn_jax.checkpoints.weights import read_leaves
from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.models.paths import ffn_of, in_sparse_ffns, is_out_in, lora_targets
from sparseffn_jax.nn.lora import LoraAdapter, init_lora

# Phi-3's projections are one map in PyTorch.
FAMILIES = ("gpt2", "gptj", "llama", "mistral", "phi3")


@pytest.fixture(autouse=True)
def code_of_folders(tmp_path, monkeypatch):
    """Where transformers copies the code of model folders to."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def sparse_layer(family):
    spec = make_model(family)[0].spec
    return SparseFFNConfig(
        D, spec.d_ff, spec.activation, spectral=SpectralConfig("low_rank", 48, rank=8),
        polynomial=PolynomialConfig(), micro=MicroRefinementConfig(CoreConfig(24)),
        gated=spec.gated, bias=spec.ffn_bias,
    )  # fmt: skip


def draw(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), tree)


def make_adapter(params, targets=("all-linear",)):
    """Adapters of several ranks and scales on what ``targets`` name; sparse FFNs as a whole."""
    kernels = sorted(set().union(*lora_targets(flatten_dict(params), targets).values()))
    ranks = {path: 2 + (path[-2] in ("c_attn", "v_proj")) for path in kernels}
    key = jax.random.key(0)
    factors = init_lora(key, params, ranks.__getitem__, ranks.__contains__, is_out_in)
    scales = {path: 2.0 if path[-2].startswith("q") else 0.75 for path in kernels}
    adapter = LoraAdapter(draw(factors), scales)
    flat = flatten_dict(params)
    if in_sparse := in_sparse_ffns(flat):
        (body, blocks, layer, ffn) = ffn_of(min(in_sparse))
        leaves = draw(params[body][blocks][layer][ffn], seed=2)
        adapter = LoraAdapter(adapter.factors, scales, {body: {blocks: {layer: {ffn: leaves}}}})
    return adapter


def torch_logits(model, ids):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.eval()(torch.tensor(np.asarray(ids))).logits.numpy()


def torch_model(folder):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def check_in_peft(folder, adapter_folder, model, params, adapter):
    peft = pytest.importorskip("peft")
    ids = make_ids()
    expected = model.apply({"params": adapter.merge(params)}, ids)
    base = torch_model(folder)
    plain = torch_logits(base, ids)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        tuned = peft.PeftModel.from_pretrained(base, adapter_folder)
    actual = torch_logits(tuned, ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    assert np.abs(plain - expected).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_adapters_on_a_sparse_folder(tmp_path, family):
    model, params = make_model(family, (sparse_layer(family), None))
    adapter = make_adapter(params)
    save_pretrained(tmp_path / "model", model, params)
    save_adapter(tmp_path / "adapter", model, adapter, base_model=str(tmp_path / "model"))
    check_in_peft(tmp_path / "model", tmp_path / "adapter", model, params, adapter)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_adapters_on_a_dense_folder(tmp_path, family):
    model, params = make_model(family)
    adapter = make_adapter(params)
    save_pretrained(tmp_path / "model", model, params)
    save_adapter(tmp_path / "adapter", model, adapter)
    check_in_peft(tmp_path / "model", tmp_path / "adapter", model, params, adapter)


def test_peft_loads_adapters_on_an_exported_folder(tmp_path):
    layer = SparseFFNConfig(D, D_FF["gpt2"], micro=MicroRefinementConfig(CoreConfig(24)))
    model, params = make_model("gpt2", (layer, layer))
    adapter = make_adapter(params, ("attention",))
    adapter = LoraAdapter(adapter.factors, adapter.scales)
    export_dense(tmp_path / "model", model, params)
    save_adapter(tmp_path / "adapter", model, adapter)
    check_in_peft(tmp_path / "model", tmp_path / "adapter", model, params, adapter)


def test_the_settings_are_those_that_a_peft_user_would_write(tmp_path):
    model, params = make_model("llama", (sparse_layer("llama"), None))
    save_adapter(tmp_path / "adapter", model, make_adapter(params), base_model="org/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "org/base"
    assert config["target_modules"] == [
        "k_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj", "o_proj", "q_proj", "v_proj",
    ]  # fmt: skip
    assert (config["r"], config["lora_alpha"]) == (2, 1.5)
    assert config["rank_pattern"] == {"v_proj": 3}
    assert config["alpha_pattern"] == {"q_proj": 4.0, "v_proj": 2.25}
    assert config["modules_to_save"] == ["model.layers.0.mlp"]
    assert not config["fan_in_fan_out"]


def test_some_of_the_maps_that_pytorch_fuses(tmp_path):
    model, params = make_model("phi3")
    adapter = make_adapter(params, ("v_proj", "q_proj", "up_proj"))
    save_pretrained(tmp_path / "model", model, params)
    save_adapter(tmp_path / "adapter", model, adapter)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["gate_up_proj", "qkv_proj"]
    assert {config["r"], *config["rank_pattern"].values()} == {2, 5}
    check_in_peft(tmp_path / "model", tmp_path / "adapter", model, params, adapter)


def test_maps_that_share_a_name_are_told_apart(tmp_path):
    model, params = make_model("gpt2")
    save_adapter(tmp_path / "adapter", model, make_adapter(params, ("attention",)))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_proj", "c_attn"]
    assert config["fan_in_fan_out"]


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "mistral"])
def test_adapters_come_back(tmp_path, family):
    model, params = make_model(family, (sparse_layer(family), None))
    adapter = make_adapter(params)
    save_adapter(tmp_path / "adapter", model, adapter)
    loaded = load_adapter(tmp_path / "adapter", model)
    chex.assert_trees_all_equal(loaded.factors, adapter.factors)
    chex.assert_trees_all_equal(loaded.replaced, adapter.replaced)
    assert loaded.scales == pytest.approx(adapter.scales)


PEFT_SETTINGS = {
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "modules_to_save": ["ln_f", "h.0.mlp"]},
    "gptj": {"target_modules": ["q_proj", "out_proj", "fc_in"], "use_rslora": True},
    "llama": {
        "target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"],
        "rank_pattern": {"q_proj": 5, "^model.layers.0.mlp.up_proj": 1},
        "alpha_pattern": {"v_proj": 11, r"layers\.1\.self_attn\.o_proj$": 3},
    },
    "mistral": {"target_modules": r".*\.[qv]_proj", "layers_to_transform": None},
    "phi3": {
        "target_modules": ["qkv_proj", "down_proj"], "alpha_pattern": {"qkv_proj": 2},
        "modules_to_save": ["gate_up_proj"],
    },
}  # fmt: skip


def peft_folder(family, folder, **settings):
    """Writes a model, and adapters that peft has made for it; returns the logits of both."""
    peft = pytest.importorskip("peft")
    import torch

    model, params = make_model(family)
    save_pretrained(folder / "model", model, params)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.1, **settings)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(torch_model(folder / "model"), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(float("norm" in name or "ln_" in name), 0.2)
    tuned.save_pretrained(folder / "adapter")
    return torch_logits(tuned, make_ids())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("on_demand", [False, True])
def test_adapters_of_peft_are_merged(tmp_path, family, on_demand):
    expected = peft_folder(family, tmp_path, **PEFT_SETTINGS[family])
    loaded = load_pretrained(tmp_path / "model", adapter=tmp_path / "adapter", on_demand=on_demand)
    params = read_leaves(loaded.params)
    actual = loaded.model().apply({"params": params}, make_ids())
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    plain = load_pretrained(tmp_path / "model")
    merged = load_adapter(tmp_path / "adapter", plain.model()).merge(plain.params)
    chex.assert_trees_all_close(merged, params, atol=1e-6)
    assert np.abs(plain.model().apply({"params": plain.params}, make_ids()) - actual).max() > 0.1


def test_the_dtype_stays_where_it_is_asked_for(tmp_path):
    model, params = make_model("gpt2", (sparse_layer("gpt2"), None))
    adapter = make_adapter(params)
    assert adapter.replaced
    save_pretrained(tmp_path / "model", model, params, dtype=jnp.bfloat16)
    save_adapter(tmp_path / "adapter", model, adapter)
    stored = load_pretrained(tmp_path / "model").params
    for dtype in (None, jnp.bfloat16, jnp.float32):
        for on_demand in (False, True):
            loaded = load_pretrained(
                tmp_path / "model", param_dtype=dtype, adapter=tmp_path / "adapter",
                on_demand=on_demand,
            )  # fmt: skip
            expected = jax.tree.map(
                lambda leaf, dtype=dtype: leaf.astype(dtype or jnp.bfloat16), adapter.merge(stored)
            )
            params = read_leaves(loaded.params)
            chex.assert_trees_all_close(params, expected, rtol=1e-2)
            assert all(leaf.dtype == (dtype or jnp.bfloat16) for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A LLaMA, and a folder of adapters for it."""
    model, params = make_model("llama")
    folder = tmp_path_factory.mktemp("written") / "adapter"
    save_adapter(folder, model, make_adapter(params, ("q_proj", "o_proj")))
    return model, folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3', which is not supported: expected 'LORA'"),
        ({"peft_type": ["LORA"]}, "peft_type=.*not supported"),
        ({"use_dora": True}, "use_dora='True', which is not supported: expected None"),
        ({"bias": "all"}, "bias='all', which is not supported: expected 'none'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"target_parameters": ["x"]}, "target_parameters="),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
        ({"something_new": {"a": 1}}, "something_new="),
        ({"r": 3}, r"_proj.lora_A with shape \(2, 32\), but the config makes it \(3, 32\)"),
        ({"r": "2"}, "r='2': expected a positive number"),
        ({"r": True}, "r='True': expected a positive number"),
        ({"lora_alpha": -1}, "lora_alpha='-1': expected a positive number"),
        ({"lora_alpha": 10**400}, "lora_alpha='1000.*: expected a positive number"),
        ({"rank_pattern": [1]}, "rank_pattern='.1.': expected a JSON object"),
        ({"alpha_pattern": {"(a*)*b": 1}}, "'.a..*': expected a module's name.*expressions"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "q_proj='nan': expected a positive number"),
    ],
)
def test_settings_that_are_not_read(written, tmp_path, settings, message):
    model, folder = written
    shutil.copytree(folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path / "adapter", model)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.lora_B.weight": None}, "lacks model.layers.0.self_attn.q_proj.lora_B"),
        ({f"{Q}.lora_B.weight": np.ones((32, 2), np.int32)}, "lora_B as I32"),
        ({f"{Q}.lora_B.weight": np.full((32, 2), np.nan, np.float32)}, "must be finite"),
        ({f"{Q}.lora_B.weight": np.ones((2, 32), np.float32)}, r"lora_B with shape \(2, 32\)"),
        ({f"{Q}.lora_magnitude_vector": np.ones(32, np.float32)}, "holds 1 tensors.*magnitude"),
        ({f"{Q}.weight": np.ones((32, 32), np.float32)}, "both adapters for and a whole weight"),
        ({f"{Q}.weight": np.ones((2, 2), np.float32)}, r"q_proj.weight with shape \(2, 2\)"),
        ({"x.lora_A.weight": np.ones((2, 32), np.float32)}, "no place for: x.lora_A.weight"),
        (
            {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": np.ones((2, 32))},
            "no place for: base_model.model.model.layers.9",
        ),
        (
            {"base_model.model.model.norm.lora_A.weight": np.ones((2, 32))},
            "no place for: base_model.model.model.norm.lora_A",
        ),
    ],
)
def test_tensors_that_do_not_fit(written, tmp_path, change, message):
    model, folder = written
    shutil.copytree(folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {k: v for k, v in (load_file(file) | change).items() if v is not None}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path / "adapter", model)


def test_folders_that_hold_no_adapter(written, tmp_path):
    model, folder = written
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        load_adapter(tmp_path, model)
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "a.bin")
    with pytest.raises(CheckpointError, match="are never opened"):
        load_adapter(tmp_path / "pickled", model)
    save_file({}, tmp_path / "pickled" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load_adapter(tmp_path / "pickled", model)
    other, _ = make_model("gpt2")
    with pytest.raises(CheckpointError, match="for another model"):
        load_adapter(folder, other)


def test_nothing_is_written_over(written, tmp_path):
    model, folder = written
    adapter = load_adapter(folder, model)
    with pytest.raises(CheckpointError, match="is not empty"):
        save_adapter(folder, model, adapter)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="is not an adapter folder"):
        save_adapter(tmp_path, model, adapter, overwrite=True)
    save_adapter(folder, model, adapter, overwrite=True)
    with pytest.raises(CheckpointError, match="of another model than this one"):
        save_adapter(tmp_path / "other", make_model("gptj")[0], adapter)
    with pytest.raises(CheckpointError, match="no adapters to write"):
        save_adapter(tmp_path / "other", model, LoraAdapter({}, {}))
