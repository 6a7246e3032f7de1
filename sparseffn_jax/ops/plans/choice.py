"""How a plan is picked: a forced name, a table of measured plans, or the cost model."""

import contextlib
import contextvars
import dataclasses
import json
import os
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax

from sparseffn_jax.ops.plans.costs import Platform

Problem = tuple[int | str | bool, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One plan that was picked.

    Attributes:
      operator: name of the operator.
      problem: the shapes and dtype that the plan was picked for.
      platform: the platform that it was picked for.
      plan: name of the plan.
      costs: estimate for every plan that could have run, in multiply-adds of a large GEMM.
      is_forced: whether the configuration named the plan.
    """

    operator: str
    problem: Problem
    platform: Platform
    plan: str
    costs: Mapping[str, float]
    is_forced: bool = False


@dataclasses.dataclass(frozen=True)
class PlanTable:
    """The fastest plans as measured on one kind of device.

    :func:`~sparseffn_jax.autotune` measures a table, and :func:`~sparseffn_jax.use_plans` follows
    it.

    Attributes:
      device: kind of the device that the plans were measured on, as JAX names it.
      plans: names of plans by ``(operator, problem)``, where a problem is a tuple of the shapes and
        the dtype.

    Example:
      >>> import tempfile
      >>> import sparseffn_jax as sf
      >>> table = sf.PlanTable("cpu", {("low_rank", (1, 64, 32, 128, "float32")): "merged"})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     table.save(f"{folder}/plans.json")
      ...     loaded = sf.PlanTable.load(f"{folder}/plans.json")
      >>> loaded == table
      True
    """

    device: str
    plans: Mapping[tuple[str, Problem], str] = dataclasses.field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to a file, as JSON."""
        rows = [
            {"operator": operator, "problem": problem, "plan": plan}
            for (operator, problem), plan in self.plans.items()
        ]
        text = json.dumps({"device": self.device, "plans": rows}, indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a table that :meth:`save` wrote.

        Raises:
          ValueError: if the file holds no such table.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            plans = {
                (row["operator"], tuple(row["problem"])): str(row["plan"])
                for row in values["plans"]
            }
            return cls(str(values["device"]), plans)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a table of plans: write one with sparseffn inspect --autotune"
            ) from error


_recording: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar(
    "recording", default=None
)
_refused: contextvars.ContextVar[Mapping[tuple[str, str], str]] = contextvars.ContextVar(
    "refused", default=types.MappingProxyType({})
)
_tables: contextvars.ContextVar[Mapping[Platform, PlanTable]] = contextvars.ContextVar(
    "tables", default=types.MappingProxyType({})
)


def pick(
    operator: str,
    implementation: str | None,
    costs: Mapping[str, float],
    refused: Mapping[str, str] | None = None,
    problem: Problem = (),
    platform: Platform = "cpu",
) -> str:
    """Returns the name of the plan to run.

    It is the forced plan if there is one, otherwise the plan that was measured to be fastest if the
    table in use knows the problem, and otherwise the plan with the lowest estimated cost.

    Args:
      operator: name of the operator.
      implementation: name of the plan to force, or ``None``.
      costs: estimated cost of every plan, in multiply-adds of a large GEMM.
      refused: the reason why each of the plans that cannot run here cannot; those that
        :func:`refusing` names are refused as well.
      problem: shapes and dtype, under which the :class:`PlanTable` in use may know a plan.
      platform: the platform that the program is compiled for.

    Raises:
      ValueError: if the forced plan is unknown or cannot run here; the message says why.
    """
    here = {name: why for (each, name), why in _refused.get().items() if each == operator}
    refused = {**(refused or {}), **here}
    costs = {name: cost for name, cost in costs.items() if name not in refused}
    if implementation is None:
        cheapest = min(costs, key=costs.__getitem__)
        measured = _tables.get().get(platform)
        plan = measured.plans.get((operator, problem), cheapest) if measured else cheapest
        plan = plan if plan in costs else cheapest
    elif implementation in refused:
        raise ValueError(
            f"{operator} cannot run as {implementation!r} here: {refused[implementation]}; "
            f"use one of {', '.join(costs)}, or None"
        )
    elif implementation not in costs:
        raise ValueError(
            f"{operator} has no plan {implementation!r}: use one of {', '.join(costs)}, or None"
        )
    else:
        plan = implementation
    if (recording := _recording.get()) is not None:
        forced = implementation is not None
        recording.append(Choice(operator, problem, platform, plan, costs, forced))
    return plan


def platform_of(tree: Any) -> Platform:
    """Returns the platform of the devices that a tree's arrays, or shapes with shardings, lie on.

    If no leaf has a device, it is the platform of the device that JAX would put the leaves on.
    """
    for leaf in jax.tree.leaves(tree):
        placed = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if placed is not None:
            return _platform(next(iter(placed.device_set)))
    return _platform(jax.devices()[0])


def _platform(device: Any) -> Platform:
    return "cpu" if device.platform == "cpu" else "gpu"


@contextlib.contextmanager
def use(table: PlanTable) -> Iterator[None]:
    """Lets operators follow a table of measured plans inside a ``with`` block.

    An operator whose plan the configuration does not force, and whose problem the table knows, then
    runs by the plan of the table. Plans are picked while a program is traced: a function that was
    jitted and run before the block keeps its plans.

    Args:
      table: plans that :func:`~sparseffn_jax.autotune` measured on this kind of device. In nested
        blocks the innermost table that knows a problem decides.

    Raises:
      ValueError: if the table was measured on another kind of device.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> branch = sf.SpectralConfig("low_rank", width=64, rank=32)
      >>> layer = sf.SparseFFN(sf.SparseFFNConfig(64, 128, spectral=branch))
      >>> x = jnp.ones((64, 64))
      >>> table = sf.autotune(layer.config, shapes=[64], repeats=1)
      >>> with sf.use_plans(table):
      ...     y, variables = layer.init_with_output(jax.random.key(0), x)
      >>> y.shape
      (64, 64)
    """
    device = jax.devices()[0]
    if table.device != device.device_kind:
        raise ValueError(
            f"the plans were measured on {table.device!r}, this is {device.device_kind!r}: "
            "measure them here"
        )
    platform, tables = _platform(device), _tables.get()
    if platform in tables:
        table = PlanTable(table.device, {**tables[platform].plans, **table.plans})
    token = _tables.set({**tables, platform: table})
    try:
        yield
    finally:
        _tables.reset(token)


@contextlib.contextmanager
def refusing(reasons: Mapping[tuple[str, str], str]) -> Iterator[None]:
    """Keeps operators from some of their plans in programs that are traced inside the block.

    Args:
      reasons: for the name of an operator and that of a plan, the reason why it cannot run.
    """
    token = _refused.set({**_refused.get(), **reasons})
    try:
        yield
    finally:
        _refused.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[list[Choice]]:
    """Yields a list of the choices for this machine's platform that are made inside the block.

    Plans are picked while a program is traced, so that ``jax.eval_shape`` of it is enough. The list
    is complete once the block has ended.
    """
    picked: list[Choice] = []
    token = _recording.set(picked)
    try:
        yield picked
    finally:
        _recording.reset(token)
        here = _platform(jax.devices()[0])
        picked[:] = [choice for choice in picked if choice.platform == here]


@contextlib.contextmanager
def using(path: Path | None) -> Iterator[None]:
    """Follows the table in a file inside the block, as :func:`use` does; ``None`` has no effect."""
    if path is None:
        yield
        return
    with use(PlanTable.load(path)):
        yield
