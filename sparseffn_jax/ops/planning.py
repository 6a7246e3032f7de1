"""Which plan runs an operator: a cost model, tables of measured plans, a forced choice's check."""

import contextlib
import contextvars
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax

# A plan's cost is counted in multiply-adds of a large GEMM. What follows are the handicaps that
# other kinds of work carry, as measured on CPU; only their order of magnitude matters.
_GATHERED_GEMM = 4.2
_SMALL_GEMM = 1.2
_SPLIT_GEMM = 2.0
_COMPLEX_GEMM = 9.0
# What it costs to take one number through a transform, mostly to memory and back, and to lay one
# weight out for its frequency's GEMM.
_FFT = 150.0
_TRANSFORM = 80.0
_LAYOUT = 40.0
# What it costs to add one product of a block row to others, to lay one activation beside others for
# a block column's GEMM, and to put one weight into its place among the zeros of a dense matrix.
_ADDED, _LAID_BESIDE, _SCATTERED = 32.0, 120.0, 120.0
# What any operation costs: a task for the CPU's thread pool, a kernel's launch elsewhere.
_CALL, _LAUNCH = 2.4e5, 1e9
# Bytes of hidden activations that a tile of tokens may have: what the cores' own caches hold while
# the operations on them are still large enough to spread over the cores.
_TILE_BYTES = {"klt": 6 << 20, "dft": 3 << 20, "block_sparse": 3 << 20}

Problem = tuple[int | str | bool, ...]
# How operators lay their weights out for a plan: called with a name and the function that does it,
# returns what that gives, or what it gave before. Only the caller knows whether weights change.
LayOut = Callable[[str, Callable[[], Any]], Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One plan that was picked.

    Attributes:
      operator: whose plan it is.
      problem: the shapes and dtype that it was picked for.
      plan: the plan.
      costs: estimate for every plan that could have run, in multiply-adds of a large GEMM.
    """

    operator: str
    problem: Problem
    plan: str
    costs: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class PlanTable:
    """The fastest plans as measured on one kind of device; a value to save, load and :func:`use`.

    Attributes:
      device: kind of device that they were measured on.
      plans: by operator and problem.
    """

    device: str
    plans: Mapping[tuple[str, Problem], str] = dataclasses.field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON."""
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
          ValueError: if the file is not one.
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
_table: contextvars.ContextVar[PlanTable | None] = contextvars.ContextVar("table", default=None)


def lay_out_anew(name: str, make: Callable[[], Any]) -> Any:
    """The :data:`LayOut` of weights that may change from call to call."""
    del name
    return make()


def pick(
    operator: str,
    implementation: str | None,
    costs: Mapping[str, float],
    refused: Mapping[str, str] | None = None,
    problem: Problem = (),
) -> str:
    """Returns the plan to run: the forced one, or the one measured to be best, or the cheapest.

    Args:
      operator: name for the error message.
      implementation: a plan's name, or ``None`` to choose.
      costs: estimated cost of every plan that can run here.
      refused: why each of the other plans cannot run here.
      problem: shapes and dtype, to look up in the :class:`PlanTable` that is in use.

    Raises:
      ValueError: if the forced plan is unknown or cannot run here; the message says why.
    """
    refused = refused or {}
    if implementation is None:
        cheapest, table = min(costs, key=costs.__getitem__), _table.get()
        plan = cheapest if table is None else table.plans.get((operator, problem), cheapest)
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
        recording.append(Choice(operator, problem, plan, costs))
    return plan


@contextlib.contextmanager
def use(table: PlanTable) -> Iterator[None]:
    """Makes ``implementation=None`` follow a table inside the block, where it knows the problem.

    Plans are picked while a program is traced: what was jitted and run before stays as it is.

    Raises:
      ValueError: if the table was measured on another kind of device.
    """
    device = jax.devices()[0].device_kind
    if table.device != device:
        raise ValueError(
            f"the plans were measured on {table.device!r}, this is {device!r}: measure them here"
        )
    token = _table.set(table)
    try:
        yield
    finally:
        _table.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[list[Choice]]:
    """Yields a list that every choice made inside the block is appended to.

    Plans are picked while a program is traced, so ``jax.eval_shape`` of it is enough.
    """
    picked: list[Choice] = []
    token = _recording.set(picked)
    try:
        yield picked
    finally:
        _recording.reset(token)


def klt_costs(tokens: int, d_in: int, rank: int, d_out: int) -> dict[str, float]:
    """Estimates the plans of the klt map ``(x U) K``, in multiply-adds."""
    return {
        "two_gemms": tokens * rank * (d_in + d_out),
        "merged": (tokens + rank) * d_in * d_out,
    }


def block_circulant_costs(
    tokens: int, p: int, q: int, block_size: int, components: int, products: int
) -> dict[str, float]:
    """Estimates the plans of the block-circulant map, in multiply-adds.

    Args:
      tokens: rows of the input.
      p: circulant blocks along the input.
      q: circulant blocks along the output.
      block_size: b, the side of a block.
      components: real components kept of a block's b.
      products: real products for one entry of the filter, summed over kept frequencies.
    """
    d_in, d_out = p * block_size, q * block_size
    transforms = tokens * (d_in + d_out) * (_TRANSFORM + components)
    return {
        "dft": _SMALL_GEMM * tokens * p * q * products + transforms + _LAYOUT * p * q * products,
        "split": _SPLIT_GEMM * tokens * p * q * products + 2 * transforms,
        "fft": tokens * (_COMPLEX_GEMM * p * q * products + _FFT * (d_in + d_out)),
        "dense": (tokens + components) * d_in * d_out,
    }


def token_tile(operator: str, token_bytes: int) -> int | None:
    """Returns how many tokens to take at a time, or ``None`` for all of them.

    Args:
      operator: ``"klt"``, ``"dft"`` or ``"block_sparse"``.
      token_bytes: of one token's hidden activations.
    """
    if jax.default_backend() != "cpu":
        return None
    return max(16, _TILE_BYTES[operator] // token_bytes)


def block_sparse_costs(
    tokens: int,
    shape: tuple[int, int],
    block_shape: tuple[int, int],
    weights: int,
    live: tuple[int, int],
) -> dict[str, float]:
    """Estimates the plans of a block-sparse product, in multiply-adds.

    Args:
      tokens: rows of the input.
      shape: of the whole weight matrix.
      block_shape: of a block.
      weights: entries that the mask keeps.
      live: block rows and block columns with a living block.
    """
    full = shape[0] * shape[1]
    products, call = tokens * weights, _CALL if jax.default_backend() == "cpu" else _LAUNCH
    added, laid_beside = (products / side for side in block_shape)
    return {
        "slice": products,
        "rows": products + _ADDED * added + _LAYOUT * weights + call * live[0],
        "columns": products + _LAID_BESIDE * laid_beside + call * live[1],
        "gather": _GATHERED_GEMM * products,
        "masked": (tokens + _SCATTERED) * full,
    }
