"""The divergence guard: what a step's numbers say about the run's health.

When a loss spikes, PaLM's trainers went back to a checkpoint and past the batches that were read
around the spike, and it did not come back (Chowdhery et al. 2022, 2204.02311, section 5.1). The
guard does that by itself, with a lower rate. Its functions are pure and its state is a few
numbers, so that it goes into checkpoints and a resumed run decides alike.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping

# Weight of the newest loss in the running statistics, once there are enough of them: a memory of
# 20 steps, short enough to forget how steeply the loss fell at first.
_WEIGHT = 0.05
_BAND_STARTS_AFTER = 50
# Of the mean: a loss that has settled still moves by this much without meaning anything.
_SMALLEST_DEVIATION = 0.01


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When to go back, how often, and what to change.

    Attributes:
      band_deviations: a loss above the running mean by more than this many running standard
        deviations is outside the band.
      patience: losses in a row outside the band that count as divergence.
      rate_factor: multiplies the learning rates at each restore.
      max_restores: restores before giving up.
      snapshot_every: steps between copies of what trains, kept in host memory.
    """

    band_deviations: float = 6.0
    patience: int = 3
    rate_factor: float = 0.5
    max_restores: int = 3
    snapshot_every: int = 50

    def __post_init__(self):
        if self.band_deviations <= 0.0:
            raise ValueError(f"band_deviations={self.band_deviations} must be positive")
        if not 0.0 < self.rate_factor <= 1.0:
            raise ValueError(f"guard rate_factor={self.rate_factor} must lie in (0, 1]")
        for name, least in (("patience", 1), ("max_restores", 0), ("snapshot_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"guard {name}={getattr(self, name)} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class GuardState:
    """What the guard remembers.

    Attributes:
      mean: running mean of the losses inside the band, nats a token.
      variance: their running variance.
      count: how many there were.
      outside: losses in a row outside the band, up to now.
      restores: so far.
      rate_factor: the product of all restores' factors.
    """

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0
    outside: int = 0
    restores: int = 0
    rate_factor: float = 1.0


class Verdict(enum.Enum):
    """A step's health: only what follows a ``GOOD`` step is worth keeping."""

    GOOD = enum.auto()
    SUSPECT = enum.auto()
    DIVERGED = enum.auto()


class DivergenceError(RuntimeError):
    """Training diverged again after the last allowed restore."""


def observe(
    config: GuardConfig, state: GuardState, loss: float, *norms: float
) -> tuple[GuardState, Verdict]:
    """Judges one step; returns the guard's new state and its verdict.

    The band is an exponentially weighted control chart (Roberts 1959): running mean plus
    ``band_deviations`` running standard deviations. Losses outside do not move it.

    Args:
      config: the limits.
      state: the guard's state after the step before.
      loss: nats a token.
      *norms: of the gradient and the update; like the loss, they must be finite.
    """
    if not all(map(math.isfinite, (loss, *norms))):
        return dataclasses.replace(state, outside=0), Verdict.DIVERGED
    if state.count >= _BAND_STARTS_AFTER and loss > upper_limit(config, state):
        outside = state.outside + 1
        if outside < config.patience:
            return dataclasses.replace(state, outside=outside), Verdict.SUSPECT
        return dataclasses.replace(state, outside=0), Verdict.DIVERGED
    # Finch 2009, incremental calculation of weighted mean and variance; a plain mean at first.
    weight = max(_WEIGHT, 1.0 / (state.count + 1))
    delta = loss - state.mean
    inside = dataclasses.replace(
        state,
        mean=state.mean + weight * delta,
        variance=(1.0 - weight) * (state.variance + weight * delta**2),
        count=state.count + 1,
        outside=0,
    )
    return inside, Verdict.GOOD


def upper_limit(config: GuardConfig, state: GuardState) -> float:
    """The largest loss inside the band, nats a token."""
    deviation = max(math.sqrt(state.variance), _SMALLEST_DEVIATION * abs(state.mean))
    return state.mean + config.band_deviations * deviation


def describe(config: GuardConfig, state: GuardState, metrics: Mapping[str, float]) -> str:
    """Says why a step with these metrics, after ``state``, counts as divergence."""
    broken = [f"{name} is {x}" for name, x in metrics.items() if not math.isfinite(x)]
    if broken:
        return ", ".join(broken)
    return (
        f"loss {metrics['loss']:.4f} makes {config.patience} in a row above "
        f"{upper_limit(config, state):.4f}, the limit of its running band"
    )


def after_restore(config: GuardConfig, state: GuardState) -> GuardState:
    """Counts a restore and lowers the rate."""
    return dataclasses.replace(
        state, restores=state.restores + 1, rate_factor=state.rate_factor * config.rate_factor
    )
