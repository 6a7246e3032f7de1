"""A run that goes on with more steps, with other intervals, or with another optimizer's state."""

import contextlib
import dataclasses
import hashlib
import json
import signal
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_models import N_EMBD, make_model

from sparseffn_jax.config import CoreConfig, MicroRefinementConfig, SparseFFNConfig
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import TokenWindows
from sparseffn_jax.train.guard import GuardConfig
from sparseffn_jax.train.identity import fingerprint
from sparseffn_jax.train.loop import train
from sparseffn_jax.train.run import _text_hash
from sparseffn_jax.train.schedules import make_schedule

CONFIG = TrainConfig(
    steps=5,
    batch_size=3,
    recipe="full",
    learning_rate=1e-2,
    log_every=1,
    eval_every=0,
    save_every=100,
    guard=GuardConfig(snapshot_every=100),
)
WITH = dataclasses.replace


@pytest.fixture(scope="module")
def dense():
    return make_model(ffns=(None,))


@pytest.fixture
def run(dense, windows, tmp_path):
    """Trains in a folder of the test's own; returns the result and each step's metrics."""

    def run(config, name, stop=None, model_and_params=dense, **options):
        seen = {}

        def on_step(step, metrics):
            seen[step] = {k: v for k, v in metrics.items() if k != "tokens_per_second"}
            if step == stop:
                signal.raise_signal(signal.SIGINT)

        ended = pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext()
        result = None
        with ended:
            result = train(
                *model_and_params, windows, config, tmp_path / name, on_step=on_step, **options
            )
        return result, seen

    return run


@pytest.mark.parametrize(
    ("schedule", "steps", "stop"),
    [("constant", 3, None), ("wsd", 5, 2)],
)
def test_more_steps_are_a_longer_run(schedule, steps, stop, run, capsys):
    # With five steps as with six the rate falls in the last one: one program, which rounds alike.
    longer = WITH(CONFIG, schedule=schedule, steps=6)
    expected, expected_steps = run(longer, "whole")
    run(WITH(longer, steps=steps), "grown", stop)
    result, seen = run(longer, "grown", resume="must")
    first = stop or steps
    assert seen == {step: expected_steps[step] for step in range(first + 1, 7)}
    chex.assert_trees_all_equal(result.params, expected.params)
    assert result.data_hash == expected.data_hash
    said = (
        f"going on from step {first}, with 6 steps in place of {steps}: from here on the learning"
    )
    assert f"{said} rates are those of 6 steps\n" in capsys.readouterr().err


def test_a_falling_rate_goes_on_as_in_the_longer_run(run, capsys):
    config = WITH(CONFIG, schedule="cosine", warmup_steps=1)
    _, before = run(WITH(config, steps=3), "grown")
    _, after = run(config, "grown")
    for steps, seen in ((3, before), (5, after)):
        rates = [make_schedule("cosine", 1e-2, 1, steps)(step - 1) for step in seen]
        np.testing.assert_allclose([m["learning_rate"] for m in seen.values()], rates, rtol=1e-6)
    assert list(after) == [4, 5]
    said = capsys.readouterr().err
    assert "rates are those of 5 steps; so far they were those of 3\n" in said


def test_a_stage_that_is_over_stays_as_long_as_it_was(run):
    config = WITH(CONFIG, recipe="stepwise", schedule="linear", warmup_steps=0, learning_rate=1.0)
    run(WITH(config, steps=4), "run")
    _, seen = run(WITH(config, steps=6), "run")
    _, last = run(WITH(config, steps=8), "run")
    # The second stage began after step 2, whatever the number of steps.
    rates = [m["learning_rate"] for m in (seen | last).values()]
    np.testing.assert_allclose(rates, [1 - 2 / 4, 1 - 3 / 4, 1 - 4 / 6, 1 - 5 / 6], rtol=1e-6)


def test_what_is_logged_and_saved_may_change(run, tmp_path, capsys):
    expected, expected_steps = run(CONFIG, "whole")
    run(CONFIG, "changed", stop=2)
    changed = WITH(
        CONFIG, log_every=2, eval_every=3, save_every=1, keep_checkpoints=9, report_to="none"
    )
    result, seen = run(changed, "changed", resume="must")
    assert "going on from step 2 of a run of 5 steps\n" in capsys.readouterr().err
    for step in (3, 4, 5):
        seen[step].pop("validation_loss", None)
        assert seen[step] == expected_steps[step]
    chex.assert_trees_all_equal(result.params, expected.params)
    lines = (tmp_path / "changed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert ["validation_loss" in json.loads(line) for line in lines] == [0, 0, 1, 0, 1]
    saved = {int(path.name) for path in (tmp_path / "changed" / "checkpoints").iterdir()}
    assert saved == {2, 3, 4, 5}


def test_a_run_that_is_over_says_so(run, capsys):
    run(WITH(CONFIG, steps=2), "run")
    _, seen = run(WITH(CONFIG, steps=2), "run")
    assert not seen
    said = capsys.readouterr().err
    assert "going on from step 2 of a run of 2 steps, which is over\n" in said
    assert said.count("compiling the training step (full, 3 x 16 tokens)\n") == 1


@pytest.mark.parametrize("optimizer", ["lion", "muon"])
def test_other_optimizers_go_on_in_float16(optimizer, run):
    config = WITH(CONFIG, optimizer=optimizer, learning_rate=1e-3, loss_scale=2.0**40)
    half = make_model(ffns=(None,), dtype=jnp.float16)
    expected, expected_steps = run(config, "whole", model_and_params=half)
    assert expected_steps[1]["overflow"] == 1.0
    run(config, "resumed", stop=3, model_and_params=half)
    result, seen = run(config, "resumed", model_and_params=half)
    assert list(seen) == [4, 5]
    np.testing.assert_equal(seen, {step: expected_steps[step] for step in seen})
    chex.assert_trees_all_equal(result.params, expected.params)


def test_a_checkpoint_from_before_a_setting_has_its_default(run, tmp_path, monkeypatch):
    from sparseffn_jax.train import run as module

    usual = module._settings
    monkeypatch.setattr(
        module,
        "_settings",
        lambda config: {
            name: value
            for name, value in usual(config).items()
            if name not in ("optimizer", "schedule", "report_to")
        },
    )
    run(CONFIG, "run", stop=2)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="optimizer was 'adamw', now 'lion'"):
        run(WITH(CONFIG, optimizer="lion", weight_decay=0.1), "run")
    assert list(run(CONFIG, "run")[1]) == [3, 4, 5]


def masked(seed):
    """Returns a model with a mask by the seed; its parameters' shapes are always the same."""
    blocks = np.random.default_rng(seed).permutation(np.arange(32) % 2 == 0).reshape(4, 8)
    core = CoreConfig(64, up_mask=BlockMask.from_array(blocks, (N_EMBD // 4, 8)))
    micro = MicroRefinementConfig(core)
    return make_model((SparseFFNConfig(N_EMBD, 64, "gelu_new", micro=micro, bias=True),))


def add(params, x):
    return jax.tree.map(lambda leaf: leaf + x, params)


def test_a_run_does_not_go_on_with_another_model(run):
    (model, params), (other, _) = masked(0), masked(1)
    config = WITH(CONFIG, steps=3)
    run(config, "run", stop=1, model_and_params=(model, params))
    for changed, message in (
        ((other, params), "these: the model's config or the configs of its FFNs are others. Give"),
        ((model.clone(dtype=jnp.bfloat16), params), "these: dtype was 'float32', now 'bfloat16'"),
        ((model, add(params, 1e-3)), "these: the parameters to start from are others"),
    ):
        with pytest.raises(ValueError, match=message):
            run(config, "run", model_and_params=changed)
    # How it computes the same may change, and where the parameters lie.
    host = jax.tree.map(np.asarray, params)
    _, seen = run(config, "run", model_and_params=(model, host), remat=True, resume="must")
    assert list(seen) == [2, 3]


def test_a_run_does_not_go_on_with_another_teacher(run, dense):
    model, params = dense
    config = WITH(CONFIG, steps=3, distill_weight=0.5)
    run(config, "run", stop=1, teacher=dense)
    for teacher in ((model, add(params, 1e-3)), (model.clone(dtype=jnp.bfloat16), params)):
        with pytest.raises(ValueError, match=r"with these: the teacher is another\. Give"):
            run(config, "run", teacher=teacher)
    assert list(run(config, "run", teacher=dense)[1]) == [2, 3]


def test_a_checkpoint_that_does_not_say_what_it_is_of_goes_on(run, dense, monkeypatch):
    from sparseffn_jax.train import run as module

    monkeypatch.setattr(module, "identify", lambda *_: {})
    run(CONFIG, "run", stop=2)
    monkeypatch.undo()
    model, params = dense
    assert list(run(CONFIG, "run", model_and_params=(model, add(params, 1)))[1]) == [3, 4, 5]
    run(CONFIG, "other", stop=2)
    monkeypatch.setattr(module, "identify", lambda *_: {})
    with pytest.raises(ValueError, match=r"(?s)of another model.*mlp/bias: saved nothing"):
        run(CONFIG, "other", model_and_params=make_model())


def test_a_fingerprint_reads_little_of_each_leaf():
    rng = np.random.default_rng(0)
    shapes = {"a": (), "b": (5000,), "c": (300, 500), "d": (20, 30, 40), "e": (0, 3)}
    leaves = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    expected = fingerprint(leaves)
    assert fingerprint(jax.tree.map(jnp.asarray, leaves)) == expected
    assert fingerprint({**leaves, "c": leaves["c"].T}) != expected
    assert fingerprint({**leaves, "c": leaves["c"].reshape(500, 300)}) != expected
    assert fingerprint(jax.tree.map(lambda x: x.astype(np.float16), leaves)) != expected
    assert fingerprint({**leaves, "a": leaves["a"] + 1}) != expected
    # Between the points of its grid nothing is read.
    assert fingerprint({**leaves, "c": leaves["c"] + (np.arange(500) == 1)}) == expected


def test_the_text_is_hashed_where_it_is():
    tokens = np.arange(400_000, dtype=np.int32).reshape(8000, 50)
    counted = np.arange(8000 * 49).reshape(8000, 49) % 3 == 0
    tracemalloc.start()
    try:
        digest = _text_hash(TokenWindows(tokens, tokens[:1], counted))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.1 * tokens.nbytes
    assert digest == hashlib.sha256(tokens.tobytes() + counted.tobytes()).hexdigest()
    other = TokenWindows(tokens.T, tokens[:1])
    assert _text_hash(other) == hashlib.sha256(tokens.T.tobytes()).hexdigest()
