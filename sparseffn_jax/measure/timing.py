"""Wall-clock time of two programs side by side: interleaved, repeated, as medians."""

import dataclasses
import time
from collections.abc import Callable
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

    def summary(self) -> dict[str, float | list[float]]:
        """Returns medians, the speed-up and its quartiles over the pairs, ready for JSON."""
        ratios = np.divide(self.baseline, self.candidate)
        return {
            "baseline_seconds": float(np.median(self.baseline)),
            "candidate_seconds": float(np.median(self.candidate)),
            "speedup": self.speedup,
            "speedup_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        }


def time_pair(
    baseline: Callable[[], Any], candidate: Callable[[], Any], *, repeats: int = 15
) -> PairedTimes:
    """Times two functions in turn, after warming each up.

    Taking turns lets a slow spell of a shared machine fall on both; which of the two goes first
    alternates, since the second finds warmer caches.

    Args:
      baseline: runs the program compared with and returns its outputs, which are waited for.
      candidate: likewise.
      repeats: pairs to measure.
    """
    for function in (baseline, candidate, baseline, candidate):
        jax.block_until_ready(function())
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            started = time.perf_counter()
            jax.block_until_ready((baseline, candidate)[side]())
            times[side].append(time.perf_counter() - started)
    return PairedTimes(tuple(times[0]), tuple(times[1]))
