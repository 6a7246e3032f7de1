import types

import numpy as np
import pytest

from sparseffn_jax.measure import timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed functions move."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now.seconds)
    return now


def taking(clock, log, name, first, later):
    """A function whose first run, which compiles, takes longer."""

    def run():
        clock.seconds += later if name in log else first
        log.append(name)

    return run


def test_turns_begin_untimed_and_their_order_changes(clock):
    log = []
    runs = [taking(clock, log, "a", 9.0, 2.0), taking(clock, log, "b", 7.0, 1.0)]
    assert timing.time_in_turn(runs, repeats=3) == [(2.0,) * 3, (1.0,) * 3]
    assert "".join(log) == "aabb" + "bbaa" + "aabb"


def test_short_programs_run_until_enough_time_has_passed(clock):
    log = []
    runs = [taking(clock, log, "a", 9.0, 2.0), taking(clock, log, "b", 7.0, 1.0)]
    assert timing.time_pair(*runs, repeats=3, least_seconds=10.0).baseline == (2.0,) * 4
    assert timing.time_pair(*runs, repeats=3, least_seconds=9.0).baseline == (2.0,) * 3
    assert timing.time_pair(*runs, repeats=3, least_seconds=1e9).baseline == (2.0,) * 24


def test_the_error_of_a_speedup_is_what_its_repetitions_show():
    rng = np.random.default_rng(0)
    times = rng.normal(1.0, 0.05, (2000, 25))
    pairs = [timing.PairedTimes((2.0,) * 25, tuple(each)) for each in times]
    spread = np.std([pair.speedup for pair in pairs]) / 2.0
    assert np.mean([pair.relative_error for pair in pairs]) == pytest.approx(spread, rel=0.1)


def test_the_speedup_is_the_median_over_pairs():
    times = timing.PairedTimes((2.0, 4.0, 9.0), (1.0, 1.0, 1.0))
    assert times.speedup == 4.0
    assert times.summary() == {
        "baseline_seconds": 4.0,
        "candidate_seconds": 1.0,
        "speedup": 4.0,
        "speedup_quartiles": [3.0, 6.5],
    }
