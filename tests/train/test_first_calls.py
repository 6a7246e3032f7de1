"""What a person types first: arrays for windows, names for strategies, reports elsewhere, remat."""

import dataclasses
import re
import sys
import types
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_models import VOCAB_SIZE, WINDOW, make_model
from transformers import GPT2Config

from sparseffn_jax.measure import memory
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.train.checkpoints import restore_ffn
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import TokenWindows
from sparseffn_jax.train.loop import train

CONFIG = TrainConfig(steps=2, batch_size=3, recipe="full", log_every=1, eval_every=2)


@pytest.fixture(scope="module")
def dense():
    return make_model(ffns=(None,))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, 40 * WINDOW + 5)


def test_an_array_is_cut_and_split(dense, tokens, tmp_path):
    rows = np.stack([tokens[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(40)])
    windows = TokenWindows(rows[:38].astype(np.int32), rows[38:].astype(np.int32))
    expected = train(*dense, windows, CONFIG, tmp_path / "windows")
    given = {"row": tokens, "rows": rows, "on a device": jnp.asarray(rows)}
    for name, ids in given.items():
        result = train(*dense, ids, CONFIG, tmp_path / name, strategy="single")
        assert result.data_hash == expected.data_hash
        assert result.history[-1]["validation_loss"] == expected.history[-1]["validation_loss"]
        chex.assert_trees_all_equal(result.params, expected.params)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (np.zeros((4, 17)), {}, r"windows is float64 of shape \(4, 17\): expected TokenWindows"),
        ("text.txt", {}, "expected TokenWindows, as load_windows returns them"),
        (np.zeros(20, int), {}, "20 token ids are too few for two windows of 17"),
        (np.zeros(99, int), {"resume": "yes"}, "unknown resume='yes': expected one of auto, never"),
        (np.zeros(99, int), {"strategy": "mesh"}, "needs the sizes of a mesh"),
        (np.zeros(99, int), {"strategy": "ddp"}, "unknown strategy 'ddp'"),
    ],
)
def test_what_train_is_called_with_by_mistake(ids, options, message, dense, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(*dense, ids, CONFIG, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


class Run:
    """What wandb.init returns, as far as a run needs it."""

    def __init__(self, log):
        self.log, self.calls = log.append, log
        self.define_metric = lambda name, step_metric: log.append({name: step_metric})
        self.finish = lambda: log.append("finished")


@pytest.fixture
def wandb(monkeypatch):
    """A module in wandb's place that remembers how it was called."""
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.Error, module.started, module.logged = RuntimeError, [], []

    def init(**arguments):
        module.started.append(arguments)
        return Run(module.logged)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_report_to_wandb(dense, tokens, tmp_path, wandb):
    config = dataclasses.replace(CONFIG, report_to="wandb", hidden_weight=0.1)
    result = train(*dense, tokens, config, tmp_path / "run", teacher=dense)
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert wandb.logged == [{"*": "step"}, *result.history, "finished"]
    assert result.history[0]["loss_is"] == "cross-entropy + 0.1 hidden states' squared error"
    # A resumed run goes on in the same run, and the report is another setting that may change.
    both = dataclasses.replace(config, report_to="tensorboard,wandb", steps=3)
    train(*dense, tokens, both, tmp_path / "run", teacher=dense)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    first, second = wandb.started
    assert (first["id"], first["name"], first["resume"]) == (second["id"], "run", "allow")
    assert first["config"]["report_to"] == "wandb"
    assert [record["step"] for record in wandb.logged[-2:-1]] == [3]


def test_wandb_that_refuses_or_is_missing(dense, tokens, tmp_path, wandb, monkeypatch):
    config = dataclasses.replace(CONFIG, report_to="tensorboard, wandb")

    def init(**_):
        raise wandb.Error("no API key")

    wandb.init = init
    with pytest.raises(ValueError, match=r"wandb did not start \(no API key\): call wandb login"):
        train(*dense, tokens, config, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'sparseffn_jax[wandb]'")):
        train(*dense, tokens, config, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(ValueError, match="report_to='mlflow' has 'mlflow': expected some of tens"):
        TrainConfig(report_to="mlflow")


def test_a_report_that_fails_does_not_end_the_run(dense, tokens, tmp_path, wandb, capsys):
    def fail(*_):
        raise wandb.Error("the service is gone")

    def init(**_):
        run = Run([])
        run.log = run.finish = fail
        return run

    wandb.init = init
    config = dataclasses.replace(CONFIG, report_to="wandb,tensorboard")
    result = train(*dense, tokens, config, tmp_path / "run")
    assert [record["step"] for record in result.history] == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "2").exists()
    said = capsys.readouterr().err
    assert said.count("nothing more is reported to Wandb, which failed: the service is gone") == 1
    assert said.count("the report to Wandb may lack its end: the service is gone") == 1


class Words(nn.Module):
    """A model that is no decoder, and calls no layer mlp."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids, deterministic=True):
        hidden = nn.Embed(VOCAB_SIZE, 8, name="words")(input_ids)
        return nn.Dense(VOCAB_SIZE, name="head")(nn.gelu(nn.Dense(8, name="hidden")(hidden)))


def test_a_model_of_ones_own(tokens, tmp_path):
    windows = tokens[: 40 * WINDOW].reshape(40, WINDOW)
    model = Words()
    params = jax.jit(model.init)(jax.random.key(0), windows[:1])["params"]
    train(model, params, windows, CONFIG, tmp_path / "run")
    longer = dataclasses.replace(CONFIG, steps=3, schedule="cosine")
    result = train(model, params, windows, longer, tmp_path / "run", resume="must")
    assert result.history[-1]["step"] == 3
    assert restore_ffn(tmp_path / "run") == {}
    ffn_only = dataclasses.replace(CONFIG, recipe="ffn_only")
    with pytest.raises(ValueError, match="recipe trains none of the model's parameters"):
        train(model, params, windows, ffn_only, tmp_path / "other")


@pytest.fixture(scope="module")
def deep():
    """A model whose activations are larger than its parameters."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]


def test_remat_where_memory_demands_it(deep, tokens, tmp_path, monkeypatch, capsys):
    needed = []
    usual = memory.shortage

    def free(share):
        """Lets a share of what the first program needs be free."""

        def check(bytes_needed, _, what):
            needed.append(bytes_needed)
            return usual(bytes_needed, int(share * needed[0]), what)

        monkeypatch.setattr(memory, "shortage", check)

    ids = np.resize(tokens, (40, 65))
    config = dataclasses.replace(CONFIG, batch_size=8, eval_every=0)
    free(1.0)
    plain = train(*deep, ids, config, tmp_path / "plain")
    assert "remat" not in capsys.readouterr().err
    needed.clear()
    free(0.9)
    result = train(*deep, ids, config, tmp_path / "run")
    assert needed[1] < 0.9 * needed[0]
    assert re.search(
        r"a training step needs .* GiB are free: going on with remat, which",
        capsys.readouterr().err,
    )
    for with_remat, without in zip(result.history, plain.history, strict=True):
        assert with_remat["loss"] == pytest.approx(without["loss"], rel=1e-5)
    # Resumed with more memory it goes on as it was, and when it is forced it does not ask.
    needed.clear()
    free(2.0)
    train(*deep, ids, dataclasses.replace(config, steps=3), tmp_path / "run")
    assert len(needed) == 1
    with_remat = needed.pop()
    train(*deep, ids, config, tmp_path / "forced", remat=True)
    assert needed == [with_remat]


def test_remat_is_for_decoders(tokens, tmp_path):
    import flax.linen as nn

    class Unigram(nn.Module):
        dtype: type = jnp.float32

        @nn.compact
        def __call__(self, input_ids, deterministic=True):
            logits = self.param("logits", nn.initializers.zeros, (VOCAB_SIZE,))
            return jnp.broadcast_to(logits, (*input_ids.shape, VOCAB_SIZE))

    model, rows = Unigram(), np.resize(tokens, (40, 17))
    params = jax.jit(model.init)(jax.random.key(0), rows)["params"]
    with pytest.raises(ValueError, match="remat=True is for a Decoder, which a Unigram is not"):
        train(model, params, rows, CONFIG, tmp_path / "run", remat=True)
    with pytest.raises(ValueError, match="the model does not say how long windows may be"):
        train(model, params, tokens, CONFIG, tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "mixture"),
    [
        ({}, None),
        ({"distill_weight": 0.3}, "0.7 cross-entropy + 0.3 distillation at temperature 2"),
        (
            {"distill_weight": 1.0, "temperature": 1.5, "hidden_weight": 2.0},
            "1 distillation at temperature 1.5 + 2 hidden states' squared error",
        ),
    ],
)
def test_what_a_loss_is_made_of(values, mixture):
    assert TrainConfig(**values).loss_mixture == mixture
