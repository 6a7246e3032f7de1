"""The text of a compiled program, HLO as XLA prints it: its computations and instructions.

The format is described at https://openxla.org/xla/operation_semantics.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

# Bits of a number; of both parts together of a complex one, as in "c64".
_BITS = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%([\w.\-]+) = (.*)$")


class Array(NamedTuple):
    """The dtype, as HLO names it, and the shape of one array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        if self.dtype in ("token", "opaque"):
            return 0
        found = _BITS.match(self.dtype)
        return -(-self.size * int(found[1] if found else 8) // 8)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: its name.
      opcode: the operation.
      arrays: its results.
      operands: names of its operands.
      inside: the text between the operation's parentheses.
      attributes: the text behind them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str

    @property
    def nbytes(self) -> int:
        """Number of bytes of all results."""
        return sum(array.nbytes for array in self.arrays)

    def attribute(self, name: str) -> str:
        """Returns the names or numbers behind ``name=``, in braces or not; empty without it."""
        found = re.search(rf"\b{name}=(?:\{{([^{{}}]*)\}}|([^,\s]+))", self.attributes)
        return (found[1] or found[2] or "") if found else ""

    def names(self, name: str) -> list[str]:
        """Returns the names of computations behind ``name=``."""
        return _NAME.findall(self.attribute(name))

    def numbers(self, name: str) -> list[int]:
        """Returns the numbers behind ``name=``."""
        return [int(number) for number in re.findall(r"\d+", self.attribute(name))]


class Computation(NamedTuple):
    """A computation's instructions by their names, and the name of the one that is its result."""

    instructions: Mapping[str, Instruction]
    root: str

    def users(self, name: str) -> list[Instruction]:
        """Returns the instructions that take the result of another."""
        return [i for i in self.instructions.values() if name in i.operands]

    def parameters(self) -> list[Instruction]:
        """Returns the parameters in their order."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.inside))


def parse(text: str) -> tuple[dict[str, Computation], Computation | None]:
    """Returns the computations by their names, and the program's own, ``None`` if it has none."""
    computations: dict[str, Computation] = {}
    entry, name, instructions, root, is_entry = None, "", {}, "", False
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, instructions, root = header[2], {}, ""
            is_entry = header[1] is not None
        elif line == "}" and name:
            computations[name] = Computation(instructions, root)
            entry = computations[name] if is_entry else entry
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            instructions[found[2]] = _instruction(found[2], found[3])
            root = found[2] if found[1] else root
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """Parses ``type opcode(operands), attributes``."""
    end = _closing(text) if text.startswith("(") else text.index(" ") - 1
    kind, rest = text[: end + 1], text[end + 1 :].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    inside = rest[:end]
    arrays = tuple(
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(kind)
    )
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(name, opcode, arrays, operands, inside, rest[end + 1 :])


def _closing(text: str) -> int:
    """Returns where the parenthesis is closed with which a text begins."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return at
    raise ValueError(f"{text[:80]!r} has no closing parenthesis: the program's text is cut off")
