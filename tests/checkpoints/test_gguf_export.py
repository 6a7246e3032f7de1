"""export_gguf: what is written is read back, by this library, by transformers and by llama.cpp."""

import dataclasses
import json
import re
import sys
import urllib.request

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict
from tiny_models import POSITIONS, VOCAB, D, make_config, make_ids, make_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

import sparseffn_jax as sf
from sparseffn_jax.checkpoints.dense_ffn import dense_maps, dense_width
from sparseffn_jax.checkpoints.gguf_header import read_gguf_header
from sparseffn_jax.config import CoreConfig, MicroRefinementConfig, SparseFFNConfig, SpectralConfig

# Half a step of the type for values below 2.
STEPS = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "q8_0": 8e-3}


def layer(family, width, rank=0, **changes):
    spec = make_model(family)[0].spec
    config = SparseFFNConfig(
        D,
        spec.d_ff,
        spec.activation,
        spectral=SpectralConfig("low_rank", rank=rank) if rank else None,
        micro=MicroRefinementConfig(CoreConfig(width)),
        gated=spec.gated,
        bias=spec.ffn_bias,
    )
    return dataclasses.replace(config, **changes)


def logits(model, params, ids):
    return np.asarray(jax.jit(model.apply)({"params": params}, ids))


def widths_in(file):
    settings = read_gguf_header(file).settings
    name = settings["general.architecture"]
    keys = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
    return name, *(np.asarray(settings[f"{name}.{key}"]).tolist() for key in keys)


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_dense_model_is_read_back(tmp_path, family, dtype):
    model, params = make_model(family)
    sf.export_gguf(tmp_path / "m.gguf", model, params, dtype=dtype)
    loaded = sf.load_pretrained(tmp_path / "m.gguf")
    actual, expected = flatten_dict(loaded.params), flatten_dict(params)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(actual[path], leaf, atol=STEPS[dtype], rtol=0, err_msg=str(path))
    positions = 5 if family == "mistral" else POSITIONS
    assert loaded.spec == dataclasses.replace(model.spec, n_positions=positions)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_and_settings_of_a_llama(tmp_path, tied):
    config = make_config(
        "llama", tie_word_embeddings=tied, head_dim=16, attention_bias=True, mlp_bias=True,
        rope_theta=300.0, rms_norm_eps=1e-3, rope_scaling={"rope_type": "linear", "factor": 4.0},
    )  # fmt: skip
    model, params = make_model("llama", config=config)
    sf.export_gguf(tmp_path / "m.gguf", model, params, dtype="float32")
    loaded = sf.load_pretrained(tmp_path / "m.gguf")
    np.testing.assert_array_equal(
        logits(loaded.model(), loaded.params, make_ids()), logits(model, params, make_ids())
    )


def test_llama_3_scales_its_frequencies(tmp_path):
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = make_config("llama", head_dim=64, rope_theta=500_000.0, rope_scaling=rope)
    model, params = make_model("llama", config=config)
    sf.export_gguf(tmp_path / "m.gguf", model, params, dtype="float32")
    divisors = next(
        t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if "rope" in t.name
    )
    # Frequency by frequency, as llama.cpp's converter has it.
    for i, divisor in enumerate(divisors):
        wave = 2 * np.pi * 500_000.0 ** (2 * i / 64)
        smooth = np.clip((8192 / wave - 1) / 3, 0, 1)
        np.testing.assert_allclose(divisor, 1 / ((1 - smooth) / 8 + smooth), rtol=1e-5)
    assert sf.load_pretrained(tmp_path / "m.gguf").spec == model.spec


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pytorch_computes_the_same_from_the_file(tmp_path, family):
    torch = pytest.importorskip("torch")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # transformers reads of a GPT-2 neither the number of positions nor that of hidden units: here
    # the core and the bypass have as many as it takes for granted.
    config = (
        GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=2, n_head=4, n_positions=1024)
        if family == "gpt2"
        else make_config("llama", rope_theta=300.0)
    )
    ffn = layer("gpt2", 4 * D - 8, 4) if family == "gpt2" else layer("llama", 24)
    model, params = make_model(family, (ffn, ffn), config=config)
    tokenizer = bpe_tokenizer("gpt-2", VOCAB - 10)
    sf.export_gguf(tmp_path / "m.gguf", model, params, dtype="float32", tokenizer=tokenizer)
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    read = load_gguf_checkpoint(
        str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=reference
    )
    missing, unexpected = reference.load_state_dict(read["tensors"], strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    reference.tie_weights()
    ids = np.asarray(make_ids())
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(model, params, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "sizes", "written"),
    [
        ("llama", ((24, 0), (40, 0)), ("deci", [24, 40], [4, 4], [2, 2])),
        ("llama", ((24, 4), None), ("deci", [28, 88], [4, 4], [2, 2])),
        ("mistral", ((24, 4), (30, 0)), ("deci", [28, 30], [4, 4], [2, 2])),
        ("llama", ((24, 4), (28, 0)), ("llama", 28, 4, 2)),
    ],
)
def test_layers_differ_in_width(tmp_path, family, sizes, written):
    ffns = tuple(size and layer(family, *size) for size in sizes)
    model, params = make_model(family, ffns)
    sf.export_gguf(tmp_path / "m.gguf", model, params, dtype="float32")
    assert widths_in(tmp_path / "m.gguf") == written
    loaded = sf.load_pretrained(tmp_path / "m.gguf")
    assert loaded.spec.d_ff == max(np.atleast_1d(written[1]))
    # As far as Mistral's window reaches.
    ids = make_ids(shape=(3, 5))
    np.testing.assert_allclose(
        logits(loaded.model(), loaded.params, ids), logits(model, params, ids), atol=1e-5, rtol=0
    )


def test_parameters_on_demand_are_written_the_same(tmp_path):
    model, params = make_model("llama", (layer("llama", 24, 4), None))
    sf.save_pretrained(tmp_path / "sparse", model, params)
    loaded = sf.load_pretrained(tmp_path / "sparse", param_dtype=None, on_demand=True)
    for name, tree in (("a", params), ("b", loaded.params)):
        sf.export_gguf(tmp_path / f"{name}.gguf", model, tree, dtype="q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# --- a bypass as units -------------------------------------------------------------------------


def activate(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def float64(tree):
    return {path[-2:]: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(tree).items()}


@pytest.mark.parametrize(
    ("family", "activation", "units"),
    [("gpt2", "gelu_new", 2), ("gpt2", "relu", 2), ("llama", "silu", 1)],
)
def test_a_bypass_is_units_of_a_dense_ffn(family, activation, units):
    config = layer(family, 24, 3, activation=activation)
    module = sf.SparseFFN(config)
    x = 3 * np.random.default_rng(0).standard_normal((50, D))
    leaves = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, D)))["params"]
    leaves = jax.tree.map(lambda leaf: leaf + 0.1, leaves)
    layout = make_model(family)[0].ffn_layout
    assert dense_width(config) == 24 + 3 * units
    dense = {
        name: {leaf: np.asarray(array, np.float64) for leaf, array in arrays.items()}
        for name, arrays in dense_maps(config, leaves, layout).items()
    }
    if layout.transposed:
        dense = {name: {**maps, "kernel": maps["kernel"].T} for name, maps in dense.items()}

    def linear(name, h):
        return h @ dense[name]["kernel"] + dense[name]["bias"]

    hidden = activate(activation, linear(layout.up_maps[0], x))
    if config.gated:
        hidden = hidden * linear(layout.up, x)
    given = float64(leaves)
    core = x @ given["up", "kernel"] + given.get(("up", "bias"), 0)
    if config.gated:
        core = activate(activation, x @ given["gate", "kernel"]) * core
    else:
        core = activate(activation, core)
    expected = core @ given["down", "kernel"] + np.asarray(leaves.get("bias", 0), np.float64)
    expected += x @ given["bypass", "axes"] @ given["bypass", "filter"]
    np.testing.assert_allclose(linear(layout.down, hidden), expected, atol=2e-5, rtol=0)
    assert np.std(x @ given["bypass", "axes"] @ given["bypass", "filter"]) > 0.1


# --- refusals ----------------------------------------------------------------------------------


def test_what_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "m.gguf"

    def refused(message, family, ffns=(), name=file, **changes):
        options = {k: changes.pop(k) for k in ("dtype", "overwrite") if k in changes}
        model, params = make_model(family, ffns, config=make_config(family, **changes))
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(sf.CheckpointError, match=re.escape(message)):
            sf.export_gguf(name, model, params, **options)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    refused("model_type='gptj': written as GGUF are gpt2, llama, mistral", "gptj")
    refused("layers of 24 to 40 hidden units: llama.cpp's gpt2 has one number for all; convert "
            "with --servable", "gpt2", (layer("gpt2", 24), layer("gpt2", 40)))  # fmt: skip
    spectral = layer("llama", 24, spectral=SpectralConfig("low_rank", 16, rank=4))
    refused("layer 1 has a spectral branch", "llama", (None, spectral))
    refused("hidden_act='relu': llama.cpp runs such FFNs with silu", "llama", hidden_act="relu")
    refused("activation_function='relu': llama.cpp", "gpt2", activation_function="relu")
    rope = {"rope_type": "dynamic", "factor": 2.0}
    refused("rope_type='dynamic': llama.cpp has default", "llama", rope_scaling=rope)
    refused("expected a name that ends in .gguf", "llama", name=tmp_path / "m.bin")
    refused("dtype='q4_0': expected one of float32, float16", "llama", dtype="q4_0")
    file.write_text("mine")
    refused("is there already, nothing was written", "llama")
    model, params = make_model("llama")
    sf.export_gguf(file, model, params, overwrite=True)
    assert sf.load_pretrained(file).spec == model.spec


def test_values_beyond_float16(tmp_path):
    model, params = make_model("llama")
    params["model"]["embed_tokens"]["embedding"] *= 1e6
    with pytest.raises(
        sf.CheckpointError, match=r"token_embd.weight has values up to .* F16: write"
    ):
        sf.export_gguf(tmp_path / "m.gguf", model, params)
    assert not list(tmp_path.iterdir())
    sf.export_gguf(tmp_path / "m.gguf", model, params, dtype="bfloat16")


def test_without_the_package_gguf(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(sf.CheckpointError, match=r"pip install 'sparseffn_jax\[gguf\]'"):
        sf.export_gguf(tmp_path / "m.gguf", *make_model("llama"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("feed_forward_length", [24], "expected 2 positive integers, one for each layer"),
        ("feed_forward_length", [24, 0], "expected 2 positive integers, one for each layer"),
        ("feed_forward_length", [24.0, 40.0], "expected 2 positive integers, one for each layer"),
        ("attention.head_count", [4, 2], "expected the same number for every layer"),
        ("block_count", 3, "expected 3 positive integers, one for each layer"),
    ],
)
def test_damaged_files_of_unequal_layers(tmp_path, monkeypatch, key, value, message):
    model, params = make_model("llama", (layer("llama", 24), layer("llama", 40)))
    add = gguf.GGUFWriter.add_array if isinstance(value, list) else gguf.GGUFWriter.add_uint32

    def changed(writer, name, given):
        add(writer, name, value if name.endswith(f".{key}") else given)

    monkeypatch.setattr(gguf.GGUFWriter, add.__name__, changed)
    sf.export_gguf(tmp_path / "m.gguf", model, params)
    with pytest.raises(sf.CheckpointError, match=message) as error:
        sf.load_pretrained(tmp_path / "m.gguf")
    assert str(error.value).startswith(f"{tmp_path / 'm.gguf'} has deci.")


# --- tokenizers --------------------------------------------------------------------------------

TEXT = "def f(x):\n    return 12 + x  # it's 345\n\n\tIt'S naïve: 日本語 \U0001f600 and\n\n more. "


def bpe_tokenizer(split, size=400, **options):
    bpe = Tokenizer(models.BPE())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = {
        "gpt-2": spell,
        "smollm": pre_tokenizers.Sequence([digits, spell]),
        "words": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spell]),
    }[split]
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if size > 256 else []
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT * 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>", **options
    )


def read_back(tmp_path, tokenizer, size=420):
    model, params = make_model("llama", config=make_config("llama", vocab_size=size))
    sf.export_gguf(tmp_path / "m.gguf", model, params, tokenizer=tokenizer)
    return sf.load_tokenizer(tmp_path / "m.gguf"), read_gguf_header(tmp_path / "m.gguf").settings


@pytest.mark.parametrize("split", ["gpt-2", "smollm"])
def test_a_byte_level_tokenizer_is_read_back(tmp_path, split):
    template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    tokenizer = bpe_tokenizer(split, chat_template=template)
    loaded, settings = read_back(tmp_path, tokenizer)
    assert settings["tokenizer.ggml.pre"] == split
    for text in (TEXT, "<|user|>Tell<|end|>", ""):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.bos_token, loaded.eos_token) == ("<|end|>", "<|end|>")
    assert loaded.chat_template == template
    assert len(loaded) == len(settings["tokenizer.ggml.tokens"]) == 420
    types = settings["tokenizer.ggml.token_type"]
    assert [types[0], types[1], types[-1]] == [3, 3, 5]
    assert not settings["tokenizer.ggml.add_bos_token"]


def test_a_sentencepiece_tokenizer_is_read_back(tmp_path):
    raw = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["▁", *"theain", "▁t", "he", "▁the", "in", "▁a", "an"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *raw, *pieces])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a"), ("a", "n")]
    spm = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    spm.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    spm.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spm, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    loaded, settings = read_back(tmp_path, tokenizer)
    assert settings["tokenizer.ggml.model"] == "llama"
    for text in ("the an the in", "hein 12é日\n"):
        assert loaded.encode(text) == tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(loaded.encode("the an")) == ["▁the", "▁a", "n"]


def test_tokenizers_that_have_no_name_in_the_format(tmp_path):
    model, params = make_model("llama", config=make_config("llama", vocab_size=420))
    with pytest.raises(sf.CheckpointError, match="splits text in a way that GGUF files have no"):
        sf.export_gguf(tmp_path / "m.gguf", model, params, tokenizer=bpe_tokenizer("words"))
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(sf.CheckpointError, match="a tokenizer of the kind WordLevel"):
        sf.export_gguf(tmp_path / "m.gguf", model, params, tokenizer=words)
    assert not list(tmp_path.iterdir())


# --- llama.cpp ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_llama_cpp_writes_the_same(tmp_path, family):
    xllamacpp = pytest.importorskip("xllamacpp")
    sizes = ((24, 4), (40, 0)) if family == "llama" else ((24, 4), (32, 0))
    ffns = tuple(layer(family, *size) for size in sizes)
    model, params = make_model(family, ffns, config=make_config(family, vocab_size=420))
    sf.export_gguf(
        tmp_path / "m.gguf", model, params, dtype="float32", tokenizer=bpe_tokenizer("gpt-2")
    )
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(tmp_path / "m.gguf"), 24, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.fit_params, settings.warmup = False, False
    server = xllamacpp.Server(settings)
    prompt = np.asarray(make_ids(shape=(1, 8)))
    request = {
        "prompt": prompt[0].tolist(), "n_predict": 12, "temperature": 0.0, "samplers": ["top_k"],
        "top_k": 1, "ignore_eos": True, "return_tokens": True,
    }  # fmt: skip
    posted = urllib.request.Request(
        f"{server.listening_address}/completion",
        json.dumps(request).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(posted) as answer:
        written = json.load(answer)["tokens"]
    np.testing.assert_array_equal(sf.generate(model, params, prompt, 12)[0, 8:], written)
