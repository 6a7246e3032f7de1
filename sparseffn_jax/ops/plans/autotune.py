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
    """The measured plans of one choice; the others of the program are what they were.

    Attributes:
      choice: what the cost model or the table in use had picked.
      seconds: median time of the whole program, by plan.
    """

    choice: Choice
    seconds: dict[str, float]

    @property
    def best(self) -> str:
        """The fastest plan."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def loss(self) -> float:
        """Time with the picked plan over time with the best one."""
        return self.seconds[self.choice.plan] / self.seconds[self.best]


def time_choices(
    trace: Callable[[], Any],
    compile: Callable[[], Run],
    clock: Callable[[Sequence[Run]], Sequence[float]],
) -> list[PlanTimes]:
    """Times the plans of every operator in a program that has more than one.

    Always the whole program is timed, never an operator by itself: what surrounds it decides what
    XLA makes of it. Plans that a configuration forces stay.

    Args:
      trace: traces the program, so that its choices are made.
      compile: compiles the program anew, by the tables in use, and returns what runs it.
      clock: seconds of each of several runs, taken in turn.
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
