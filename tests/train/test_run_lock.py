"""Two runs never write to one folder; lock_worker.py is what the tests start."""

import errno
import fcntl
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparseffn_jax.train.run_lock import RunFolderError, hold_run_folder

HERE = Path(__file__).parent


def start(out_dir):
    roots = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    return subprocess.Popen(
        [sys.executable, HERE / "lock_worker.py", out_dir],
        env={**os.environ, "PYTHONPATH": roots, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def running(tmp_path):
    """A process that trains in a folder and waits after a step, and the folder."""
    worker = start(tmp_path / "run")
    assert worker.stdout.readline() == "training\n", worker.communicate()[1][-4000:]
    yield worker, tmp_path / "run"
    worker.kill()
    worker.communicate()


def contents(folder):
    return {
        path.relative_to(folder): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None,
        )
        for path in folder.rglob("*")
    }


def test_a_second_run_is_refused_and_changes_nothing(running):
    first, folder = running
    # As a checkpoint looks while it is being written: a run that starts removes such remains.
    (folder / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    before = contents(folder)
    second = start(folder)
    _, message = second.communicate(timeout=120)
    assert second.returncode == 1
    last = message.splitlines()[-1]
    assert last.startswith(f"RunFolderError: {folder} is in use: process {first.pid} on host ")
    assert f"on host {socket.gethostname()} has been running there since 20" in last
    assert "Wait until it has ended, stop it, or give another folder" in last
    assert contents(folder) == before
    _, log = first.communicate("go on\n", timeout=120)
    assert first.returncode == 0, log[-4000:]
    assert (folder / "checkpoints" / "3" / "manifest.json").exists()


def test_a_killed_run_frees_its_folder(running):
    first, folder = running
    with pytest.raises(RunFolderError, match=rf"process {first.pid} on"), hold_run_folder(folder):
        pass
    first.kill()
    first.wait(timeout=60)
    with hold_run_folder(folder):
        pass


def test_one_process_holds_a_folder_once_at_a_time(tmp_path):
    refusals = []

    def try_to_hold():
        with pytest.raises(RunFolderError) as refusal, hold_run_folder(tmp_path / "run"):
            pass
        refusals.append(str(refusal.value))

    with hold_run_folder(tmp_path / "run"):
        try_to_hold()
        # The refusal has opened and closed the file, which must not free it.
        thread = threading.Thread(target=try_to_hold)
        thread.start()
        thread.join()
        with hold_run_folder(tmp_path / "run" / "below"), hold_run_folder(tmp_path / "beside"):
            pass
    assert len(refusals) == 2
    assert all(f"process {os.getpid()} on host" in refusal for refusal in refusals)
    with pytest.raises(ZeroDivisionError), hold_run_folder(tmp_path / "run"):
        _ = 1 / 0
    with hold_run_folder(tmp_path / "run"):
        pass


def test_a_holder_that_left_no_record_is_refused_all_the_same(tmp_path):
    with hold_run_folder(tmp_path):
        (tmp_path / "run.lock").write_text("{")
        with (
            pytest.raises(RunFolderError, match="another process is running there"),
            hold_run_folder(tmp_path),
        ):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_a_warning(number, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    message = re.escape(f"{tmp_path} cannot be locked ({os.strerror(number)})")
    with pytest.warns(RuntimeWarning, match=message), hold_run_folder(tmp_path):
        pass


def test_an_operating_system_without_locks_costs_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.warns(RuntimeWarning, match="no flock"), hold_run_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    with pytest.raises(NotADirectoryError, match="file/run"), hold_run_folder(folder):
        pass
