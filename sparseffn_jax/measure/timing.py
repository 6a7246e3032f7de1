"""Wall-clock time of two programs side by side: interleaved, repeated, as medians."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

# Programs that are over at once run at most so many times as often as is asked for.
_MOST_OFTEN = 8


@dataclasses.dataclass(frozen=True)
class PairedTimes:
    """Times of a baseline and a candidate that ran in turn, in seconds.

    Attributes:
      baseline: the baseline's time in each repetition.
      candidate: the candidate's time in each repetition.
    """

    baseline: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Speed-up of the candidate: the median ratio of the times in a repetition."""
        return float(np.median(np.divide(self.baseline, self.candidate)))

    @property
    def relative_error(self) -> float:
        """Standard error of the speed-up over the speed-up, by the quartiles of the ratios.

        Of a median, as for notched box plots (McGill, Tukey and Larsen 1978).
        """
        ratios = np.divide(self.baseline, self.candidate)
        lower, median, upper = np.quantile(ratios, [0.25, 0.5, 0.75])
        return float(1.25 * (upper - lower) / (1.35 * median * np.sqrt(len(ratios))))

    def __add__(self, other: "PairedTimes") -> "PairedTimes":
        """Returns the pairs of both measurements."""
        return PairedTimes(self.baseline + other.baseline, self.candidate + other.candidate)

    def summary(self) -> dict[str, float | list[float]]:
        """Returns medians in seconds, the speed-up and its quartiles, in a form fit for JSON."""
        ratios = np.divide(self.baseline, self.candidate)
        return {
            "baseline_seconds": float(np.median(self.baseline)),
            "candidate_seconds": float(np.median(self.candidate)),
            "speedup": self.speedup,
            "speedup_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        }


def chained(function: Callable[[Any, Any], Any], times: int) -> Callable[[Any, Any], Any]:
    """Returns ``x -> x + function(params, x)``, applied ``times`` times in one program.

    A single call on few tokens is too short for the clock. In the chain each call waits for the
    previous one, as in generation.
    """

    def run(params: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, x: x + function(params, x), x)

    return run


def time_pair(
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    *,
    repeats: int = 15,
    least_seconds: float = 0.0,
) -> PairedTimes:
    """Times two functions in turn, as :func:`time_in_turn` does.

    Args:
      baseline: function that runs the reference program and returns its outputs, which are waited
        for.
      candidate: function that runs the program to be compared with the reference and returns its
        outputs, which are waited for.
      repeats: number of times that each function is timed, at least.
      least_seconds: as in :func:`time_in_turn`.
    """
    functions = [baseline, candidate]
    return PairedTimes(*time_in_turn(functions, repeats=repeats, least_seconds=least_seconds))


def time_in_turn(
    functions: Sequence[Callable[[], Any]], *, repeats: int = 15, least_seconds: float = 0.0
) -> list[tuple[float, ...]]:
    """Times functions in turn.

    Because the functions take turns, a slow spell of a shared machine affects all of them alike.
    Each turn begins with a run that is not timed: otherwise a program would pay for the state in
    which the previous program left caches and allocator.

    Args:
      functions: functions that each run a program and return its outputs, which are waited for.
      repeats: number of times that each function is timed, at least.
      least_seconds: what all timed runs together are to take: short ones go on until they do, or
        have run eight times as often as ``repeats``.

    Returns:
      The times of each function, in seconds, run by run.
    """
    times: list[list[float]] = [[] for _ in functions]
    repeat = 0
    while repeat < repeats or (
        repeat < _MOST_OFTEN * repeats and sum(map(sum, times)) < least_seconds
    ):
        for turn in range(len(functions)):
            number = (turn + repeat) % len(functions)
            jax.block_until_ready(functions[number]())
            started = time.perf_counter()
            jax.block_until_ready(functions[number]())
            times[number].append(time.perf_counter() - started)
        repeat += 1
    return [tuple(each) for each in times]
