"""What a run survives: full disks, damaged checkpoints, preemption, an FFN that diverges alone."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from train_models import make_windows

from sparseffn_jax.train import checkpoints, step
from sparseffn_jax.train.checkpoints import CheckpointStore, restore_ffn
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.guard import DivergenceError, GuardConfig
from sparseffn_jax.train.loop import Terminated, train
from sparseffn_jax.train.metrics import MetricsLog

CONFIG = TrainConfig(
    steps=12,
    batch_size=3,
    recipe="full",
    learning_rate=1e-2,
    log_every=1,
    eval_every=0,
    save_every=4,
    guard=GuardConfig(snapshot_every=3),
)


@pytest.fixture(scope="module")
def undisturbed(model_and_params, windows, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("undisturbed")
    return train(*model_and_params, windows, CONFIG, out_dir), out_dir


def events(out_dir):
    records = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "event" in record]


def steps(out_dir):
    return sorted(int(path.name) for path in (out_dir / "checkpoints").iterdir())


def wait_until(is_so, seconds=60):
    for _ in range(100 * seconds):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError(f"not so after {seconds} seconds")


@pytest.mark.parametrize("damaged", [(12,), (8, 12), (4, 8, 12)])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    damaged, undisturbed, model_and_params, windows, tmp_path, capsys
):
    expected, source = undisturbed
    out_dir = tmp_path / "run"
    shutil.copytree(source, out_dir)
    for number in damaged:
        file = out_dir / "checkpoints" / str(number) / "position" / "metadata"
        file.write_bytes(file.read_bytes().replace(b"step", b"stop", 1))
    if len(damaged) < 3:
        assert restore_ffn(out_dir) is not None
    with pytest.raises(ValueError, match="is not whole: position/metadata has changed"):
        restore_ffn(out_dir, 12)
    ran = []
    result = train(
        *model_and_params, windows, CONFIG, out_dir, on_step=lambda number, _: ran.append(number)
    )
    assert ran[0] == min(damaged) - 3
    chex.assert_trees_all_equal(result.params, expected.params)
    assert result.data_hash == expected.data_hash
    reasons = [event["reason"] for event in events(out_dir)]
    assert len(reasons) == len(damaged)
    whole = min(damaged) - 4
    going_on = f"with that of step {whole}" if whole else "from the beginning"
    assert all(going_on in reason for reason in reasons)
    assert going_on in capsys.readouterr().err
    assert steps(out_dir) == [4, 8, 12]


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    undisturbed, model_and_params, windows, tmp_path, capsys
):
    expected, _ = undisturbed
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    folder = tmp_path / "checkpoints"

    def on_step(number, _):
        # While the checkpoint of step 8 is written, and only then, no file may grow beyond a few
        # bytes.
        if number == 7:
            wait_until(lambda: (folder / "4" / "manifest.json").exists())
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, usual[1]))
        if number == 10:
            wait_until(lambda: [path.name for path in folder.iterdir()] == ["4"])
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)

    try:
        result = train(*model_and_params, windows, CONFIG, tmp_path, on_step=on_step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    chex.assert_trees_all_equal(result.params, expected.params)
    assert steps(tmp_path) == [4, 12]
    (event,) = events(tmp_path)
    assert event["reason"].startswith("the checkpoint of step 8 could not be written (")
    assert event["reason"].endswith(f"the newest is {tmp_path / 'checkpoints' / '4'}")
    assert "cannot write the log" in capsys.readouterr().err
    # What the log could not take then, it has now.
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 13))


def test_old_checkpoints_stay_until_a_newer_one_is_verified(
    model_and_params, windows, tmp_path, monkeypatch
):
    find = checkpoints.find_damage
    monkeypatch.setattr(
        checkpoints, "find_damage", lambda p, x: "read badly" if p.name == "12" else find(p, x)
    )
    config = dataclasses.replace(CONFIG, keep_checkpoints=1)
    train(*model_and_params, windows, config, tmp_path)
    assert steps(tmp_path) == [8, 12]
    (event,) = events(tmp_path)
    assert "what was read back is not what was written: read badly" in event["reason"]
    assert event["reason"].endswith(f"the newest is {tmp_path / 'checkpoints' / '8'}")


def test_damaged_checkpoints_do_not_crowd_out_whole_ones(
    undisturbed, model_and_params, windows, tmp_path
):
    _, source = undisturbed
    shutil.copytree(source, tmp_path / "run")
    for number in (8, 12):
        (tmp_path / "run" / "checkpoints" / str(number) / "position" / "metadata").unlink()
    config = dataclasses.replace(CONFIG, save_every=100, keep_checkpoints=2)

    def on_step(number, _):
        if number == 6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated, match=r"stopped after step 6 of 12.*/checkpoints/6,"):
        train(*model_and_params, windows, config, tmp_path / "run", on_step=on_step)
    assert steps(tmp_path / "run") == [4, 6, 8, 12]
    with CheckpointStore(tmp_path / "run", keep=2) as store:
        assert (store.latest_step(), store.sealed_step()) == (6, 6)


def test_sigterm_saves_and_has_its_own_status(undisturbed, model_and_params, windows, tmp_path):
    expected, _ = undisturbed

    def on_step(number, _):
        if number == 6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated, match=r"stopped after step 6 of 12.*/checkpoints/6,") as stop:
        train(*model_and_params, windows, CONFIG, tmp_path, on_step=on_step)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    result = train(*model_and_params, windows, CONFIG, tmp_path, resume="must")
    chex.assert_trees_all_equal(result.params, expected.params)


def test_what_a_killed_run_was_writing_goes(undisturbed, tmp_path):
    _, source = undisturbed
    shutil.copytree(source, tmp_path / "run")
    partial = tmp_path / "run" / "checkpoints" / "16.orbax-checkpoint-tmp"
    partial.mkdir()
    with CheckpointStore(tmp_path / "run", keep=3) as store:
        assert store.latest_step() == 12
    assert not partial.exists()


def poisoned_update(monkeypatch, poison):
    """Makes every update get gradients that ``poison(gradients, batch)`` has changed."""
    usual = jax.grad

    def grad(function, **options):
        gradient = usual(function, **options)

        def changed(trainable, frozen, teacher, batch, key):
            grads, metrics = gradient(trainable, frozen, teacher, batch, key)
            return poison(grads, batch[0]), metrics

        return changed

    monkeypatch.setattr(step.jax, "grad", grad)


def marked(windows, batch):
    """Marks the windows of one batch by their first token, which no other has."""
    from sparseffn_jax.train.data import make_batches

    batches = make_batches(np.arange(len(windows.train)), CONFIG.batch_size, CONFIG.seed)
    rows = [next(batches) for _ in range(batch)][-1]
    train_windows = windows.train.copy()
    train_windows[train_windows == 96] = 95
    train_windows[rows, 0] = 96
    return dataclasses.replace(windows, train=train_windows)


def test_an_ffn_that_diverges_alone_goes_back_alone(model_and_params, tmp_path, monkeypatch):
    windows = marked(make_windows(), batch=8)

    def poison(grads, batch):
        bad = jnp.where((batch[:, 0] == 96).any(), jnp.nan, 1.0)
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x * bad if "mlp" in jax.tree_util.keystr(path) else x, grads
        )

    poisoned_update(monkeypatch, poison)
    states = {}

    def on_step(number, _):
        if number == 8:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(*model_and_params, windows, CONFIG, tmp_path / "to 8", on_step=on_step)

    def stop_before(number, _):
        if number in (6, 7):
            signal.raise_signal(signal.SIGINT)

    for number in (6, 7):
        with pytest.raises(KeyboardInterrupt):
            train(*model_and_params, windows, CONFIG, tmp_path / "before", on_step=stop_before)
        states[number] = saved(tmp_path / "before", number)
    (event,) = events(tmp_path / "to 8")
    assert (event["step"], event["restored_step"], event["part"]) == (8, 6, "feed-forward layers")
    assert event["reason"] == "ffn_grad_norm is nan, grad_norm is nan"
    after = saved(tmp_path / "to 8", 8)
    for path, leaf in after.items():
        assert np.isfinite(leaf).all(), path
        if "mlp" in path:
            np.testing.assert_array_equal(leaf, states[6][path], err_msg=str(path))
        else:
            assert (leaf != states[7][path]).any(), path
    result = train(*model_and_params, windows, CONFIG, tmp_path / "to 8", resume="must")
    assert [record["step"] for record in result.history if "loss" in record][-1] == 12
    chex.assert_tree_all_finite(result.params)


def saved(out_dir, number):
    with CheckpointStore(out_dir, keep=9) as store:
        return flatten_dict(store.restore_params(number, like_saved(store, number), lambda x: x))


def like_saved(store, number):
    folder = store.path / str(number)
    parts = [checkpoints._shapes_of(folder / name) for name in ("ffn", "rest")]
    return checkpoints.combine(*parts)


def test_ffns_that_never_stop_diverging_end_the_run(
    model_and_params, windows, tmp_path, monkeypatch
):
    poisoned_update(
        monkeypatch,
        lambda grads, _: jax.tree_util.tree_map_with_path(
            lambda path, x: x * jnp.inf if "mlp" in jax.tree_util.keystr(path) else x, grads
        ),
    )
    with pytest.raises(DivergenceError, match=r"step 4: .*ffn_grad_norm .*after 3 restores"):
        train(*model_and_params, windows, CONFIG, tmp_path)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_disk_that_is_full_when_a_run_starts(steps_before, tmp_path, monkeypatch, capsys):
    def record(step):
        return {"step": step, "loss": float(step), "tokens_per_second": 1.0}

    if steps_before:
        with MetricsLog(tmp_path, 0, 4) as log:
            for number in (1, 2, 3):
                log.record(record(number))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        log = MetricsLog(tmp_path, steps_before, 4)
    with log:
        for number in range(steps_before + 1, 5):
            log.record(record(number))
    assert capsys.readouterr().err.count("No space left on device") == 1
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records] == [1, 2, 3, 4]


def test_a_log_that_cannot_be_written_is_kept_in_memory(tmp_path, monkeypatch, capsys):
    with MetricsLog(tmp_path, 0, 4) as log:
        log.record({"step": 1, "loss": 1.0, "tokens_per_second": 1.0})
        usual = MetricsLog._append

        def full(self):
            with self._path.open("ab") as file:
                file.write(b'{"step": 2, "lo')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(MetricsLog, "_append", full)
        log.record({"step": 2, "loss": 2.0, "tokens_per_second": 1.0})
        log.record({"step": 3, "loss": 3.0, "tokens_per_second": 1.0})
        monkeypatch.setattr(MetricsLog, "_append", usual)
        log.record({"step": 4, "loss": 4.0, "tokens_per_second": 1.0})
    assert capsys.readouterr().err.count("No space left on device") == 1
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [record["loss"] for record in records] == [1.0, 2.0, 3.0, 4.0]
