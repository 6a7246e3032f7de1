"""Measures the plans of a program's operators, one choice after the other."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sparseffn_jax.ops.plans.choice import Choice, PlanTable, recorded, use

Run = Callable[[], Any]
# A plan that is estimated to cost this many times the cheapest is not worth a compilation.
_HOPELESS = 12.0


@dataclasses.dataclass(frozen=True)
class PlanTimes:
    """The measured plans of one choice, while the other choices of the program stayed the same.

    Attributes:
      choice: the choice that the cost model or the table in use had made.
      seconds: median time of the whole program with each plan, in seconds, by name of the plan.
    """

    choice: Choice
    seconds: dict[str, float]

    @property
    def best(self) -> str:
        """Name of the fastest plan."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def loss(self) -> float:
        """Time with the picked plan, divided by the time with the fastest plan."""
        return self.seconds[self.choice.plan] / self.seconds[self.best]


def time_choices(
    trace: Callable[[], Any],
    compile: Callable[[], Run],
    clock: Callable[[Sequence[Run]], Sequence[float]],
) -> list[PlanTimes]:
    """Times the plans of every operator of a program for which there are several.

    What is timed is always the whole program and never an operator by itself, because XLA compiles
    an operator differently in different surroundings. Plans that a configuration forces are not
    changed.

    Args:
      trace: function that traces the program, so that its choices are made.
      compile: function that compiles the program anew, with the tables in use, and returns a
        function that runs it.
      clock: function that runs several such functions in turn and returns the seconds of each.

    Returns:
      The times of each choice for which more than one plan was worth timing.
    """
    with recorded() as chosen:
        trace()
    # One of two operators with the same problem may be forced: the other is still tuned.
    free = {(each.operator, each.problem): each for each in chosen if not each.is_forced}
    device = jax.devices()[0].device_kind
    results = []
    for problem, picked in free.items():
        limit = _HOPELESS * min(picked.costs.values())
        candidates = [plan for plan, cost in picked.costs.items() if cost <= limit]
        if len(candidates) < 2:
            continue
        runs = []
        for plan in candidates:
            with use(PlanTable(device, {problem: plan})):
                runs.append(compile())
        results.append(PlanTimes(picked, dict(zip(candidates, clock(runs), strict=True))))
    return results
