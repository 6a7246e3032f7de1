"""What a compiled program does, kernel by kernel, read from its text.

XLA's own ``cost_analysis`` counts the body of a loop once, whatever its trip count, and is empty
for a program that was compiled for a device that is not there. Here loops count as often as they
run, and each kernel has its operations, its bytes, and the program's inputs that it only copies.
The text is that of the program after all of XLA's passes.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sparseffn_jax.measure.flops import FlopCount, KernelCall
from sparseffn_jax.measure.hlo import Computation, Instruction, parse
from sparseffn_jax.measure.memory import ProgramMemory, memory_of

# What has no kernel of its own.
_FREE = frozenset(
    (
        *("add-dependency", "after-all", "bitcast", "constant", "get-tuple-element"),
        *("opt-barrier", "parameter", "partition-id", "replica-id", "tuple"),
        "async-update",
    )
)
# What puts numbers into other places or forms, and computes nothing.
_MOVES = frozenset(
    (
        *("broadcast", "concatenate", "convert", "copy", "dynamic-slice", "dynamic-update-slice"),
        *("gather", "iota", "pad", "reshape", "reverse", "slice", "transpose"),
    )
)
# One operation for every number that comes out, transcendental functions included.
_ELEMENTWISE = frozenset(
    (
        *("abs", "add", "atan2", "cbrt", "ceil", "clamp", "cosine", "divide", "erf"),
        *("exponential", "exponential-minus-one", "floor", "log", "log-plus-one", "logistic"),
        *("maximum", "minimum", "multiply", "negate", "power", "remainder"),
        *("round-nearest-afz", "round-nearest-even", "rsqrt", "sign", "sine", "sqrt", "subtract"),
        *("tan", "tanh"),
    )
)
_COLLECTIVES = frozenset(
    (
        *("all-gather", "all-reduce", "all-to-all", "collective-broadcast"),
        *("collective-permute", "ragged-all-to-all", "reduce-scatter"),
    )
)
# Calls of kernels that were written in Pallas for Triton, by older and newer versions of JAX.
TRITON = frozenset(("__gpu$xla.gpu.triton", "triton_kernel_call_ffi"))
_SLICES = frozenset(("dynamic-slice", "gather", "slice"))
_FLOATS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}


class Kernel(NamedTuple):
    """One kernel, copy or collective of a program.

    Attributes:
      name: its name in the program.
      kind: what it is: ``"fusion"``, the name of an operation, or a library call's target.
      scope: where in the source it comes from, as JAX names it; empty if the program does not say.
      times: how often it runs.
      dtype: dtype of its matrix products; empty if it has none.
      matrix_flops: floating-point operations of its matrix products in one run.
      other_flops: all other floating-point operations of one run.
      bytes_read: bytes of memory that one run reads.
      bytes_written: bytes of memory that one run writes.
      inputs_moved: bytes of the program's inputs that one run writes elsewhere, or in another form,
        and does nothing else with: a weight that is copied.
      is_collective: whether it moves its bytes between devices.
    """

    name: str
    kind: str
    scope: str
    times: int
    dtype: str
    matrix_flops: int
    other_flops: int
    bytes_read: int
    bytes_written: int
    inputs_moved: int
    is_collective: bool

    @property
    def bytes_moved(self) -> int:
        """Bytes of memory that one run reads or writes."""
        return self.bytes_read + self.bytes_written

    @property
    def bytes_sent(self) -> int:
        """Bytes that a device sends in one run of a collective among many, as in a ring."""
        if self.kind == "all-reduce":
            return 2 * self.bytes_written
        return self.bytes_read if self.kind == "reduce-scatter" else self.bytes_written


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      kernels: its kernels in the order in which they run; those of a loop's body once.
      memory: the memory that it needs on its device.
    """

    kernels: tuple[Kernel, ...]
    memory: ProgramMemory

    @property
    def launches(self) -> int:
        """How many kernels run in all."""
        return sum(kernel.times for kernel in self.kernels)

    @property
    def flops(self) -> int:
        """Floating-point operations of all runs of all kernels."""
        return sum(k.times * (k.matrix_flops + k.other_flops) for k in self.kernels)

    @property
    def bytes_moved(self) -> int:
        """Bytes of memory that all runs of all kernels read or write, without collectives'."""
        return sum(k.times * k.bytes_moved for k in self.kernels if not k.is_collective)

    @property
    def inputs_moved(self) -> int:
        """Bytes of inputs that are copied, in all runs of all kernels."""
        return sum(kernel.times * kernel.inputs_moved for kernel in self.kernels)

    @property
    def collective_bytes(self) -> dict[str, int]:
        """Bytes that a device sends in all runs, by the kind of the collective."""
        total: dict[str, int] = collections.Counter()
        for kernel in self.kernels:
            if kernel.is_collective:
                total[kernel.kind] += kernel.times * kernel.bytes_sent
        return dict(total)


def read_program(compiled: Any, counts: Mapping[KernelCall, FlopCount] | None = None) -> Program:
    """Reads what a compiled program does.

    Args:
      compiled: what ``jax.jit(...).lower(...).compile()`` returns.
      counts: operations of Pallas kernels, as
        :func:`~sparseffn_jax.measure.flops.count_kernels` returns them.
    """
    return Program(tuple(read_kernels(compiled.as_text(), counts)), memory_of(compiled))


def read_kernels(text: str, counts: Mapping[KernelCall, FlopCount] | None = None) -> list[Kernel]:
    """Reads the kernels of a program from its text.

    Kernels that were written by hand (Pallas, or another library's) do not say in it how many
    operations they have; only those of matrix products by cuBLAS are known from the text.

    Args:
      text: HLO as XLA prints it.
      counts: operations of Pallas kernels, as
        :func:`~sparseffn_jax.measure.flops.count_kernels` returns them.

    Raises:
      ValueError: if the text is no program.
    """
    computations, entry = parse(text)
    if entry is None:
        raise ValueError("the text has no ENTRY: it is not the HLO of a program")
    origins = {i.name: i.name for i in entry.instructions.values() if i.opcode == "parameter"}
    return list(_Walk(computations, counts or {}).kernels(entry, origins, 1))


# A tuple's origins are a list.
_Origin = str | list[Any] | None


class _Walk:
    """Goes through a program's computations in the order in which they run."""

    def __init__(
        self,
        computations: Mapping[str, Computation],
        counts: Mapping[KernelCall, FlopCount],
    ):
        self._computations = computations
        self._counts = counts

    def kernels(
        self, computation: Computation, origins: Mapping[str, _Origin], times: int
    ) -> Iterator[Kernel]:
        """Yields the kernels of a computation.

        Args:
          computation: the computation.
          origins: for the names of its parameters, the program's input that they are.
          times: how often the computation runs.
        """
        known: dict[str, _Origin] = dict(origins)
        for i in computation.instructions.values():
            given = [known.get(name) for name in i.operands]
            if i.opcode == "get-tuple-element" and isinstance(given[0], list):
                known[i.name] = given[0][i.numbers("index")[0]]
            elif i.opcode == "tuple":
                known[i.name] = given
            elif i.opcode in ("bitcast", "opt-barrier"):
                known[i.name] = given[0]
            yield from self._of(i, computation, known, given, times)

    def _of(
        self,
        i: Instruction,
        computation: Computation,
        known: dict[str, _Origin],
        given: list[_Origin],
        times: int,
    ) -> Iterator[Kernel]:
        if i.opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
            body = self._called(i, "body")
            state = self._invariant(body, given[0])
            # XLA counts turns on the host where it knows how many there are.
            for inner in [body] if trips else [self._called(i, "condition"), body]:
                (parameter,) = inner.parameters()
                turns = int(trips.group(1)) if trips else 1
                yield from self.kernels(inner, {parameter.name: state}, times * turns)
            known[i.name] = state
        elif i.opcode == "conditional":
            names = i.names("branch_computations") or [
                name.lstrip("%")
                for name in (i.attribute("true_computation"), i.attribute("false_computation"))
            ]
            branches = []
            for name, origin in zip(names, given[1:], strict=True):
                inner = self._computations[name]
                (parameter,) = inner.parameters()
                branches.append(list(self.kernels(inner, {parameter.name: origin}, times)))
            # Which one runs is not known: the one that moves most.
            yield from max(branches, key=lambda branch: sum(k.bytes_moved for k in branch))
        elif i.opcode in ("call", "async-start"):
            inner = self._called(i, "to_apply" if i.opcode == "call" else "calls")
            names = [parameter.name for parameter in inner.parameters()]
            yield from self.kernels(inner, dict(zip(names, given, strict=True)), times)
        elif i.opcode not in _FREE and not i.opcode.endswith("-done"):
            yield self._kernel(i, computation, given, times)

    def _called(self, i: Instruction, attribute: str) -> Computation:
        return self._computations[i.attribute(attribute).lstrip("%")]

    def _invariant(self, body: Computation, given: _Origin) -> _Origin:
        """Returns the origins of those of a loop's values that every turn hands on as they are."""
        if not isinstance(given, list):
            return None
        root = body.instructions[body.root]
        (parameter,) = body.parameters()

        def stays(index: int, name: str) -> bool:
            i = body.instructions[name]
            return (
                i.opcode == "get-tuple-element"
                and i.operands == (parameter.name,)
                and i.numbers("index") == [index]
            )

        return [
            origin if stays(index, name) else None
            for index, (origin, name) in enumerate(zip(given, root.operands, strict=True))
        ]

    def _kernel(
        self, i: Instruction, computation: Computation, given: Sequence[_Origin], times: int
    ) -> Kernel:
        kind = i.opcode.removesuffix("-start")
        is_fusion = kind == "fusion"
        whole = self._called(i, "calls") if is_fusion else _wrapped(i, computation)
        reads = [_bytes_read(whole, parameter) for parameter in whole.parameters()]
        written = _bytes_written(whole)
        if kind == "custom-call":
            kind = i.attribute("custom_call_target").strip('"')
            # The second result is scratch memory.
            written = i.arrays[0].nbytes if "cublas" in kind else written
        is_collective = kind in _COLLECTIVES
        if i.opcode in ("all-gather-start", "collective-permute-start"):
            # Operands stand before results.
            written = sum(array.nbytes for array in i.arrays[len(i.arrays) // 2 :])
        matrix, other, dtype = self._flops(whole)
        if kind in TRITON:
            matrix, other, dtype = self._handwritten(i, computation)
        only_moves = all(
            inner.opcode in _MOVES or inner.opcode in _FREE for inner in whole.instructions.values()
        )
        moved = [size for size, origin in zip(reads, given, strict=True) if origin is not None]
        scope = re.search(r'op_name="([^"]*)"', i.attributes)
        return Kernel(
            i.name,
            kind,
            scope[1] if scope else "",
            times,
            dtype,
            matrix,
            other,
            sum(reads),
            written,
            sum(moved) if only_moves else 0,
            is_collective,
        )

    def _handwritten(self, i: Instruction, computation: Computation) -> tuple[int, int, str]:
        """Returns what :meth:`_flops` does, of a Pallas kernel; zeros if its count is missing."""
        operands = [computation.instructions[name].arrays[0] for name in i.operands]
        name = re.search(r'name = "([^"]*)"', i.attributes)
        shapes = tuple(tuple(operand.shape) for operand in operands)
        count = self._counts.get((name[1] if name else "", shapes), FlopCount())
        dtype = _FLOATS.get(operands[0].dtype, operands[0].dtype) if count.dot else ""
        return count.dot, count.elementwise, dtype

    def _flops(self, computation: Computation) -> tuple[int, int, str]:
        """Returns operations of matrix products and others, and the products' dtype."""
        matrix, other, dtype = 0, 0, ""
        for i in computation.instructions.values():
            product = _product_flops(i, computation)
            if product:
                matrix += product
                operand = computation.instructions[i.operands[0]].arrays[0]
                dtype = _FLOATS.get(operand.dtype, operand.dtype)
            elif i.opcode == "fusion":
                inner = self._flops(self._called(i, "calls"))
                matrix, other, dtype = matrix + inner[0], other + inner[1], inner[2] or dtype
            else:
                other += _other_flops(i, computation)
        return matrix, other, dtype


def _product_flops(i: Instruction, computation: Computation) -> int:
    """Returns the operations of a matrix product; a multiply-add counts as two."""
    if i.opcode == "dot":
        contracted = i.numbers("lhs_contracting_dims")
    elif i.opcode == "custom-call" and "cublas" in i.attributes:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
        contracted = [int(number) for number in re.findall(r"\d+", found[1] if found else "")]
    else:
        return 0
    left = computation.instructions[i.operands[0]].arrays[0].shape
    return 2 * i.arrays[0].size * math.prod(left[axis] for axis in contracted)


def _other_flops(i: Instruction, computation: Computation) -> int:
    if i.opcode == "fft":
        # Half of 5 N log2(N), as of a transform with real inputs or outputs.
        length = math.prod(i.numbers("fft_length"))
        source = computation.instructions[i.operands[0]].arrays[0]
        complete = source if "IRFFT" not in i.attributes else i.arrays[0]
        share = 5.0 if i.attribute("fft_type") in ("FFT", "IFFT") else 2.5
        return round(share * complete.size * math.log2(max(length, 2)))
    if i.opcode in ("reduce", "scatter"):
        source = computation.instructions[i.operands[0 if i.opcode == "reduce" else -1]]
        return source.arrays[0].size if source.arrays[0].dtype in _FLOATS else 0
    if i.opcode in _ELEMENTWISE and i.arrays[0].dtype in _FLOATS:
        return i.arrays[0].size
    return 0


def _bytes_read(computation: Computation, parameter: Instruction) -> int:
    """Returns how much of a parameter a kernel reads: of one that it only slices, the slices."""
    total = 0
    for user in computation.users(parameter.name):
        if user.opcode in ("bitcast", "copy") and user.name != computation.root:
            part = _bytes_read(computation, user)
        elif user.opcode in _SLICES and user.operands[0] == parameter.name:
            part = user.nbytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            # Written in place.
            part = 0
        else:
            return parameter.nbytes
        total += part
    return min(total, parameter.nbytes)


def _bytes_written(computation: Computation) -> int:
    root = computation.instructions[computation.root]
    results = [root]
    if root.opcode == "tuple":
        results = [computation.instructions[name] for name in root.operands]
    total = 0
    for result in results:
        origin = result
        while origin.opcode in ("bitcast", "copy") and origin.operands[0] in (
            computation.instructions
        ):
            origin = computation.instructions[origin.operands[0]]
        if origin.opcode == "dynamic-update-slice":
            origin = computation.instructions[origin.operands[1]]
            total += origin.nbytes
        else:
            total += result.nbytes
    return total


def _wrapped(i: Instruction, computation: Computation) -> Computation:
    """Returns an instruction outside any fusion as a fusion of its own."""
    operands = {}
    for index, name in enumerate(i.operands):
        given = computation.instructions[name]
        operands[f"{index}"] = Instruction(
            f"{index}", "parameter", given.arrays, (), f"{index}", ""
        )
    inner = i._replace(operands=tuple(operands), opcode=i.opcode.removesuffix("-start"))
    return Computation(operands | {i.name: inner}, i.name)
