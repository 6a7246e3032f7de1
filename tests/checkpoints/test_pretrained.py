import json
import os
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
import transformers
from flax import serialization
from flax.traverse_util import flatten_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from sparseffn_jax.checkpoints import weights
from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer, load_tokenizer
from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.models.families import FAMILIES
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.ops.masks import BlockMask

D, D_FF, VOCAB = 32, 128, 97
needs_flax = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) >= 5,
    reason="transformers 5 has no FlaxGPT2LMHeadModel",
)


def checkered(rows, columns, block):
    return BlockMask.from_array(np.indices((rows, columns)).sum(0) % 3 == 0, block)


LOW_RANK = SparseFFNConfig(
    d_model=D,
    d_ff=D_FF,
    spectral=SpectralConfig(transform="low_rank", width=48, rank=8, down_rank=6),
    polynomial=PolynomialConfig(degree=3, degree_mask=(True, True, False, True), groups=2),
)
CIRCULANT = SparseFFNConfig(
    d_model=D,
    d_ff=D_FF,
    activation="silu",
    spectral=SpectralConfig(
        transform="block_circulant",
        width=64,
        block_size=8,
        frequency_mask=(True, False, True, True, False),
    ),
    micro=MicroRefinementConfig(corrections=(checkered(4, 4, (8, 8)), checkered(2, 4, (16, 8)))),
)
MASKED = SparseFFNConfig(
    d_model=D,
    d_ff=D_FF,
    micro=MicroRefinementConfig(
        core=CoreConfig(
            width=64, up_mask=checkered(4, 8, (8, 8)), down_mask=checkered(8, 2, (8, 16))
        )
    ),
)


def make_config(**changes):
    small = {"n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": VOCAB}
    return GPT2Config(**{**small, "bos_token_id": 0, "eos_token_id": 0, **changes})


def make_model(ffns=(), dtype=np.float32, **changes):
    model = GPT2LMHeadModel(make_config(**changes), ffns)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray((0.2 * rng.standard_normal(leaf.shape)).astype(dtype)), shapes
    )
    return model, params


def torch_tensors(params):
    """Names and lays out a dense tree as PyTorch does, rule by rule, whatever ours says."""
    tensors = {}
    for path, leaf in flatten_dict(params).items():
        array = np.asarray(leaf)
        *scope, last = path
        if last == "kernel":
            last, array = "weight", np.ascontiguousarray(array.T)
        elif last in ("embedding", "scale"):
            last = "weight"
        tensors[".".join((*scope, last))] = array
    return tensors


def write_folder(folder, model, files):
    """Writes config.json and the files: JSON from dicts, safetensors or msgpack from tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(model.config.to_json_string())
    for name, content in files.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content))
        elif name.endswith(".safetensors"):
            safetensors.numpy.save_file(content, folder / name, metadata={"format": "pt"})
        else:
            (folder / name).write_bytes(serialization.msgpack_serialize(content))
    return folder


def assert_same_tree(actual, expected):
    actual, expected = flatten_dict(actual), flatten_dict(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert actual[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(actual[path], leaf, err_msg=str(path))


def split_in_two(tensors):
    names = sorted(tensors)
    half = len(names) // 2
    return [{name: tensors[name] for name in part} for part in (names[:half], names[half:])]


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "transposed"),
    [
        ("transformer.wte.weight", "transformer.wte.embedding", False),
        ("transformer.h.11.ln_1.weight", "transformer.h.11.ln_1.scale", False),
        ("transformer.h.11.ln_1.bias", "transformer.h.11.ln_1.bias", False),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.kernel", True),
        ("transformer.h.7.mlp.c_proj.weight", "transformer.h.7.mlp.c_proj.kernel", True),
        ("transformer.h.7.mlp.spectral.up.axes", "transformer.h.7.mlp.spectral.up.axes", False),
        ("transformer.ln_f.weight", "transformer.ln_f.scale", False),
        ("lm_head.weight", "lm_head.kernel", True),
    ],
)
def test_names_go_both_ways(name, path, transposed):
    names = GPT2LMHeadModel.names
    assert names.to_path(name) == (path, transposed)
    assert names.to_name(path) == (name, transposed)
    assert names.to_path(path) == (path, False)  # Flax's own names need no rule.
    assert names.to_path(name.removeprefix("transformer.")) == (path, transposed)


# --- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", ["one file", "sharded"])
def test_a_pytorch_checkpoint_gives_the_same_logits(tmp_path, tied, shards):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = make_config(tie_word_embeddings=tied, initializer_range=0.2)
    reference = transformers.GPT2LMHeadModel(config).eval()
    size = "40KB" if shards == "sharded" else "1GB"
    reference.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "sharded")
    pretrained = load_pretrained(tmp_path)
    ids = np.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    actual = pretrained.model().apply({"params": pretrained.params}, ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    assert pretrained.folder == tmp_path
    assert pretrained.ffns == ()


def test_the_published_gpt2s_form(tmp_path):
    """No prefix, the attention buffers of old, and a head although it is tied."""
    model, params = make_model()
    tensors = {name.removeprefix("transformer."): x for name, x in torch_tensors(params).items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 24, 24), np.uint8))
        tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    tensors["lm_head.weight"] = tensors["wte.weight"]
    write_folder(tmp_path, model, {"model.safetensors": tensors})
    assert_same_tree(load_pretrained(tmp_path).params, params)


def flax_files(params, form):
    if form == "msgpack":
        return {"flax_model.msgpack": params}
    if form == "msgpack without head":
        return {"flax_model.msgpack": params["transformer"]}
    if form == "flax safetensors":
        flat = {name: np.asarray(x) for name, x in flatten_dict(params, sep=".").items()}
        return {"model.safetensors": flat}
    parts = split_in_two(flatten_dict(params, sep="/"))
    shards = [f"flax_model-0000{i}-of-00002.msgpack" for i in (1, 2)]
    weight_map = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    index = {"flax_model.msgpack.index.json": {"metadata": {}, "weight_map": weight_map}}
    return {**dict(zip(shards, parts, strict=True)), **index}


@pytest.mark.parametrize(
    "form", ["msgpack", "msgpack without head", "msgpack shards", "flax safetensors"]
)
def test_flax_checkpoints(tmp_path, form):
    model, params = make_model()
    write_folder(tmp_path, model, flax_files(params, form))
    assert_same_tree(load_pretrained(tmp_path).params, params)


@needs_flax
@pytest.mark.parametrize("form", ["live", "msgpack", "msgpack shards", "safetensors"])
def test_a_real_flax_model(tmp_path, form):
    config = make_config(tie_word_embeddings=False)
    source = reference = transformers.FlaxGPT2LMHeadModel(config, seed=0)
    if form != "live":
        source = tmp_path
        reference.save_pretrained(
            tmp_path,
            max_shard_size="40KB" if form == "msgpack shards" else "1GB",
            safe_serialization=form == "safetensors",
        )
    pretrained = load_pretrained(source)
    assert_same_tree(pretrained.params, reference.params)
    ids = np.arange(20).reshape(2, 10)
    actual = pretrained.model().apply({"params": pretrained.params}, ids)
    np.testing.assert_allclose(actual, reference(ids).logits, atol=1e-4, rtol=0)


def test_a_pair_of_config_and_params():
    model, params = make_model()
    pretrained = load_pretrained((model.config, params))
    assert_same_tree(pretrained.params, params)
    assert pretrained.config is model.config
    assert pretrained.folder is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_param_dtype(tmp_path, dtype):
    model, params = make_model(dtype=dtype)
    write_folder(tmp_path, model, {"model.safetensors": torch_tensors(params)})
    assert_same_tree(load_pretrained(tmp_path, param_dtype=None).params, params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert_same_tree(load_pretrained(tmp_path).params, wide)


def test_every_leaf_goes_where_it_is_told(tmp_path):
    model, params = make_model()
    write_folder(tmp_path, model, {"model.safetensors": torch_tensors(params)})
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    asked = {}

    def sharding(path, shape):
        asked[path] = shape
        return split if path[-1] == "kernel" else None

    loaded = load_pretrained(tmp_path, param_dtype=jnp.float16, sharding=sharding).params
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    assert_same_tree(loaded, half)
    flat = flatten_dict(loaded)
    assert asked == {path: leaf.shape for path, leaf in flat.items()}
    assert all((leaf.sharding == split) == (path[-1] == "kernel") for path, leaf in flat.items())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
def test_other_families_go_to_pytorch_and_back(tmp_path, name):
    torch = pytest.importorskip("torch")
    changes = {"attention_bias": True, "mlp_bias": True} if name == "llama" else {}
    model, params = tiny_models.make_model(name, config=tiny_models.make_config(name, **changes))
    save_pretrained(tmp_path / "ours", model, params, dtype=jnp.bfloat16, max_shard_size=30_000)
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    ids = np.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected = reference.eval()(torch.tensor(ids)).logits.numpy()
    reference.bfloat16().save_pretrained(tmp_path / "theirs")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    for folder in ("ours", "theirs"):
        loaded = load_pretrained(tmp_path / folder, param_dtype=None)
        assert_same_tree(loaded.params, rounded)
    actual = loaded.model().apply({"params": loaded.params}, ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def test_fused_weights_that_the_config_does_not_fit(tmp_path):
    model, params = tiny_models.make_model("phi3")
    save_pretrained(tmp_path / "model", model, params)
    stored = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert stored["model.layers.0.self_attn.qkv_proj.weight"].shape == (64, 32)
    assert not [name for name in stored if "gate_proj" in name or "q_proj" in name]
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"num_key_value_heads": 4}))
    with pytest.raises(CheckpointError, match=r"qkv_proj.*\(64, 32\).* 32 \+ 32 \+ 32 rows"):
        load_pretrained(tmp_path / "model")


def test_a_hub_name(tmp_path, monkeypatch):
    model, params = make_model()
    write_folder(tmp_path, model, {"flax_model.msgpack": params})
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same_tree(load_pretrained("someone/some-gpt2").params, params)
    assert {name for name, _ in calls} == {"someone/some-gpt2"}
    # The msgpack is fetched because there was no safetensors, and never a pickle.
    assert [any("msgpack" in pattern for pattern in patterns) for _, patterns in calls] == [
        False,
        True,
    ]
    assert not any(".bin" in pattern for _, patterns in calls for pattern in patterns)


def test_a_hub_name_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'no-such/gpt2' is not a folder here, and the Hug"):
        load_pretrained("no-such/gpt2")


_MEASURE = """
import re, sys
from sparseffn_jax.checkpoints.pretrained import load_pretrained

def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])

load_pretrained(sys.argv[1])
before = peak()
pretrained = load_pretrained(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("form", ["safetensors", "msgpack"])
def test_loading_holds_about_one_copy(tmp_path, form):
    sizes = {}
    for name, changes in {"small": {}, "large": {"n_embd": 512, "n_layer": 6}}.items():
        model, params = make_model(**changes)
        sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        files = (
            {"model.safetensors": torch_tensors(params)}
            if form == "safetensors"
            else {"flax_model.msgpack": params}
        )
        write_folder(tmp_path / name, model, files)
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, tmp_path / "small", tmp_path / "large"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # Pages of mapped files count as resident too. A msgpack file is decoded whole: one copy is the
    # file, one the arrays.
    limit = 1.2 if form == "safetensors" else 2.4
    assert sizes["large"] < int(output) < limit * sizes["large"]


# --- saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "ffns",
    [(), (LOW_RANK, None), (CIRCULANT, LOW_RANK), (None, MASKED)],
    ids=["dense", "low rank", "circulant", "masked"],
)
def test_round_trip_is_exact(tmp_path, ffns, dtype):
    model, params = make_model(ffns, dtype, tie_word_embeddings=not ffns, layer_norm_epsilon=1e-6)
    save_pretrained(tmp_path / "model", model, params)
    pretrained = load_pretrained(tmp_path / "model", param_dtype=None)
    assert_same_tree(pretrained.params, params)
    assert pretrained.ffns == ffns
    assert pretrained.config.layer_norm_epsilon == 1e-6
    assert pretrained.config.tie_word_embeddings == (not ffns)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("max_shard_size", [10**9, 30_000])
def test_transformers_loads_a_dense_model(tmp_path, max_shard_size):
    torch = pytest.importorskip("torch")
    model, params = make_model(activation_function="relu")
    save_pretrained(tmp_path / "model", model, params, max_shard_size=max_shard_size)
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not set(info["missing_keys"]) - {"lm_head.weight"}
    ids = np.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected = reference.eval()(torch.tensor(ids)).logits.numpy()
    actual = model.apply({"params": params}, ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def test_stored_names_and_layouts(tmp_path):
    model, params = make_model((LOW_RANK, None))
    save_pretrained(tmp_path / "model", model, params)
    stored = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    layers = params["transformer"]["h"]
    for name, expected in {
        "transformer.h.1.mlp.c_fc.weight": layers["1"]["mlp"]["c_fc"]["kernel"].T,
        "transformer.h.0.attn.c_attn.weight": layers["0"]["attn"]["c_attn"]["kernel"].T,
        "transformer.h.0.mlp.spectral.up.axes": layers["0"]["mlp"]["spectral"]["up"]["axes"],
        "transformer.h.0.mlp.spectral.polynomial": layers["0"]["mlp"]["spectral"]["polynomial"],
    }.items():
        np.testing.assert_array_equal(stored[name], expected, err_msg=name)
    assert "lm_head.weight" not in stored
    sparse_ffn = json.loads((tmp_path / "model" / "config.json").read_text())["sparse_ffn"]
    assert SparseFFNConfig.from_dict(sparse_ffn[0]) == LOW_RANK
    assert sparse_ffn[1] is None


def test_shards(tmp_path):
    model, params = make_model((LOW_RANK, None))
    save_pretrained(tmp_path / "model", model, params, max_shard_size=30_000)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert max(shard.stat().st_size for shard in shards) < 34_000
    assert_same_tree(load_pretrained(tmp_path / "model").params, params)


def test_saving_in_another_dtype(tmp_path):
    model, params = make_model((LOW_RANK, None))
    save_pretrained(tmp_path / "model", model, params, dtype=jnp.float16)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    assert_same_tree(load_pretrained(tmp_path / "model", param_dtype=None).params, half)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float16"


def snapshot(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_nothing_is_overwritten_unasked(tmp_path):
    model, params = make_model()
    folder = tmp_path / "model"
    folder.mkdir()
    save_pretrained(folder, model, params)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=r"not empty, nothing was written.*overwrite=True"):
        save_pretrained(folder, *make_model((LOW_RANK, None)))
    assert snapshot(tmp_path) == before
    save_pretrained(folder, *make_model((LOW_RANK, None)), overwrite=True)
    assert load_pretrained(folder).ffns == (LOW_RANK, None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_no_model_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="is not a model folder"):
        save_pretrained(tmp_path, *make_model(), overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_save_leaves_what_was(tmp_path, monkeypatch, exists):
    model, params = make_model()
    if exists:
        save_pretrained(tmp_path / "model", model, params)
    before = snapshot(tmp_path)

    def save_file(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", save_file)
    with pytest.raises(CheckpointError, match=r"cannot write .*model: .*No space left on device"):
        save_pretrained(tmp_path / "model", model, params, overwrite=True)
    assert snapshot(tmp_path) == before
    assert (tmp_path / "model").exists() == exists


def test_what_an_earlier_save_has_left_does_no_harm(tmp_path):
    folder, stale = tmp_path / "model", tmp_path / ".model.old"
    save_pretrained(folder, *make_model())
    stale.mkdir()
    (stale / "file").write_text("left over")
    save_pretrained(folder, *make_model((LOW_RANK, None)), overwrite=True)
    assert load_pretrained(folder).ffns == (LOW_RANK, None)


def test_the_old_model_stays_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    save_pretrained(tmp_path / "model", *make_model())
    before = snapshot(tmp_path)

    def fsync(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"cannot write .*Input/output error"):
        save_pretrained(tmp_path / "model", *make_model((LOW_RANK, None)), overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (jnp.float16, -7e4, r"h\.0\.ln_1\.bias has a value of magnitude 70000.* float16: take bf"),
        (jnp.bfloat16, 3.4e38, "does not fit bfloat16: take float32"),
        (jnp.int8, 1.0, "dtype=int8: expected one of .*bfloat16"),
        ("float17", 1.0, "dtype='float17': expected one of"),
    ],
)
def test_a_dtype_that_the_values_do_not_fit(tmp_path, dtype, value, message):
    model, params = make_model()
    save_pretrained(tmp_path / "model", model, params)
    before = snapshot(tmp_path)
    norm = params["transformer"]["h"]["0"]["ln_1"]
    norm["bias"] = norm["bias"].at[1].set(value)
    with pytest.raises(CheckpointError, match=message):
        save_pretrained(tmp_path / "model", model, params, dtype=dtype, overwrite=True)
    assert snapshot(tmp_path) == before


def test_what_cannot_be_saved(tmp_path):
    model, params = make_model()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_pretrained(tmp_path / "file" / "model", model, params)
    with pytest.raises(CheckpointError, match="is a file: name a folder"):
        save_pretrained(tmp_path / "file", model, params)
    own, own_params = make_model((None, lambda **_: nn.Dense(D, name="mlp")))
    with pytest.raises(CheckpointError, match="layer 1 has an FFN of your own"):
        save_pretrained(tmp_path / "model", own, own_params)
    with pytest.raises(CheckpointError, match=r"params lacks 7 of .*h\.0\.mlp\.spectral\.down"):
        save_pretrained(tmp_path / "model", GPT2LMHeadModel(model.config, (LOW_RANK, None)), params)
    wider = GPT2LMHeadModel(make_config(n_positions=25))
    with pytest.raises(CheckpointError, match=r"params holds .*wpe.embedding with shape"):
        save_pretrained(tmp_path / "model", wider, params)
    with pytest.raises(CheckpointError, match="no tokenizer files to copy"):
        save_pretrained(tmp_path / "model", model, params, tokenizer=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- damaged and wrong checkpoints -------------------------------------------------------------


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    """A sparse checkpoint in two shards."""
    folder = tmp_path_factory.mktemp("good") / "model"
    save_pretrained(folder, *make_model((LOW_RANK, None)), max_shard_size=60_000)
    return folder


def edit_json(name, **changes):
    def edit(folder):
        values = json.loads((folder / name).read_text())
        values = {**values, **changes}
        (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    return edit


def edit_index(tensor, shard):
    def edit(folder):
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"][tensor] = shard
        file.write_text(json.dumps(index))

    return edit


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def edit_first_shard(edit):
    def edit_shard(folder):
        file = min(folder.glob("*.safetensors"))
        file.write_bytes(edit(file.read_bytes()))

    return edit_shard


def lie_about_the_length(data):
    return (10**15).to_bytes(8, "little") + data[8:]


def lie_about_a_shape(data):
    assert b"[32,96]" in data
    return data.replace(b"[32,96]", b"[96,32]")


def only(name, content=b"x"):
    def edit(folder):
        for file in folder.glob("model*"):
            file.unlink()
        (folder / name).write_bytes(content)

    return edit


def in_one_file(**changes):
    """Replaces the shards by one file with some tensors changed, or left out where None."""

    def edit(folder):
        tensors = {}
        for file in folder.glob("*.safetensors"):
            tensors |= safetensors.numpy.load_file(file)
            file.unlink()
        tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")

    return edit


INDEX = "model.safetensors.index.json"
WTE = "transformer.wte.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(*case[1:], id=case[0])
        for case in [
            ("no config", lambda f: (f / "config.json").unlink(), "has no config.json"),
            ("config no JSON", write("config.json", b"{"), r"config\.json is not JSON"),
            ("config not text", write("config.json", b"\xff"), r"config\.json is not JSON"),
            ("config a list", write("config.json", b"[]"), "must hold a JSON object"),
            (
                "family",
                edit_json("config.json", model_type="bert"),
                "model_type='bert': known model families are gpt2, gptj, llama, mistral",
            ),
            ("no family", edit_json("config.json", model_type=...), "model_type=None: known"),
            ("layers", edit_json("config.json", n_layer=-2), "n_layer=-2: expected a positive"),
            ("text as size", edit_json("config.json", n_embd="32"), r"config\.json .*n_embd"),
            ("heads", edit_json("config.json", n_head=5), r"config\.json: n_head=5 does not div"),
            (
                "activation",
                edit_json("config.json", activation_function="gelo"),
                r"config\.json: unknown activation 'gelo'",
            ),
            (
                "ffns",
                edit_json("config.json", sparse_ffn=[None]),
                "one entry for each of n_layer=2",
            ),
            (
                "ffn",
                edit_json("config.json", sparse_ffn=[None, {"d_model": 32}]),
                r"sparse_ffn\[1\]: config lacks d_ff",
            ),
            (
                "forgotten ffns",
                edit_json("config.json", sparse_ffn=...),
                r"lacks 4 of .*transformer\.h\.0\.mlp\.c_fc\.bias, transformer\.h\.0\.mlp\.c_fc"
                r"\.kernel \(transformer\.h\.0\.mlp\.c_fc\.weight in PyTorch\)",
            ),
            ("fewer layers", edit_json("config.json", n_layer=1, sparse_ffn=...), "lacks 4"),
            (
                "extra",
                in_one_file(score__weight=np.zeros((2, 32), np.float32)),
                r"holds 1 weights that the model has no place for: score\.weight",
            ),
            (
                "twice",
                in_one_file(wte__weight=np.zeros((97, 32), np.float32)),
                "holds twice, under two names: transformer.wte.weight|wte.weight",
            ),
            (
                "missing",
                in_one_file(transformer__wte__weight=None),
                r"model\.safetensors lacks 1 of the model's \d+ weights: .*\(transformer\.wte\.w",
            ),
            (
                "shape",
                in_one_file(transformer__wte__weight=np.zeros((96, 32), np.float32)),
                r"holds transformer\.wte\.weight with shape \(96, 32\), but the config .*97, 32",
            ),
            (
                "not transposed",
                in_one_file(transformer__h__1__mlp__c_fc__weight=np.zeros((128, 32), np.float32)),
                r"c_fc\.weight with shape \(128, 32\), but the config makes it \(32, 128\)",
            ),
            (
                "quantised",
                in_one_file(transformer__wte__weight=np.zeros((97, 32), np.int8)),
                r"holds transformer\.wte\.weight as I8: quantised",
            ),
            ("truncated", edit_first_shard(lambda data: data[:-9]), "not a whole safetensors"),
            ("empty", edit_first_shard(lambda _: b""), "not a whole safetensors"),
            ("pointer", edit_first_shard(lambda _: b"version https://git-lfs"), "Git LFS pointer"),
            ("lying length", edit_first_shard(lie_about_the_length), "not a whole safetensors"),
            (
                "lying shape",
                edit_first_shard(lie_about_a_shape),
                r"with shape \(96, 32\), but",
            ),
            ("index no JSON", write(INDEX, b"[1,"), "index.json is not JSON"),
            ("index empty", write(INDEX, b"{}"), "has no weight_map"),
            (
                "no such shard",
                edit_index(WTE, "model-9.safetensors"),
                r"transformer\.wte\.weight, in model-9\.safetensors, which is not in",
            ),
            ("outside", edit_index(WTE, "../x.safetensors"), "'../x.safetensors': expected the n"),
            ("absolute", edit_index(WTE, "/etc/passwd"), "'/etc/passwd': expected the name of a"),
            ("parent", edit_index(WTE, ".."), "which is not in|expected the name"),
            ("number", edit_index(WTE, 3), "in 3: expected the name of a file"),
            (
                "wrong index",
                edit_index("transformer.nothing", "model-00001-of-00002.safetensors"),
                "does not hold what model.safetensors.index.json says: transformer.nothing",
            ),
            (
                "pickle",
                only("pytorch_model.bin"),
                r"only pytorch_model\.bin, a pickle file, .* never opened\. .*save_pretrained",
            ),
            ("nothing", only("notes.txt"), "neither of them"),
            ("msgpack", only("flax_model.msgpack", b"\x85abc"), "not a whole msgpack file"),
            ("msgpack empty", only("flax_model.msgpack", b""), "not a whole msgpack file"),
            ("msgpack list", only("flax_model.msgpack", b"\x91\x01"), "not a whole msgpack file"),
            (
                "msgpack number",
                only("flax_model.msgpack", b"\x81\xa1a\x01"),
                "holds something else than an array as a",
            ),
        ]
    ],
)
def test_a_bad_folder_gives_one_clear_error(tmp_path, good_folder, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(good_folder, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(folder)
    assert str(tmp_path) in str(error.value)


def test_a_truncated_msgpack(tmp_path):
    model, params = make_model()
    write_folder(tmp_path, model, {"flax_model.msgpack": params})
    file = tmp_path / "flax_model.msgpack"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole msgpack file"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("./model", "there is no folder"),
        (__file__, "is a file: give the folder"),
        (3, "cannot load a model from a int"),
        ((transformers.BertConfig(), {}), "model_type='bert'"),
        ((make_config(), {}), "lacks 28 of the model's 28 weights"),
    ],
)
def test_a_wrong_source_gives_one_clear_error(source, message):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(source)


# --- tokenizers --------------------------------------------------------------------------------


def make_tokenizer(tokens=50):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tokens)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")


def test_the_tokenizer_travels_with_the_model(tmp_path):
    model, params = make_model()
    save_pretrained(tmp_path / "a", model, params, tokenizer=make_tokenizer())
    save_pretrained(tmp_path / "b", model, params, tokenizer=tmp_path / "a")
    for name in "ab":
        tokenizer = load_tokenizer(tmp_path / name)
        assert tokenizer("w3 w7")["input_ids"] == [3, 7]
        assert tokenizer.eos_token_id == 1
        check_tokenizer(tokenizer, model.config)


def test_a_folder_without_tokenizer(tmp_path):
    save_pretrained(tmp_path / "model", *make_model())
    with pytest.raises(CheckpointError, match=r"has no tokenizer: expected tokenizer\.json"):
        load_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version":')
    with pytest.raises(CheckpointError, match="no tokenizer can be read from"):
        load_tokenizer(tmp_path / "model")


def test_a_tokenizer_whose_merges_make_no_tokens(tmp_path):
    """Some versions of tokenizers end in a panic, which is no Exception."""
    model = {"type": "BPE", "vocab": {"ab": 0, "cd": 1}, "merges": [["ab", "cd"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="no tokenizer can be read from"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model():
    check_tokenizer(make_tokenizer(VOCAB), make_config())
    with pytest.raises(CheckpointError, match=r"wrong tokenizer: it has 98 tokens, .*=97"):
        check_tokenizer(make_tokenizer(VOCAB + 1), make_config())
