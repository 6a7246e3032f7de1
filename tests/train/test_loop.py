import dataclasses
import functools
import hashlib
import json
import math
import signal

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from train_models import VOCAB_SIZE, WINDOW, make_model, make_windows, poison

from sparseffn_jax.evaluate.losses import evaluate_loss
from sparseffn_jax.train.checkpoints import restore_ffn
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import TokenWindows, make_batches
from sparseffn_jax.train.guard import DivergenceError, GuardConfig
from sparseffn_jax.train.loop import train

CONFIG = TrainConfig(
    steps=12,
    batch_size=3,
    learning_rate=1e-2,
    log_every=1,
    eval_every=6,
    save_every=4,
    guard=GuardConfig(snapshot_every=3),
)


def run(model, params, windows, config, out_dir, stop=None, crash=None, **options):
    """Trains, and returns the result with the loss of each step; may be stopped on the way."""
    losses = {}

    def on_step(step, metrics):
        losses[step] = metrics["loss"]
        if step == stop:
            signal.raise_signal(signal.SIGINT)
        if step == crash:
            raise RuntimeError("the power went out")

    options.setdefault("on_step", on_step)
    return train(model, params, windows, config, out_dir, **options), losses


def read_log(out_dir):
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, model_and_params, windows):
    @functools.cache
    def run_recipe(recipe):
        config = dataclasses.replace(CONFIG, recipe=recipe, dropout=recipe == "ffn_only")
        out_dir = tmp_path_factory.mktemp(recipe)
        result, losses = run(*model_and_params, windows, config, out_dir)
        return config, result, losses, out_dir

    return run_recipe


@pytest.mark.parametrize(
    ("recipe", "stop", "crash", "resumed_at"),
    [
        ("full", 5, None, 5),
        ("ffn_only", 8, None, 8),
        ("ffn_only", None, 7, 4),
        ("lora", 5, None, 5),
        ("stepwise", 2, None, 2),
        ("stepwise", 6, None, 6),
        ("stepwise", None, 10, 8),
    ],
)
def test_resume_is_exact(
    recipe, stop, crash, resumed_at, uninterrupted, model_and_params, windows, tmp_path
):
    config, expected, expected_losses, expected_dir = uninterrupted(recipe)
    ended = pytest.raises(KeyboardInterrupt, match=f"stopped after step {stop} of 12")
    if crash is not None:
        ended = pytest.raises(RuntimeError, match="the power went out")
    with ended:
        run(*model_and_params, windows, config, tmp_path, stop, crash)
    result, losses = run(*model_and_params, windows, config, tmp_path, resume="must")
    assert list(losses) == list(range(resumed_at + 1, 13))
    assert losses == {step: expected_losses[step] for step in losses}
    chex.assert_trees_all_equal(result.params, expected.params)
    assert result.data_hash == expected.data_hash
    assert read_log(tmp_path) == read_log(expected_dir)


@pytest.mark.parametrize("recipe", ["full", "ffn_only", "lora", "stepwise"])
def test_training_changes_what_it_should_and_learns(
    recipe, uninterrupted, model_and_params, windows
):
    model, params = model_and_params
    _, result, _, out_dir = uninterrupted(recipe)
    log = read_log(out_dir)
    before, after = flatten_dict(params), flatten_dict(result.params)
    changed = {path for path in before if (np.array(before[path]) != after[path]).any()}
    trainable = {
        "full": lambda path: True,
        "ffn_only": lambda path: "mlp" in path,
        "lora": lambda path: "mlp" in path or ("attn" in path and path[-1] == "kernel"),
        "stepwise": lambda path: path[1] not in ("wte", "wpe"),
    }[recipe]
    assert changed == {path for path in before if trainable(path)}
    chex.assert_trees_all_equal_shapes_and_dtypes(result.params, params)
    assert [record["step"] for record in log] == list(range(1, 13))
    assert [record["step"] for record in log if "validation_loss" in record] == [6, 12]
    validation_loss = evaluate_loss(model, result.params, windows.validation, 4)
    assert log[-1]["validation_loss"] == pytest.approx(validation_loss, rel=1e-6)
    assert validation_loss < evaluate_loss(model, params, windows.validation, 4)


def test_the_hash_is_chained_over_the_batches(uninterrupted, windows):
    batches, digest = make_batches(windows.train, 3, CONFIG.seed), hashlib.sha256().digest()
    for _ in range(12):
        windows_read = b"".join(hashlib.sha256(row.tobytes()).digest() for row in next(batches))
        digest = hashlib.sha256(digest + windows_read).digest()
    assert {uninterrupted(recipe)[1].data_hash for recipe in ("full", "ffn_only")} == {digest.hex()}


def test_a_finished_run_stays_as_it_is(uninterrupted, model_and_params, windows):
    config, expected, _, out_dir = uninterrupted("ffn_only")
    assert list((out_dir / "tensorboard").glob("events.*"))
    record = expected.history[-1]
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second"} <= record.keys()
    again, losses = run(*model_and_params, windows, config, out_dir)
    assert losses == {}
    chex.assert_trees_all_equal(again.params, expected.params)
    with pytest.raises(FileExistsError, match="up to step 12"):
        run(*model_and_params, windows, config, out_dir, resume="never")


def test_a_run_does_not_go_on_as_another(uninterrupted, model_and_params, windows):
    config, _, _, out_dir = uninterrupted("ffn_only")
    other = dataclasses.replace(config, learning_rate=1.0, seed=1)
    with pytest.raises(
        ValueError, match=r"learning_rate was 0.01, now 1.0; .*; seed was 0, now 1\. Give another"
    ):
        run(*model_and_params, windows, other, out_dir)
    for changes, message in (
        ({"guard": GuardConfig(snapshot_every=7)}, r"guard.snapshot_every was 3, now 7\."),
        (
            {"optimizer": "lion", "learning_rate": 1e-2},
            "optimizer was 'adamw', now 'lion'; weight",
        ),
        ({"steps": 11}, r"steps was 12, now 11\. .* steps may grow"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*model_and_params, windows, dataclasses.replace(config, **changes), out_dir)
    other = dataclasses.replace(windows, train=windows.train[::-1])
    with pytest.raises(ValueError, match=r"with these: the training text is another\. Give"):
        run(*model_and_params, other, config, out_dir)
    with pytest.raises(ValueError, match=r"config or the configs of its FFNs are others; the para"):
        run(*make_model(ffns=(None,)), windows, config, out_dir)


def test_the_ffn_can_be_restored_alone(uninterrupted):
    _, expected, _, out_dir = uninterrupted("ffn_only")
    ffn = flatten_dict(restore_ffn(out_dir))
    after = {path: leaf for path, leaf in flatten_dict(expected.params).items() if "mlp" in path}
    chex.assert_trees_all_equal(ffn, after)
    bias = ("transformer", "h", "0", "mlp", "bias")
    assert (flatten_dict(restore_ffn(out_dir, 4))[bias] != ffn[bias]).all()
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5: it has 4, 8, 12"):
        restore_ffn(out_dir, 5)


@pytest.fixture(scope="module")
def untied():
    return make_model(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def poisoned(untied):
    """A model, its parameters, and windows that give NaN at step 8; snapshots are of 0, 3, 4, 6."""
    model, params = untied
    return model, *poison(params, make_windows(VOCAB_SIZE - 1), CONFIG, step=8)


@pytest.fixture(scope="module")
def survived(poisoned, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("poisoned")
    result, losses = run(*poisoned, CONFIG, out_dir)
    return result, losses, read_log(out_dir), out_dir


def test_a_nan_step_is_undone_and_named(survived, poisoned):
    result, losses, log, out_dir = survived
    assert [step for step, loss in losses.items() if not math.isfinite(loss)] == [8]
    (event,) = [record for record in log if "event" in record]
    assert {"loss is nan", "grad_norm is nan"} <= set(event["reason"].split(", "))
    assert (event["step"], event["restored_step"], event["rate_factor"]) == (8, 6, 0.5)
    assert [record["step"] for record in log if "loss" in record] == [
        step for step in range(1, 13) if step != 8
    ]
    assert math.isfinite(result.history[-1]["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restore_ffn(out_dir)))
    # Two updates were undone, so the schedule is two updates behind; and the rate is halved.
    rates = {record["step"]: record["learning_rate"] for record in log if "loss" in record}
    assert rates[9] == pytest.approx(0.5 * rates[7])
    chex.assert_tree_all_finite(result.params["transformer"]["h"])


def test_a_run_whose_last_step_is_undone_is_validated(poisoned, tmp_path):
    result, _ = run(*poisoned, dataclasses.replace(CONFIG, steps=8), tmp_path)
    event, record = result.history[-2:]
    assert (event["step"], event["event"]) == (8, "restore")
    assert (record.keys(), record["step"]) == ({"step", "validation_loss"}, 8)
    model, _, windows = poisoned
    loss = evaluate_loss(model, result.params, windows.validation, 3)
    assert record["validation_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("stop", [7, 8, 9])
def test_resume_around_a_restore_is_exact(stop, survived, poisoned, tmp_path, capsys):
    expected, expected_losses, expected_log, _ = survived
    with pytest.raises(KeyboardInterrupt):
        run(*poisoned, CONFIG, tmp_path, stop)
    result, losses = run(*poisoned, CONFIG, tmp_path, resume="must")
    np.testing.assert_equal(losses, {step: expected_losses[step] for step in range(stop + 1, 13)})
    chex.assert_trees_all_equal(result.params, expected.params)
    assert result.data_hash == expected.data_hash
    assert read_log(tmp_path) == expected_log
    assert "step 8: " in capsys.readouterr().err


def test_the_guard_gives_up(untied, poisoned, tmp_path):
    model, params, windows = poisoned
    train_windows = windows.train.copy()
    train_windows[:, 5] = VOCAB_SIZE - 1
    windows = dataclasses.replace(windows, train=train_windows)
    with pytest.raises(
        DivergenceError, match=r"step 4: .*loss is nan.*after 3 restores.*no checkpoint"
    ):
        run(model, params, windows, CONFIG, tmp_path)


def test_losses_above_the_band_are_undone(model_and_params, tmp_path):
    # One epoch of a text that is easily learnt, but for the batches of steps 83 to 86.
    model, params = model_and_params
    config = dataclasses.replace(
        CONFIG, steps=90, warmup_steps=0, log_every=10, eval_every=0, save_every=20
    )
    order = make_batches(np.arange(3 * 90)[:, None], config.batch_size, config.seed)
    rows = np.concatenate([next(order)[:, 0] for _ in range(86)][82:])
    train_windows = np.full((3 * 90, WINDOW + 1), 7, np.int32)
    train_windows[rows] = make_windows().train[: len(rows)]
    windows = TokenWindows(train_windows, train_windows[:8])

    result, losses = run(model, params, windows, config, tmp_path / "goes on")
    (event,) = [record for record in result.history if "event" in record]
    assert "makes 3 in a row above" in event["reason"]
    assert (event["step"], event["restored_step"]) == (85, 81)
    assert losses[90] < losses[80] + 0.1 < losses[85] - 0.4

    config = dataclasses.replace(config, guard=GuardConfig(max_restores=0))
    with pytest.raises(DivergenceError, match=r"step 85: .* checkpoint is .*/checkpoints/80\."):
        run(model, params, windows, config, tmp_path / "gives up")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "half"}, "unknown recipe 'half'.*stepwise"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'.*adamw, lion, muon"),
        ({"schedule": "step"}, "unknown schedule 'step'.*cosine, linear, constant, wsd"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"recipe": "stepwise", "steps": 1}, "too few for the stages"),
        ({"batch_size": 6, "accumulate_steps": 4}, "does not divide batch_size=6"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be positive"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be positive"),
        ({"ffn_learning_rate": 0.0}, "ffn_learning_rate=0.0 must be positive"),
        ({"steps": 10, "warmup_steps": 10}, "warmup_steps=10 must lie between"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        ({"distill_weight": 1.5}, "distill_weight=1.5 must lie between 0 and 1"),
        ({"lora_rank": 0}, "lora_rank=0 must be at least 1"),
        ({"lora_alpha": 0.0, "recipe": "lora"}, "lora_alpha=0.0 must be positive"),
        ({"lora_ranks": "q_proj=0"}, "lora_ranks='q_proj=0': expected a string such as 'q_proj="),
        ({"lora_ranks": "q_proj"}, "lora_ranks='q_proj': expected"),
        (
            {"lora_targets": ["q_proj"]},
            "lora_targets=.*: expected a string such as 'q_proj,v_proj'",
        ),
        ({"lora_targets": ""}, "lora_targets='': expected"),
        ({"lora_targets": "q_proj"}, "lora_targets='q_proj' needs recipe='lora', not 'ffn_only'"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


def test_what_does_not_fit_together(model_and_params, windows, tmp_path):
    model, params = model_and_params
    distilling = dataclasses.replace(CONFIG, distill_weight=0.5)
    with pytest.raises(ValueError, match="need a teacher"):
        train(model, params, windows, distilling, tmp_path)
    with pytest.raises(ValueError, match="a teacher is given"):
        train(model, params, windows, CONFIG, tmp_path, teacher=(model, params))
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        train(model, params, windows, CONFIG, tmp_path, resume="must")
    strange = dataclasses.replace(windows, train=np.full((8, WINDOW + 1), 500, np.int32))
    with pytest.raises(ValueError, match="token id 500"):
        train(model, params, strange, CONFIG, tmp_path)
    too_big = dataclasses.replace(CONFIG, batch_size=64)
    with pytest.raises(ValueError, match="do not fill one batch of 64"):
        train(model, params, windows, too_big, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
        restore_ffn(tmp_path / "nowhere")
