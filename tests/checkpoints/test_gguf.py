"""GGUF files, written here as llama.cpp's converters write them, against transformers and gguf."""

import json
import struct
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict
from gguf import GGMLQuantizationType as Kind
from gguf_files import byte_level, torch_tensors, write_gguf
from tiny_models import LONGROPE, VOCAB, make_config, make_ids, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, LlamaConfig

import sparseffn_jax as sf
from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.gguf_header import read_gguf_header
from sparseffn_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer, load_tokenizer
from sparseffn_jax.models import families

FLOATS = {Kind.F32: jnp.float32, Kind.F16: jnp.float16, Kind.BF16: jnp.bfloat16}
needs_transformers_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="transformers 4 exchanges begin and end of text, and needs PyTorch",
)
TEXT = """def f(x):\n    return  12 + x  # 345\n\n\t'It's' naïve, ½ of 2026: 日本語 \U0001f600
 1. a list\n   2. of (3)\n    10 items; we'll see 1000000 of them\r\n"""


def write(file, family="llama", kind=Kind.F32, config=None, **options):
    model, params = make_model(family, config=config)
    write_gguf(file, model.config, torch_tensors(model, params), kind, **options)
    return model, params


def assert_same_tree(actual, expected, **tolerance):
    actual, expected = flatten_dict(actual), flatten_dict(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(
            np.asarray(actual[path], np.float32), leaf, err_msg=str(path), **tolerance
        )


# --- models ------------------------------------------------------------------------------------


ALL_KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1]
# Mistral's files are read as LLaMA's.
READ = [
    name
    for name, family in families.FAMILIES.items()
    if name != "mistral" and vars(family).get("gguf")
]
# Kinds of numbers are read alike in all families.
NEWER = [name for name in READ if name not in ("gpt2", "llama")]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((name, kind) for name in ("llama", "gpt2") for kind in ALL_KINDS),
        *((name, Kind.Q8_0) for name in NEWER),
    ],
)
def test_what_is_written_is_read(tmp_path, family, kind):
    model, params = write(tmp_path / "m.gguf", family, kind)
    loaded = load_pretrained(tmp_path / "m.gguf", param_dtype=None)
    assert loaded.spec == model.spec
    assert (loaded.ffns, loaded.folder) == ((), None)
    leaves = flatten_dict(loaded.params)
    # Steps of 1/256 and 1/16 of a block's range, which is below 2 here.
    step = {Kind.F32: 0, Kind.F16: 1e-3, Kind.BF16: 8e-3, Kind.Q8_0: 8e-3, Kind.Q4_1: 0.1}[kind]
    assert_same_tree(loaded.params, params, atol=step, rtol=0)
    assert {leaf.dtype for leaf in leaves.values()} == {
        jnp.dtype(jnp.float32),
        jnp.dtype(FLOATS.get(kind, jnp.float32)),
    }
    half = load_pretrained(tmp_path / "m.gguf", param_dtype=jnp.bfloat16).params
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def big_config(family):
    # The K quantisations have blocks of 256. transformers reads no number of positions of a GPT-2.
    if family == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB, n_embd=256, n_layer=2, n_head=4, n_positions=1024, bos_token_id=96,
            eos_token_id=96,
        )  # fmt: skip
    return families.FAMILIES[family].config_class(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=64,
        rms_norm_eps=1e-5, tie_word_embeddings=True, **BIG.get(family, {}),
    )  # fmt: skip


# transformers takes the heads of every Qwen3 in a GGUF file to be 128 wide.
BIG = {
    "llama": {"rope_theta": 50_000.0},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"head_dim": 256, "pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
}


def as_transformers_reads(file):
    torch = pytest.importorskip("torch")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # from_pretrained does the same, but asks for accelerate.
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def tokens_of(count):
    return byte_level(["t", "0", *(f"t{i}" for i in range(count - 2))], ["t 0"], 1)


MANY_KINDS = [*ALL_KINDS, Kind.Q4_0, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((name, kind) for name in ("llama", "gpt2") for kind in MANY_KINDS),
        # transformers reads no SmolLM3.
        *((name, Kind.F16) for name in NEWER if name != "smollm3"),
    ],
)
def test_transformers_reads_the_same_model(tmp_path, family, kind):
    torch = pytest.importorskip("torch")
    file = tmp_path / "m.gguf"
    config = big_config(family)
    # transformers' default for a Phi-3 is not below this vocabulary's size.
    tokenizer = tokens_of(VOCAB) | ({"ggml.padding_token_id": 0} if family == "phi3" else {})
    write(file, family, kind, config, tokenizer=tokenizer)
    reference = as_transformers_reads(file)
    loaded = load_pretrained(file)
    ids = np.asarray(make_ids(shape=(2, 10)))
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
        greedy = reference.generate(
            torch.tensor(ids), attention_mask=torch.ones(2, 10), max_new_tokens=8, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    actual = loaded.model().apply({"params": loaded.params}, ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    assert np.std(expected) > 0.1
    np.testing.assert_array_equal(sf.generate(loaded.model(), loaded.params, ids, 8), greedy)


VARIANTS = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "theta": {"rope_theta": 300.0, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_of_a_llama_counts(tmp_path, variant):
    config = make_config("llama", **VARIANTS[variant])
    settings = {"rope__freq_base": 300.0} if variant == "theta" else {}
    if variant == "wide heads":
        settings |= {"attention__key_length": 16, "attention__value_length": 16}
    model, params = write(tmp_path / "m.gguf", config=config, **settings)
    loaded = load_pretrained(tmp_path / "m.gguf")
    assert_same_tree(loaded.params, params, rtol=0)
    ids = make_ids()
    np.testing.assert_array_equal(
        loaded.model().apply({"params": loaded.params}, ids), model.apply({"params": params}, ids)
    )
    assert loaded.config.rms_norm_eps == config.rms_norm_eps


# More than what files of these families say must be the default of all such models.
OF_FILES = {
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"attention_bias": True},
    "phi3": {"rope_scaling": None, "partial_rotary_factor": 0.5, "sliding_window": 5},
    "smollm3": {"no_rope_layers": None, "num_hidden_layers": 5, "tie_word_embeddings": False},
    "gemma3_text": {
        "sliding_window_pattern": 6, "num_hidden_layers": 7, "query_pre_attn_scalar": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", NEWER)
def test_a_file_makes_the_same_model(tmp_path, family):
    config = make_config(family, **OF_FILES.get(family, {}))
    settings = {"rope__dimension_count": 4} if family == "phi3" else {}
    model, params = write(tmp_path / "m.gguf", family, config=config, **settings)
    loaded = load_pretrained(tmp_path / "m.gguf")
    assert type(loaded.model()) is type(model)
    actual = loaded.model().apply({"params": loaded.params}, make_ids())
    expected = model.apply({"params": params}, make_ids())
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


def longrope_file(file, **settings):
    """Writes a Phi-3 for long texts."""
    extra = {
        f"rope_factors_{name}.weight": np.array(LONGROPE[f"{name}_factor"], np.float32)
        for name in ("long", "short")
    }
    # From 8 tokens to 24.
    factor = {"rope__scaling__attn_factor": float(np.sqrt(1 + np.log(3) / np.log(8)))}
    return write(file, "phi3", extra=extra, **factor | settings)


def test_phi_3_scales_its_frequencies(tmp_path):
    model, params = longrope_file(tmp_path / "m.gguf")
    loaded = load_pretrained(tmp_path / "m.gguf")
    for tokens in (7, 12):
        ids = make_ids(shape=(2, tokens))
        actual = loaded.model().apply({"params": loaded.params}, ids)
        expected = model.apply({"params": params}, ids)
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope__scaling__attn_factor": 1.2}, r"attn_factor=1\.2: expected 1\.23"),
        ({"rope__dimension_count": 6}, r"rope_factors_long\.weight has shape \(4,\): exp.*\(3,\)"),
        (
            {"rope__dimension_count": 10},
            "rope.dimension_count=10: expected an even number of the 8",
        ),
    ],
)
def test_a_phi_3_that_cannot_be(tmp_path, settings, message):
    longrope_file(tmp_path / "m.gguf", **settings)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path / "m.gguf")


def llama3_divisors(width, theta, factor, low, high, length):
    """Computes what the converter of llama.cpp stores, frequency by frequency."""
    divisors = []
    for frequency in 1.0 / theta ** (np.arange(0, width, 2) / width):
        wave = 2 * np.pi / frequency
        if wave < length / high:
            divisors.append(1.0)
        elif wave > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    "scaling", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 8.0, 512)]
)
def test_llama_3_scales_its_frequencies(tmp_path, scaling):
    factor, low, high, length = scaling
    rope = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }  # fmt: skip
    sizes = {"head_dim": 64, "max_position_embeddings": 2048}
    config = make_config("llama", rope_theta=500_000.0, rope_scaling=rope, **sizes)
    divisors = llama3_divisors(64, 500_000.0, *scaling)
    model, params = write(
        tmp_path / "m.gguf",
        config=config,
        attention__key_length=64,
        attention__value_length=64,
        rope__freq_base=500_000.0,
        extra={"rope_freqs.weight": divisors},
    )
    loaded = load_pretrained(tmp_path / "m.gguf")
    ids = make_ids()
    # Positions at which every frequency has turned.
    position_ids = 150 * jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    logits = [
        m.apply({"params": params}, ids, position_ids=position_ids) for m in (model, loaded.model())
    ]
    np.testing.assert_allclose(*logits, atol=1e-3, rtol=0)
    plain, _ = make_model("llama", config=make_config("llama", rope_theta=500_000.0, **sizes))
    other = plain.apply({"params": params}, ids, position_ids=position_ids)
    assert np.abs(other - logits[0]).max() > 0.05


@pytest.mark.parametrize("legacy", [False, True])
def test_linear_scaling(tmp_path, legacy):
    written = {"rope_type": "linear", "factor": 4.0}
    config = make_config("llama", rope_scaling=written)
    settings = (
        {"rope__scale_linear": 4.0}
        if legacy
        else {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    )
    model, params = write(tmp_path / "m.gguf", config=config, **settings)
    loaded = load_pretrained(tmp_path / "m.gguf")
    assert loaded.spec == model.spec
    np.testing.assert_array_equal(
        loaded.model().apply({"params": params}, make_ids()),
        model.apply({"params": params}, make_ids()),
    )


def test_a_model_folder_of_it_is_the_same(tmp_path):
    write(tmp_path / "m.gguf", kind=Kind.Q8_0, tokenizer=tokens_of(VOCAB))
    loaded = load_pretrained(str(tmp_path / "m.gguf"))
    save_pretrained(
        tmp_path / "model", loaded.model(), loaded.params, tokenizer=tmp_path / "m.gguf"
    )
    again = load_pretrained(tmp_path / "model")
    assert_same_tree(again.params, loaded.params, rtol=0)
    assert again.spec == loaded.spec
    tokenizers = [load_tokenizer(tmp_path / name) for name in ("m.gguf", "model")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    check_tokenizer(tokenizers[0], loaded.config)


def test_a_subclass_of_llama_is_another_architecture(monkeypatch):
    class Other(sf.LlamaForCausalLM):
        config_class = type("OtherConfig", (LlamaConfig,), {"model_type": "other"})

    monkeypatch.setitem(families._families, "other", Other)
    assert families.gguf_family("llama") is sf.LlamaForCausalLM


_MEASURE = """
import re, sys
import sparseffn_jax as sf

def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])

sf.load_pretrained(sf.EMBEDDED_MODEL)
print("gguf" in sys.modules)
sf.load_pretrained(sys.argv[1])
before = peak()
sf.load_pretrained(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_loading_holds_one_copy_and_imports_gguf_when_it_is_used(tmp_path):
    sizes = {}
    for name, width in {"small": 32, "large": 512}.items():
        config = make_config(
            "llama", hidden_size=width, intermediate_size=4 * width, num_hidden_layers=6
        )
        _, params = write(tmp_path / f"{name}.gguf", kind=Kind.Q8_0, config=config)
        sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, tmp_path / "small.gguf", tmp_path / "large.gguf"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert output[0] == "False"
    # What the small model took is there again for the large one.
    assert 0.9 * sizes["large"] < int(output[1]) < 1.2 * sizes["large"]


# --- headers -----------------------------------------------------------------------------------


def test_the_header_is_as_gguf_reads_it(tmp_path):
    tokenizer = byte_level(["a", "b", "ab"], ["a b"], 1, chat_template="{{ 1 }}")
    tokenizer["ggml.scores"] = [0.5, -1.0, 2.0]
    write(tmp_path / "m.gguf", kind=Kind.Q8_0, tokenizer=tokenizer)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    header = read_gguf_header(tmp_path / "m.gguf")
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    ours = {k: x.tolist() if hasattr(x, "tolist") else x for k, x in header.settings.items()}
    assert ours == theirs
    assert {name: (x.shape, x.type, x.offset) for name, x in header.tensors.items()} == {
        x.name: (tuple(x.shape[::-1]), x.tensor_type, x.data_offset) for x in reader.tensors
    }


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(settings=(), tensors=(), version=3, counts=None):
    tensor_count, count = counts or (len(tensors), len(settings))
    start = b"GGUF" + struct.pack("<IQQ", version, tensor_count, count)
    return b"".join([start, *settings, *tensors]).ljust(64, b"\0")


def setting(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def array(kind, count, values=b""):
    return struct.pack("<IQ", kind, count) + values


def tensor(name, shape, kind=0, offset=0):
    sides = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sides + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1 and more", "does not begin with GGUF"),
        (header(version=1), "it is of version 1; read are versions 2 and 3"),
        (header(version=3 << 24), "it is in big-endian order"),
        (header(counts=(0, 2**40)), "announces 1,099,511,627,776 settings"),
        (header(counts=(2**63, 0)), "announces 9,223,372,036,854,775,808 tensors"),
        (header(counts=(0, 90_000)), "it has  twice"),
        (header([setting(b"a", 9, array(0, 2**40))]), "it ends too soon"),
        (header([setting(b"a", 9, array(12, 2**61))]), "it ends too soon"),
        (header([setting(b"a", 9, array(8, 2**40))]), "announces 1,099,511,627,776 strings"),
        (header([setting(b"a", 9, array(8, 2**20))]), "it ends too soon"),
        (header([setting(b"a", 9, array(9, 1))]), "a is an array of the type 9"),
        (header([setting(b"a", 13, b"")]), "a has the unknown type 13"),
        (header([setting(b"a", 8, struct.pack("<Q", 2**62))]), "announces a string of 4,611,6"),
        (header([setting(b"a" * 2000, 0, b"1")]), "announces a string of 2,000 bytes"),
        (header([setting(b"\xff", 0, b"1")]), "can't decode byte 0xff"),
        (header([setting(b"a", 0, b"1"), setting(b"a", 0, b"1")]), "it has a twice"),
        (header([setting(b"general.alignment", 4, bytes(4))]), "alignment=0 is not a power of 2"),
        (header([setting(b"general.alignment", 4, b"\3\0\0\0")]), "alignment=3 is not a power"),
        (header(tensors=[tensor(b"a", [1] * 5)]), "a has 5 dimensions: at most 4"),
        (header(tensors=[tensor(b"a", [4, 0])]), "a has a dimension of 0"),
        (header(tensors=[tensor(b"a", [4], offset=5)]), "a lies at 5, which 32 does not divide"),
        (header(tensors=[tensor(b"a", [4])] * 2), "it has the tensor a twice"),
    ],
)
def test_headers_that_lie(tmp_path, data, message):
    (tmp_path / "m.gguf").write_bytes(data)
    for load in (load_pretrained, load_tokenizer):
        with pytest.raises(CheckpointError, match=message) as error:
            load(tmp_path / "m.gguf")
        assert "copy or download it again" in str(error.value)
        assert len(str(error.value)) < 600


ARCHITECTURE = setting(b"general.architecture", 8, text(b"llama"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([tensor(b"a", [2**40, 2**20])], "places a, of shape .* beyond its end"),
        ([tensor(b"a", [8]), tensor(b"b", [9])], "places b, of shape .* over another tensor"),
        ([tensor(b"a", [8], kind=4)], "holds a in the type 4, which the installed version of gguf"),
        ([tensor(b"a", [8], kind=2**31)], "in the type 2147483648, which the installed version"),
        ([tensor(b"a", [8], kind=8)], "rows of 8 values as Q8_0, whose blocks have 32"),
        ([tensor(b"a", [32], kind=9)], "as Q8_1, which gguf does not dequantise"),
    ],
)
def test_tensors_that_cannot_be(tmp_path, tensors, message):
    (tmp_path / "m.gguf").write_bytes(header([ARCHITECTURE], tensors) + bytes(256))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path / "m.gguf")


def test_a_file_cut_short_anywhere(tmp_path):
    write(tmp_path / "whole.gguf", kind=Kind.Q8_0, tokenizer=tokens_of(VOCAB))
    data = (tmp_path / "whole.gguf").read_bytes()
    for size in [*range(0, len(data) - 32, 997), len(data) - 32]:
        (tmp_path / "m.gguf").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"copy or download it again"):
            load_pretrained(tmp_path / "m.gguf")


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_count": None}, "llama.block_count is missing: expected a positive integer"),
        ({"block_count": 0}, "llama.block_count is '0': expected a positive integer"),
        ({"block_count": "two"}, "llama.block_count is 'two'"),
        ({"block_count": 60}, "has 60 layers, but the checkpoint has"),
        ({"block_count": 3}, "lacks 9 of the model's"),
        ({"embedding_length": 2**31, "rope__dimension_count": None}, "no stored tensor has a side"),
        ({"feed_forward_length": 89}, "holds model.layers.0.mlp.down_proj.weight with shape"),
        ({"attention__head_count": 5}, "head_count=5 does not divide .*embedding_length=32"),
        ({"attention__head_count": True}, "llama.attention.head_count is 'True'"),
        ({"attention__head_count_kv": 3}, "num_key_value_heads=3 does not divide|config for trans"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "epsilon is 'nan': expected a pos"),
        ({"attention__layer_norm_rms_epsilon": None}, "epsilon is missing"),
        ({"attention__key_length": 7, "rope__dimension_count": None}, "head_dim|even number|shape"),
        ({"attention__value_length": 4}, "value_length=4 differs from the 8 channels"),
        ({"rope__dimension_count": 4}, "rope.dimension_count=4 differs from the 8 channels"),
        ({"rope__freq_base": float("inf")}, "rope.freq_base is 'inf'"),
        ({"rope__scaling__type": "yarn"}, "rope.scaling.type='yarn'.*expected none or linear"),
        ({"rope__scaling__type": 3}, "llama.rope.scaling.type is '3': expected a string"),
        ({"expert_count": 8}, "llama.expert_count is 8: mixtures of experts are not read"),
        ({"vocab_size": 96}, "lm_head.weight with shape .*97"),
        ({"vocab_size": [1, 2]}, "llama.vocab_size is"),
    ],
)
def test_settings_that_are_wrong(tmp_path, settings, message):
    write(tmp_path / "m.gguf", **settings)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.ffn_gate_exps.weight": (4, 4)}, "1 tensors that no llama has: blk.0.ffn_gate_exp"),
        ({"blk.00.attn_q.weight": (32, 32)}, "has no place for: model.layers.00"),
        ({"rope_freqs.weight": (3,)}, r"rope_freqs.weight has shape \(3,\): expected \(4,\)"),
    ],
)
def test_tensors_that_are_not_the_models(tmp_path, tensors, message):
    extra = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    write(tmp_path / "m.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path / "m.gguf")


@pytest.mark.parametrize("divisors", [[1, 2, 1, 5], [0, 1, 1, 1], [1, 1, -2, 1]])
def test_frequencies_that_are_not_llama_3s(tmp_path, divisors):
    extra = {"rope_freqs.weight": np.array(divisors, np.float32)}
    write(tmp_path / "m.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=r"m\.gguf has .*rotary frequenc.* divided by"):
        load_pretrained(tmp_path / "m.gguf")


def test_values_that_are_not_finite(tmp_path):
    model, params = make_model("llama")
    tensors = torch_tensors(model, params)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.where(np.arange(32) == 5, np.inf, tensors[name])
    for kind in (Kind.F32, Kind.F16, Kind.Q8_0):
        with np.errstate(all="ignore"):
            write_gguf(tmp_path / "m.gguf", model.config, tensors, kind)
        with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight with the value (nan|inf)"):
            load_pretrained(tmp_path / "m.gguf")


def test_other_models_and_parts_of_models(tmp_path):
    for values, message in [
        (
            [setting(b"general.architecture", 8, text(b"mamba"))],
            "known architectures of GGUF files",
        ),
        ([], "general.architecture='None'"),
        ([ARCHITECTURE, setting(b"split.count", 2, b"\3\0")], "is one of 3 parts .*--merge"),
        ([ARCHITECTURE], "llama.block_count is missing"),
    ]:
        (tmp_path / "m.gguf").write_bytes(header(values))
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(tmp_path / "m.gguf")


def test_files_that_are_not_there(tmp_path, monkeypatch):
    for load in (load_pretrained, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"there is no file .*m\.gguf"):
            load(tmp_path / "m.gguf")
    (tmp_path / "model.bin").write_bytes(b"1")
    with pytest.raises(CheckpointError, match=r"give the folder that holds it, or a \.gguf file"):
        load_pretrained(tmp_path / "model.bin")
    write(tmp_path / "m.gguf", tokenizer=tokens_of(VOCAB))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'sparseffn_jax\[gguf\]'"):
        load_pretrained(tmp_path / "m.gguf")
    assert len(load_tokenizer(tmp_path / "m.gguf")) == VOCAB


# --- tokenizers --------------------------------------------------------------------------------


def train_byte_level(pre_tokenizer, special=("<|begin|>", "<|end|>")):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_special_tokens(list(special))
    vocabulary = tokenizer.get_vocab()
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return tokenizer, sorted(vocabulary, key=vocabulary.__getitem__), merges


SPELL = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), SPELL])


def write_tokenizer(file, settings):
    write(file, tokenizer=settings)
    return load_tokenizer(file)


@pytest.mark.parametrize(("pre", "split"), [("gpt-2", SPELL), ("smollm", DIGITS)])
def test_a_byte_level_tokenizer_gives_the_same_ids(tmp_path, pre, split):
    reference, tokens, merges = train_byte_level(split)
    settings = byte_level(tokens, merges, 2, ggml__pre=pre, chat_template="{{ messages }}")
    settings["ggml.bos_token_id"] -= 1
    tokenizer = write_tokenizer(tmp_path / "m.gguf", settings)
    for said in (TEXT, f"<|begin|>{TEXT}<|end|>", "  1", "", "x<|end|>1 2"):
        assert tokenizer.encode(said) == reference.encode(said).ids
        assert tokenizer.decode(tokenizer.encode(said)) == said
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")
    assert set(tokenizer.all_special_tokens) == {"<|begin|>", "<|end|>"}
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.model_max_length == 24
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(TEXT) == reference.encode(TEXT).ids


@pytest.mark.parametrize(
    ("settings", "first", "last"),
    [
        ({}, [], []),
        ({"ggml__add_bos_token": True}, [1], []),
        ({"ggml__add_bos_token": True, "ggml__add_eos_token": True}, [1], [2]),
        ({"ggml__pre": "llama-bpe"}, [1], []),
        ({"ggml__pre": "llama-bpe", "ggml__add_bos_token": False}, [], []),
    ],
)
def test_begin_and_end_of_text(tmp_path, settings, first, last):
    _, tokens, merges = train_byte_level(SPELL)
    values = byte_level(tokens, merges, 2, **settings)
    values["ggml.bos_token_id"] -= 1
    tokenizer = write_tokenizer(tmp_path / "m.gguf", values)
    ends = {1: len(tokens) - 2, 2: len(tokens) - 1}
    first, last = [ends[i] for i in first], [ends[i] for i in last]
    (x,) = tokenizer.encode("x", add_special_tokens=False)
    assert tokenizer.encode("x") == [*first, x, *last]
    assert tokenizer("x", "x")["input_ids"] == [*first, x, *last, *first, x, *last]


@needs_transformers_5
@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "tekken", "qwen2"])
def test_transformers_reads_the_same_tokenizer(tmp_path, pre):
    pytest.importorskip("torch")
    _, tokens, merges = train_byte_level(SPELL)
    settings = byte_level(tokens, merges, 2, ggml__pre=pre, ggml__add_bos_token=True)
    tokenizer = write_tokenizer(tmp_path / "m.gguf", settings)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for said in (TEXT, f"a<|end|>{TEXT}"):
        assert tokenizer.encode(said) == reference.encode(said)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (
        reference.bos_token,
        reference.eos_token,
    )


def sentencepiece(**settings):
    pieces = ["▁the", "▁t", "he", "the", "▁a", "in", "an", "▁1", "12", "▁▁", *"▁theain12", "é"]
    normal = list(dict.fromkeys(pieces))
    raw = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *raw, *normal, "<|user|>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(normal), 4]
    scores = [0.0, 0.0, 0.0, *[0.0] * 256, *[-float(i) for i in range(len(normal))], 0.0]
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": scores,
        "ggml.token_type": types,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }


def test_a_sentencepiece_tokenizer(tmp_path):
    settings = sentencepiece()
    tokenizer = write_tokenizer(tmp_path / "m.gguf", settings)

    def said(text):
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))

    assert said("the an") == ["<s>", "▁the", "▁a", "n"]
    assert said("the  he") == ["<s>", "▁the", "▁▁", "he"]
    assert said("12<|user|>é</s>") == ["<s>", "▁1", "2", "<|user|>", "▁", "é", "</s>"]
    # What is not there is spelled in bytes.
    assert said("日") == ["<s>", "▁", "<0xE6>", "<0x97>", "<0xA5>"]
    for text in ("the an 12é日\n  \U0001f600", "tthhee  1"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    bare = write_tokenizer(
        tmp_path / "n.gguf", sentencepiece(ggml__add_space_prefix=False, ggml__add_bos_token=False)
    )
    assert bare.convert_ids_to_tokens(bare.encode("the an")) == ["the", "▁a", "n"]


@needs_transformers_5
def test_transformers_reads_the_same_sentencepiece(tmp_path):
    pytest.importorskip("torch")
    tokenizer = write_tokenizer(tmp_path / "m.gguf", sentencepiece())
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for said in ("the an the", "12 é  he\n日本 the<s>", "a</s>"):
        assert tokenizer.encode(said) == reference.encode(said)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ggml.model": "bert"}, "tokenizer.ggml.model='bert': expected gpt2"),
        ({"ggml.model": "llama"}, "no tokenizer.ggml.scores"),
        ({"ggml.pre": "viking"}, "tokenizer.ggml.pre='viking': text can be split as for default"),
        ({"ggml.tokens": [1, 2]}, "no list of strings as tokenizer.ggml.tokens"),
        ({"ggml.tokens": ["a", "b", "b"]}, "tokens that are not distinct strings"),
        ({"ggml.tokens": ["a", "b" * 2000, "c"]}, "a token of 2,000 characters"),
        ({"ggml.token_type": [1, 1]}, "token_type that are not 3 numbers"),
        ({"ggml.merges": ["a b c"]}, "the merge 'a b c': expected two tokens"),
        ({"ggml.merges": ["a"]}, "the merge 'a': expected two tokens"),
        ({"ggml.merges": ["a z"]}, "the merge 'a z': expected two tokens"),
        ({"ggml.merges": ["ab ab"]}, "the merge 'ab ab': .* that make another token"),
    ],
)
def test_tokenizers_that_are_wrong(tmp_path, settings, message):
    values = byte_level(["a", "b", "ab"], ["a b"], 1)
    write(tmp_path / "m.gguf", tokenizer=values | settings)
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(error.value)
    # The model can be read all the same.
    load_pretrained(tmp_path / "m.gguf")


def test_tokens_that_are_almost_all_special(tmp_path):
    values = byte_level(["a", "aa", *(f"w{i}" for i in range(50_001))], ["a a"], 50_001)
    write(tmp_path / "m.gguf", tokenizer=values)
    with pytest.raises(CheckpointError, match="has 50,001 tokens that are special or added by"):
        load_tokenizer(tmp_path / "m.gguf")


def test_tokens_that_are_made_in_too_many_ways(tmp_path):
    values = sentencepiece()
    count = 300
    values["ggml.tokens"] = ["a" * i for i in range(1, count + 1)]
    values["ggml.scores"], values["ggml.token_type"] = [0.0] * count, [1] * count
    write(tmp_path / "m.gguf", tokenizer=values)
    with pytest.raises(CheckpointError, match="that other tokens make in more than 32 ways"):
        load_tokenizer(tmp_path / "m.gguf")


def test_a_file_without_tokenizer(tmp_path):
    write(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.model='None': expected gpt2"):
        load_tokenizer(tmp_path / "m.gguf")
