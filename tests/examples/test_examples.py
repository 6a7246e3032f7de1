"""Every example runs, offline and with the smallest settings."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from sparseffn_jax.checkpoints.pretrained import load_pretrained

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
    if name == "gpt2":
        pytest.importorskip("torch")
        arguments = ["--model", str(folder), "--tokens", "4", "--prompt", "import"]
        importlib.import_module("sparse_ffn_pytorch").main(arguments)
        assert capsys.readouterr().out.startswith("import")
