import types

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


def test_the_speedup_is_the_median_over_pairs():
    times = timing.PairedTimes((2.0, 4.0, 9.0), (1.0, 1.0, 1.0))
    assert times.speedup == 4.0
    assert times.summary() == {
        "baseline_seconds": 4.0,
        "candidate_seconds": 1.0,
        "speedup": 4.0,
        "speedup_quartiles": [3.0, 6.5],
    }
