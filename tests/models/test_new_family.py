"""A family that nobody knows: what is in this file, and one call of register, is all it takes.

It is a GPT without biases whose parts have other names, other orders and other layouts than those
of the families in the library.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from transformers import GPT2Config

import sparseffn_jax as sf
from sparseffn_jax.models import families
from sparseffn_jax.models.decoder import Block, BlockCollection, Decoder
from sparseffn_jax.models.names import NameMap, Rule, linear_rules
from sparseffn_jax.models.spec import DecoderSpec, FFNLayout
from sparseffn_jax.nn.attention import CausalAttention
from sparseffn_jax.nn.parts import dense, embed
from sparseffn_jax.train.sharding import leaf_sharding

D, D_FF, VOCAB, POSITIONS, HEADS = 32, 64, 96, 24, 4


class MadeUpConfig(GPT2Config):
    model_type = "made-up"


class MadeUpFFN(nn.Module):
    config: MadeUpConfig
    dtype: object
    param_dtype: object

    @nn.compact
    def __call__(self, x):
        return dense(self, "narrow", D)(jax.nn.relu(dense(self, "wide", self.config.n_inner)(x)))


class MadeUpMixer(CausalAttention):
    config: MadeUpConfig
    dtype: object
    param_dtype: object

    @nn.compact
    def __call__(self, x, attention_mask, deterministic, init_cache):
        parts = [
            dense(self, name, D)(x).reshape(*x.shape[:2], HEADS, D // HEADS)
            for name in ("ask", "offer", "tell")
        ]
        return dense(self, "merge", D)(
            self.attend(*parts, attention_mask, deterministic, init_cache)
        )


class MadeUpBlock(Block):
    mlp = MadeUpFFN

    @nn.compact
    def __call__(self, x, attention_mask, rotary_table, deterministic, init_cache):
        x = x + MadeUpMixer(self.config, self.dtype, self.param_dtype, name="mixer")(
            nn.LayerNorm(use_bias=False, name="before")(x),
            attention_mask,
            deterministic,
            init_cache,
        )
        return x + self.feed_forward(nn.LayerNorm(use_bias=False, name="between")(x))


class MadeUpBody(nn.Module):
    config: MadeUpConfig
    ffns: tuple
    dtype: object
    param_dtype: object
    remat: bool

    def setup(self):
        dtypes = (self.dtype, self.param_dtype)
        self.words = embed(self.config, *dtypes)
        self.places = nn.Embed(POSITIONS, D)
        self.floors = BlockCollection(MadeUpBlock, self.config, self.ffns, *dtypes, self.remat)
        self.after = nn.LayerNorm(use_bias=False)

    def __call__(self, input_ids, attention_mask, position_ids, deterministic, init_cache):
        x, table = self.embed(input_ids, position_ids, deterministic)
        return self.after(self.floors(x, attention_mask, table, deterministic, init_cache))

    def embed(self, input_ids, position_ids, deterministic):
        return self.words(input_ids) + self.places(position_ids), None


class MadeUpForCausalLM(Decoder):
    config_class = MadeUpConfig
    layer_path = ("tower", "floors")
    ffn_layout = FFNLayout(up="wide", down="narrow")
    d_ff_key = "n_inner"
    block = MadeUpBlock
    names = NameMap(
        rules=(
            Rule("tower.words.embedding", "tower.word_table.weight"),
            Rule("tower.places.embedding", "tower.place_table.weight"),
            Rule("tower.floors.*.before.scale", "tower.floors.*.norm_a.weight"),
            *linear_rules("tower.floors.*.mixer", ("ask", "offer", "tell", "merge")),
            Rule("tower.floors.*.between.scale", "tower.floors.*.norm_b.weight"),
            Rule("tower.floors.*.mlp.wide.kernel", "tower.floors.*.up.weight", True),
            Rule("tower.floors.*.mlp.narrow.kernel", "tower.floors.*.down.weight", True),
            Rule("tower.after.scale", "tower.norm.weight"),
            Rule("lm_head.kernel", "lm_head.weight", True),
        ),
        prefix="tower.",
    )
    sharding = (
        (r"words/embedding", ("tensor", "fsdp")),
        (r"places/embedding", (None, "fsdp")),
        (r"mixer/(ask|offer|tell)/kernel", ("fsdp", "tensor")),
        (r"mixer/merge/kernel", ("tensor", "fsdp")),
        (r"mlp/wide/kernel", ("fsdp", "tensor")),
        (r"mlp/narrow/kernel", ("tensor", "fsdp")),
        (r"lm_head/kernel", ("fsdp", "tensor")),
    )
    attention = "mixer"
    norms = ("before", "between", "after")

    def setup(self):
        self.tower = MadeUpBody(*self._body_settings())
        self.lm_head = self._untied_head()

    @staticmethod
    def spec_of(config):
        return DecoderSpec(config.n_layer, POSITIONS, D, config.n_inner, "relu", False, False)


@pytest.fixture(autouse=True)
def _registered():
    families.register(MadeUpForCausalLM)
    yield
    del families._families["made-up"]


@pytest.fixture(scope="module")
def model_and_params():
    config = MadeUpConfig(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=D,
        n_layer=2,
        n_head=HEADS,
        n_inner=D_FF,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = MadeUpForCausalLM(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def windows():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (24, 17), dtype=np.int32)
    return sf.TokenWindows(tokens[8:], tokens[:8])


def sparse_ffn():
    return sf.SparseFFNConfig(
        D,
        D_FF,
        "relu",
        spectral=sf.SpectralConfig("low_rank", 48, rank=8),
        micro=sf.MicroRefinementConfig(sf.CoreConfig(16)),
        bias=False,
    )


@pytest.fixture(scope="module")
def sparse_model_and_params(model_and_params):
    calibration = windows().train[:, :16]
    return sf.sparsify(*model_and_params, (sparse_ffn(), None), calibration, distill_steps=2)


def flat(tree):
    return {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}


def torch_tensors(params):
    """What a PyTorch model of this family would hold, written out by hand."""
    tower, tensors = params["tower"], {"lm_head.weight": params["lm_head"]["kernel"].T}
    tensors["tower.word_table.weight"] = tower["words"]["embedding"]
    tensors["tower.place_table.weight"] = tower["places"]["embedding"]
    tensors["tower.norm.weight"] = tower["after"]["scale"]
    for i, floor in tower["floors"].items():
        tensors[f"tower.floors.{i}.norm_a.weight"] = floor["before"]["scale"]
        tensors[f"tower.floors.{i}.norm_b.weight"] = floor["between"]["scale"]
        tensors[f"tower.floors.{i}.up.weight"] = floor["mlp"]["wide"]["kernel"].T
        tensors[f"tower.floors.{i}.down.weight"] = floor["mlp"]["narrow"]["kernel"].T
        for name, linear in floor["mixer"].items():
            tensors[f"tower.floors.{i}.mixer.{name}.weight"] = linear["kernel"].T
    return {name: np.array(tensor, order="C") for name, tensor in tensors.items()}


def test_checkpoints_go_in_and_out_under_pytorch_s_names(tmp_path, model_and_params):
    model, params = model_and_params
    expected = torch_tensors(params)
    (tmp_path / "theirs").mkdir()
    safetensors.numpy.save_file(expected, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(model.config.to_json_string())
    loaded = sf.load_pretrained(tmp_path / "theirs")
    assert isinstance(loaded.model(), MadeUpForCausalLM)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    sf.save_pretrained(tmp_path / "ours", model, params)
    stored = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(stored[name], tensor, err_msg=name)


def test_sparse_checkpoints_come_back(tmp_path, sparse_model_and_params):
    model, params = sparse_model_and_params
    assert "tower/floors/0/mlp/core/up/kernel" in flat(params)
    sf.save_pretrained(tmp_path / "model", model, params)
    loaded = sf.load_pretrained(tmp_path / "model")
    assert loaded.ffns == model.ffns
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def moved_by(recipe, model, params, folder):
    """Trains for one step, or one in each stage, and returns the paths of what has changed."""
    stages = 2 if recipe == "stepwise" else 1
    config = sf.TrainConfig(
        steps=stages, warmup_steps=0, recipe=recipe, learning_rate=1e-2, lora_rank=2, eval_every=0
    )
    result = sf.train(model, params, windows(), config, folder)
    before, after = flat(params), flat(result.params)
    assert before.keys() == after.keys()
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_one_step_moves_what_the_recipe_says(tmp_path, sparse_model_and_params):
    model, params = sparse_model_and_params
    paths = flat(params).keys()
    ffns = {path for path in paths if "/mlp/" in path}
    mixers = {path for path in paths if "/mixer/" in path}
    norms = {path for path in paths if path.endswith("/scale")}
    assert len(norms) == 5
    assert moved_by("ffn_only", model, params, tmp_path / "ffn_only") == ffns
    assert moved_by("stepwise", model, params, tmp_path / "stepwise") == ffns | mixers | norms
    # An adapter's first factor has no gradient while the second is zero, but the product moves.
    assert moved_by("lora", model, params, tmp_path / "lora") == ffns | mixers


def test_its_leaves_are_dealt_out(sparse_model_and_params):
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    _, params = sparse_model_and_params
    specs = {
        "/".join(entry.key for entry in path): P(*leaf_sharding(mesh, path, leaf.shape).spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert specs["tower/words/embedding"] == P("tensor", "fsdp")
    assert specs["tower/floors/1/mixer/tell/kernel"] == P("fsdp", "tensor")
    assert specs["tower/floors/1/mlp/narrow/kernel"] == P("tensor", "fsdp")
    assert specs["tower/floors/0/mlp/core/down/kernel"] == P("tensor", "fsdp")
    assert {path for path, spec in specs.items() if spec == P()} == {
        path for path in specs if path.endswith("/scale")
    }


def test_it_generates(sparse_model_and_params):
    model, params = sparse_model_and_params
    prompt = np.arange(1, 7).reshape(1, 6)
    ids = np.asarray(sf.generate(model, params, prompt, 5))
    sequence = prompt
    for _ in range(5):
        logits = model.apply({"params": params}, sequence)
        sequence = np.append(sequence, np.argmax(logits[:, -1:], -1), axis=1)
    np.testing.assert_array_equal(ids, sequence[:, -ids.shape[1] :])


def test_what_cannot_be_registered():
    class Same(MadeUpForCausalLM):
        pass

    with pytest.raises(ValueError, match=r"Same cannot be .*'made-up', which is MadeUpForCausalLM"):
        families.register(Same)

    class Half(Decoder):
        config_class = MadeUpConfig
        layer_path = ("tower", "floors")

    with pytest.raises(ValueError, match="attributes ffn_layout, d_ff_key, block, names, sharding"):
        families.register(Half)
    families.register(MadeUpForCausalLM)
    assert [*families.FAMILIES].count("made-up") == 1
