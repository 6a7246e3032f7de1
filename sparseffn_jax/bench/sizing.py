"""A search for the size at which the measured speed-up of a method meets a target."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

# A speed-up this much above its target is close enough; the clock itself is no more exact.
_TOLERANCE = 0.06
_FINEST_STEP = 1.02
_SMALLEST_RATIO = 0.01
_MOST_MEASUREMENTS = 12


@dataclasses.dataclass(frozen=True)
class Sized:
    """A configuration and what it was measured to gain.

    Attributes:
      config: configuration of the method.
      speedup: time of the dense FFN over the configuration's.
    """

    config: Any
    speedup: float


class Settled(NamedTuple):
    """A configuration that meets its target, and the times that say so.

    Attributes:
      config: configuration of the method.
      times: summary of the times of the dense FFNs and of the method's.
    """

    config: Any
    times: dict[str, Any]


class Sizer:
    """Finds the largest configuration of a method that is still fast enough.

    Measurements are kept, so that each target of a method starts from those for the targets before.

    Args:
      size: returns the configuration for a FLOPs ratio, or raises ``ValueError`` if there is none
        so small.
      measure: returns the measured speed-up of a configuration.
    """

    def __init__(self, size: Callable[[float], Any], measure: Callable[[Any], float]):
        self._size, self._measure = size, measure
        self._known: dict[float, Sized] = {}

    def meet(self, target: float) -> Sized | None:
        """Returns the configuration whose speed-up is the target or a little more.

        Secant steps on the logarithms of FLOPs and time, which are nearly proportional, take turns
        with bisections, which a jump of the clock does not stall. If no configuration lands within
        a few percent above the target, the next faster one is returned, and ``None`` if none is
        fast enough.

        Args:
          target: speed-up over the dense FFN, above 0.
        """
        low, high = _SMALLEST_RATIO, 1.0
        for turn in range(_MOST_MEASUREMENTS):
            fast, slow = self._bracket(target)
            if fast is not None and (
                self._known[fast].speedup <= target * (1.0 + _TOLERANCE)
                or fast >= high
                or (slow is not None and slow <= fast * _FINEST_STEP)
            ):
                break
            ratio = min(high, max(low, self._next(fast, slow, target, turn % 2 == 1)))
            if (slow is not None and ratio >= slow) or ratio in self._known:
                break
            try:
                config = self._size(ratio)
            except ValueError:
                low = ratio * 1.2
                continue
            self._known[ratio] = self._measured(config)
        fast, _ = self._bracket(target)
        return None if fast is None else self._known[fast]

    def settle(
        self, target: float, measure_longer: Callable[[Any], dict[str, Any]]
    ) -> Settled | None:
        """Finds a configuration as :meth:`meet` does, and makes sure of it.

        If it falls short of the target when it is measured longer, the search goes on. If it turns
        out much faster than was asked for, the next larger one that missed the target by no more
        than the clock's noise is measured longer too.

        Args:
          target: speed-up over the dense FFN, above 0.
          measure_longer: returns a summary of a configuration's times, with its ``speedup``.
        """
        longer: dict[Any, dict[str, Any]] = {}

        def measured(sized: Sized) -> dict[str, Any]:
            if sized.config not in longer:
                longer[sized.config] = measure_longer(sized.config)
                self.correct(sized, longer[sized.config]["speedup"])
            return longer[sized.config]

        while (sized := self.meet(target)) is not None:
            times = measured(sized)
            if times["speedup"] < target:
                continue
            _, slow = self._bracket(target)
            larger = None if slow is None else self._known[slow]
            if (
                times["speedup"] <= target * (1.0 + _TOLERANCE)
                or larger is None
                or larger.config in longer
                or larger.speedup < target * (1.0 - _TOLERANCE)
                or measured(larger)["speedup"] < target
            ):
                return Settled(sized.config, times)
        return None

    def correct(self, sized: Sized, speedup: float) -> None:
        """Replaces a measurement by a better one of the same configuration.

        Args:
          sized: the configuration, as :meth:`meet` returned it.
          speedup: its speed-up by the better measurement.
        """
        for ratio, known in self._known.items():
            if known.config == sized.config:
                self._known[ratio] = dataclasses.replace(known, speedup=speedup)

    def _measured(self, config: Any) -> Sized:
        for sized in self._known.values():
            if sized.config == config:
                return sized
        return Sized(config, self._measure(config))

    def _bracket(self, target: float) -> tuple[float | None, float | None]:
        """Returns the largest known ratio that is fast enough, and the next larger known one."""
        enough = [ratio for ratio, sized in self._known.items() if sized.speedup >= target]
        fast = max(enough, default=None)
        larger = [ratio for ratio in self._known if fast is None or ratio > fast]
        return fast, min(larger, default=None)

    def _next(self, fast: float | None, slow: float | None, target: float, halve: bool) -> float:
        aim = target * (1.0 + _TOLERANCE / 2)
        if fast is not None and slow is not None:
            at_fast, at_slow = (math.log(self._known[ratio].speedup) for ratio in (fast, slow))
            share = 0.5
            if not halve and at_fast > at_slow:
                share = (at_fast - math.log(aim)) / (at_fast - at_slow)
            return fast * (slow / fast) ** min(0.9, max(0.1, share))
        if fast is not None:
            return fast * self._known[fast].speedup / aim
        if slow is not None:
            # Overheads make the last FLOPs the dearest: a step further than proportional.
            return slow * (self._known[slow].speedup / aim) ** 1.3
        return 1.0 / aim
