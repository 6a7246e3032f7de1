"""Device time by part of a layer, from a profiler trace and the program's named scopes.

A trace names the HLO instruction behind every stretch of time, on CPU as on GPU, but not its named
scopes. The text of the compiled program names both, which allows time to be assigned to scopes. A
fusion belongs to the scope of its root.
"""

import dataclasses
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

# The parts of a SparseFFN, as nn/sparse_ffn.py names its scopes.
PARTS = (
    "spectral_up",
    "polynomial",
    "spectral_down",
    "spectral_bypass",
    "core",
    "core_and_bypass",
    "corrections",
)
OTHER = "other"
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = .*? (?P<opcode>[\w\-]+)\(.*?"
    r"(?:metadata=\{[^}]*?op_name=\"(?P<path>[^\"]*)\"|$)"
)
# Their time is that of the instructions inside them, which the trace lists as well.
_CONTAINERS = frozenset(("call", "conditional", "while"))


@dataclasses.dataclass(frozen=True)
class PartTimes:
    """Device time of one program, by part.

    Attributes:
      seconds: time of one run in seconds, by part, forward and backward pass together; the key
        ``"other"`` has the time that belongs to no part. On CPU the times of threads that work at
        once are added up.
    """

    seconds: dict[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the time that each part takes."""
        total = sum(self.seconds.values())
        return {part: seconds / total for part, seconds in self.seconds.items()}


def time_by_part(
    compiled: Any, *args: Any, parts: Sequence[str] = PARTS, repeats: int = 10
) -> PartTimes:
    """Runs a compiled program under the profiler and returns its device time by named scope.

    Args:
      compiled: the compiled program, ``jax.jit(f).lower(*args).compile()``.
      *args: arguments of the program.
      parts: names of scopes; an instruction inside several of them belongs to the innermost one.
      repeats: number of runs over which the time is averaged.

    Raises:
      ValueError: if the trace names no instruction of the program.
    """
    paths = instruction_paths(compiled.as_text())
    jax.block_until_ready(compiled(*args))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(compiled(*args))
        (file,) = Path(folder).rglob("*.xplane.pb")
        durations = list(_durations(jax.profiler.ProfileData.from_file(str(file)), set(paths)))
    if not durations:
        raise ValueError(
            "the trace names no instruction of this program: on a GPU, run without CUDA graphs "
            "(XLA_FLAGS=--xla_gpu_enable_command_buffer=), which hide what they replay"
        )
    seconds: dict[str, float] = defaultdict(float)
    for instruction, duration in durations:
        seconds[part_of(paths[instruction], parts)] += duration / repeats
    return PartTimes(dict(seconds))


def instruction_paths(hlo: str) -> dict[str, str]:
    """Returns the scope path of every instruction that takes time, by name of the instruction.

    Instructions that the compiler has added, such as copies, have an empty path.

    Args:
      hlo: text of a compiled program.
    """
    found = filter(None, map(_INSTRUCTION.match, hlo.splitlines()))
    return {
        match["name"]: match["path"] or "" for match in found if match["opcode"] not in _CONTAINERS
    }


def part_of(path: str, parts: Sequence[str]) -> str:
    """Returns the innermost of ``parts`` in a scope path, or ``"other"``.

    Transformations wrap scopes: the backward pass of ``core`` lies below ``transpose(jvp(core))``.
    """
    for scope in reversed(path.split("/")):
        if (name := re.sub(r"^(?:\w+\()*|\)*$", "", scope)) in parts:
            return name
    return OTHER


def _durations(trace: Any, instructions: set[str]) -> Iterator[tuple[str, float]]:
    """Yields (instruction, seconds) of every event that is one of the program's instructions."""
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                instruction = dict(event.stats).get("hlo_op")
                if instruction in instructions and not event.name.startswith("end: "):
                    yield instruction, event.duration_ns * 1e-9
