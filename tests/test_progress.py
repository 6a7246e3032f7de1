"""What long work says where there is no terminal."""

import io
import re
import time

import pytest
from rich.console import Console

from sparseffn_jax import progress
from sparseffn_jax.train import metrics
from sparseffn_jax.train.metrics import MetricsLog


@pytest.fixture(autouse=True)
def console(monkeypatch):
    monkeypatch.setattr(progress, "_PAUSE", 0.02)
    console = Console(file=io.StringIO(), markup=False, highlight=False)
    for module in (progress, metrics):
        monkeypatch.setattr(module, "messages", lambda: console)
    return console


def wait_for(console, text):
    for _ in range(500):
        if text in console.file.getvalue():
            return
        time.sleep(0.01)
    raise AssertionError(f"{text!r} is not in {console.file.getvalue()!r}")


def test_a_stage_speaks_until_it_ends(console):
    with progress.stage("compiling"):
        wait_for(console, "compiling, 0:00:00\ncompiling, 0:00:00\n")
    said = console.file.getvalue()
    time.sleep(0.1)
    assert console.file.getvalue() == said


def test_a_counter_says_how_long_the_rest_takes(console):
    with progress.counter("evaluating") as count:
        wait_for(console, "evaluating\nevaluating\n")
        count(0, 100_000)
        time.sleep(0.1)
        count(1, 100_000)
        wait_for(console, " left\n")
    said = re.search(r"^evaluating 1/100000, (\d+):\d\d:\d\d left$", console.file.getvalue(), re.M)
    # A tenth of a second for each, if the machine is not slow.
    assert said is not None
    assert 2 <= int(said[1]) < 30


def test_what_is_said_puts_the_next_line_off(console):
    with progress.heartbeat(console, lambda: "still here") as said:
        for _ in range(20):
            said()
            time.sleep(0.002)
    assert "still here" not in console.file.getvalue()


def test_a_run_says_where_it_stands_between_two_records(console, tmp_path):
    with MetricsLog(tmp_path, 2, 6) as log:
        wait_for(console, "step 3/6, 0:00:00\n")
        log.advance(4, 1.25, 1000.0)
        wait_for(console, "step 4/6  loss 1.2500  1000 tokens/s  0:00:00 left\n")
