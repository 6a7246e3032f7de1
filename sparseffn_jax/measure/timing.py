"""Wall-clock time of two programs side by side: interleaved, repeated, as medians."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class PairedTimes:
    """Times of a baseline and a candidate, in seconds, run in turn.

    Attributes:
      baseline: one entry a repetition.
      candidate: one entry a repetition, each run right after the baseline's of the same index.
    """

    baseline: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Median over the pairs of baseline time over candidate time."""
        return float(np.median(np.divide(self.baseline, self.candidate)))

    def __add__(self, other: "PairedTimes") -> "PairedTimes":
        """Returns the pairs of both measurements."""
        return PairedTimes(self.baseline + other.baseline, self.candidate + other.candidate)

    def summary(self) -> dict[str, float | list[float]]:
        """Returns medians, the speed-up and its quartiles over the pairs, ready for JSON."""
        ratios = np.divide(self.baseline, self.candidate)
        return {
            "baseline_seconds": float(np.median(self.baseline)),
            "candidate_seconds": float(np.median(self.candidate)),
            "speedup": self.speedup,
            "speedup_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        }


def chained(function: Callable[[Any, Any], Any], times: int) -> Callable[[Any, Any], Any]:
    """Returns ``x -> x + function(params, x)``, applied ``times`` times in one program.

    One call on few tokens is over before the clock has read it; here each waits for the one before,
    as in generation.
    """

    def run(params: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, x: x + function(params, x), x)

    return run


def time_pair(
    baseline: Callable[[], Any], candidate: Callable[[], Any], *, repeats: int = 15
) -> PairedTimes:
    """Times two functions in turn; see :func:`time_in_turn`.

    Args:
      baseline: runs the program compared with and returns its outputs, which are waited for.
      candidate: likewise.
      repeats: pairs to measure.
    """
    return PairedTimes(*time_in_turn([baseline, candidate], repeats=repeats))


def time_in_turn(
    functions: Sequence[Callable[[], Any]], *, repeats: int = 15
) -> list[tuple[float, ...]]:
    """Times functions in turn; returns each one's seconds, run by run.

    Taking turns lets a slow spell of a shared machine fall on all. Each turn begins with a run that
    is not timed: otherwise a program would pay for the state in which the one before it left caches
    and allocator, and a light program for a heavy one's.

    Args:
      functions: each runs a program and returns its outputs, which are waited for.
      repeats: runs of each.
    """
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats):
        for turn in range(len(functions)):
            number = (turn + repeat) % len(functions)
            jax.block_until_ready(functions[number]())
            started = time.perf_counter()
            jax.block_until_ready(functions[number]())
            times[number].append(time.perf_counter() - started)
    return [tuple(each) for each in times]
