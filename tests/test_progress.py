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
    console = Console(file=io.StringIO(), soft_wrap=True, markup=False, highlight=False)
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
        log.advance(4, {"loss": 1.25}, 1000.0)
        wait_for(console, "step 4/6  loss 1.2500  1000 tokens/s  0:00:00 left\n")


def test_a_run_says_what_it_does_beside_steps(console, tmp_path):
    with MetricsLog(tmp_path, 2, 6) as log:
        log.advance(3, {"loss": 1.25}, 1000.0)
        with log.doing("compiling the evaluation") as note:
            wait_for(console, "step 3/6  compiling the evaluation, 0:00:00\n" * 2)
            note("evaluating, 1/4 windows")
            wait_for(console, "step 3/6  evaluating, 1/4 windows, 0:00:00\n")
        wait_for(console, "step 3/6  loss 1.2500  1000 tokens/s  0:00:00 left\n")


def test_a_mixed_loss_stands_beside_the_cross_entropy(console, tmp_path):
    metrics = {"loss": 1.25, "cross_entropy": 2.5}
    with MetricsLog(tmp_path, 0, 6) as log:
        log.advance(1, metrics, 1000.0)
        wait_for(console, "step 1/6  mixed loss 1.2500  cross-entropy 2.5000  1000 tokens/s  ")
        numbers = {"step": 1, "validation_loss": 3.0, "tokens_per_second": 1.0}
        log.record(numbers | metrics)
    line = "mixed loss 1.2500  cross-entropy 2.5000  validation cross-entropy 3.0000  1 tokens/s"
    assert line in console.file.getvalue()
