"""The divergence guard: what a step's numbers say about the run's health.

When a loss spikes, PaLM's trainers went back to a checkpoint and past the batches that were read
around the spike, and it did not come back (Chowdhery et al. 2022, 2204.02311, section 5.1). The
guard does that by itself, with a lower rate. Its functions are pure and its state is a few
numbers, which checkpoints hold, so that a resumed run decides as one that was never stopped.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any, Self

# Weight of the newest value in the running statistics, once there are enough of them. It makes
# them remember 20 steps, few enough to forget how steeply the loss fell at first.
_WEIGHT = 0.05
_BAND_STARTS_AFTER = 50
# As a share of the mean loss: a loss that has settled still moves by this much without meaning
# anything.
_SMALLEST_DEVIATION = 0.01
# For the logarithm of the feed-forward layers' share of the gradient: with the default band, the
# share may grow tenfold.
_SMALLEST_SHARE_DEVIATION = 0.4


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When the guard goes back to a snapshot, how often, and what it changes then.

    Attributes:
      band_deviations: a loss above the running mean by more than this many running standard
        deviations is outside the band; so is the share of the feed-forward layers in the gradient.
      patience: the number of steps in a row outside a band that count as divergence.
      rate_factor: the factor by which each restore multiplies the learning rates, in (0, 1].
      max_restores: the number of restores after which the next divergence ends the run.
      snapshot_every: the number of steps between two copies of what trains, in host memory.

    Raises:
      ValueError: on construction, if a value is out of its range; the message names it.

    Example:
      >>> import sparseffn_jax as sf
      >>> config = sf.TrainConfig(steps=200, guard=sf.GuardConfig(patience=5, max_restores=1))
      >>> config.guard.patience, config.guard.rate_factor
      (5, 0.5)
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
class Chart:
    """An exponentially weighted control chart (Roberts 1959) of one number.

    Attributes:
      mean: the running mean of the values inside the band, in their unit.
      variance: the running variance of the values inside the band, in the square of their unit.
      count: the number of values inside the band so far.
      outside: the number of the newest values that lay outside the band without a break.
    """

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0
    outside: int = 0

    def limit(self, deviations: float, smallest_deviation: float) -> float:
        """Returns the largest value inside the band."""
        return self.mean + deviations * max(math.sqrt(self.variance), smallest_deviation)

    def add(self, value: float, limit: float) -> Self:
        """Returns the chart after one more value; a value outside the band does not move it."""
        if self.count >= _BAND_STARTS_AFTER and value > limit:
            return dataclasses.replace(self, outside=self.outside + 1)
        # Finch 2009, incremental calculation of weighted mean and variance; a plain mean at first.
        weight = max(_WEIGHT, 1.0 / (self.count + 1))
        delta = value - self.mean
        return type(self)(
            mean=self.mean + weight * delta,
            variance=(1.0 - weight) * (self.variance + weight * delta**2),
            count=self.count + 1,
        )


@dataclasses.dataclass(frozen=True)
class GuardState:
    """What the guard remembers from step to step.

    Attributes:
      loss: the chart of the losses, in nats a token.
      ffn_share: the chart of the feed-forward layers' share of the gradient: the natural logarithm
        of their gradient's norm over that of the rest.
      restores: the number of restores so far.
      rate_factor: the factor by which all restores together multiply the learning rates.
    """

    loss: Chart = Chart()
    ffn_share: Chart = Chart()
    restores: int = 0
    rate_factor: float = 1.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuilds a state from ``dataclasses.asdict``'s output."""
        charts = {name: Chart(**values[name]) for name in ("loss", "ffn_share")}
        return cls(**{**values, **charts})


class Verdict(enum.Enum):
    """A step's health; only a state whose step was ``GOOD`` is worth keeping."""

    GOOD = enum.auto()
    SUSPECT = enum.auto()
    FFN_DIVERGED = enum.auto()
    DIVERGED = enum.auto()


class DivergenceError(RuntimeError):
    """Training diverged again after the last allowed restore.

    Example:
      >>> import tempfile
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import sparseffn_jax as sf
      >>> from transformers import GPT2Config
      >>> config = GPT2Config(
      ...     vocab_size=97, n_positions=16, n_embd=32, n_layer=1, n_head=2,
      ...     bos_token_id=0, eos_token_id=0,
      ... )
      >>> model = sf.GPT2LMHeadModel(config)
      >>> ids = jnp.zeros((2, 8), int)
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> tokens = np.random.default_rng(0).integers(97, size=(10, 17), dtype=np.int32)
      >>> windows = sf.TokenWindows(train=tokens[2:], validation=tokens[:2])
      >>> broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
      >>> settings = sf.TrainConfig(steps=2, batch_size=4, guard=sf.GuardConfig(max_restores=0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     sf.train(model, broken, windows, settings, folder)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      sparseffn_jax.train.guard.DivergenceError: step 1: ... loss is nan, ...
    """


def observe(
    config: GuardConfig, state: GuardState, metrics: Mapping[str, float]
) -> tuple[GuardState, Verdict]:
    """Judges one step; returns the guard's new state and its verdict.

    Everything has diverged when a number is not finite, or when the loss was above its band
    ``patience`` times in a row. The feed-forward layers have diverged alone when only numbers of
    theirs are not finite, or when their share of the gradient was above its band so often while
    the loss was not.

    Args:
      config: the guard's settings.
      state: the guard's state after the step before.
      metrics: the step's numbers, as :class:`sparseffn_jax.train.step.Update` returns them.
    """
    if metrics.get("overflow"):
        # Nothing was updated, and the loss will be scaled by less: no fault of the run's.
        return state, Verdict.SUSPECT
    broken = _broken(metrics)
    if broken:
        verdict = Verdict.FFN_DIVERGED if _are_of_ffn(broken, metrics) else Verdict.DIVERGED
        return _back_inside(state), verdict
    state = dataclasses.replace(
        state, loss=state.loss.add(metrics["loss"], upper_limit(config, state))
    )
    if (share := _ffn_share(metrics)) is not None:
        chart = state.ffn_share.add(share, share_limit(config, state))
        state = dataclasses.replace(state, ffn_share=chart)
    if state.loss.outside >= config.patience:
        return _back_inside(state), Verdict.DIVERGED
    if state.ffn_share.outside >= config.patience and not state.loss.outside:
        return _back_inside(state), Verdict.FFN_DIVERGED
    is_outside = state.loss.outside or state.ffn_share.outside
    return state, Verdict.SUSPECT if is_outside else Verdict.GOOD


def upper_limit(config: GuardConfig, state: GuardState) -> float:
    """Returns the largest loss inside the band, in nats a token."""
    smallest = _SMALLEST_DEVIATION * abs(state.loss.mean)
    return state.loss.limit(config.band_deviations, smallest)


def share_limit(config: GuardConfig, state: GuardState) -> float:
    """Returns the largest logarithm of the FFNs' share of the gradient inside the band."""
    return state.ffn_share.limit(config.band_deviations, _SMALLEST_SHARE_DEVIATION)


def describe(
    config: GuardConfig, state: GuardState, verdict: Verdict, metrics: Mapping[str, float]
) -> str:
    """Says why a step with these metrics, after ``state``, got a verdict of divergence."""
    broken = _broken(metrics)
    if broken:
        return ", ".join(f"{name} is {metrics[name]}" for name in broken)
    if verdict is Verdict.DIVERGED:
        return (
            f"loss {metrics['loss']:.4f} makes {config.patience} in a row above "
            f"{upper_limit(config, state):.4f}, the limit of its running band"
        )
    share = metrics["ffn_grad_norm"] / metrics["rest_grad_norm"]
    return (
        f"the feed-forward layers' gradient, {share:.3g} times that of the rest, makes "
        f"{config.patience} in a row above {math.exp(share_limit(config, state)):.3g}, the limit "
        "of its running band"
    )


def after_restore(config: GuardConfig, state: GuardState) -> GuardState:
    """Returns the guard's state with one more restore and the lower rate that goes with it."""
    return dataclasses.replace(
        state, restores=state.restores + 1, rate_factor=state.rate_factor * config.rate_factor
    )


def _broken(metrics: Mapping[str, float]) -> list[str]:
    return [name for name, value in metrics.items() if not math.isfinite(value)]


def _are_of_ffn(broken: list[str], metrics: Mapping[str, float]) -> bool:
    # The norms of everything are broken with those of a part; without parts, nothing can be told.
    own = {"grad_norm", "update_norm", "ffn_grad_norm", "ffn_update_norm"}
    known = "rest_grad_norm" in metrics
    return known and own.issuperset(broken) and any(name.startswith("ffn_") for name in broken)


def _ffn_share(metrics: Mapping[str, float]) -> float | None:
    ffn, rest = metrics.get("ffn_grad_norm", 0.0), metrics.get("rest_grad_norm", 0.0)
    return math.log(ffn / rest) if ffn > 0.0 and rest > 0.0 else None


def _back_inside(state: GuardState) -> GuardState:
    return dataclasses.replace(
        state,
        loss=dataclasses.replace(state.loss, outside=0),
        ffn_share=dataclasses.replace(state.ffn_share, outside=0),
    )
