"""Memory of compiled programs, what a device has left, and whether the one fits the other."""

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import psutil


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """The memory that a compiled program needs on its device, as XLA has assigned its buffers.

    Attributes:
      temporary: bytes of buffers that live inside the program, such as activations.
      arguments: bytes of the inputs.
      outputs: bytes of the results.
      aliased: bytes of the results that reuse the buffers of donated arguments.
    """

    temporary: int
    arguments: int
    outputs: int
    aliased: int

    @property
    def total(self) -> int:
        """Bytes of all buffers that are alive while the program runs."""
        return self.temporary + self.arguments + self.outputs - self.aliased


def program_memory(
    function: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
) -> ProgramMemory:
    """Compiles ``function`` for the default device, without running it, and returns its memory.

    Args:
      function: any JAX function; with ``jax.grad`` around a loss, the temporary bytes include the
        activations that are stored for the backward pass.
      *args: positional arguments; ``jax.ShapeDtypeStruct`` may stand for arrays.
      donate_argnums: numbers of the arguments whose buffers the results may reuse, as for
        ``jax.jit``.
    """
    compiled = jax.jit(function, donate_argnums=donate_argnums).lower(*args).compile()
    return memory_of(compiled)


def memory_of(compiled: Any) -> ProgramMemory:
    """Returns the memory of a program that is compiled already, on one of its devices.

    Args:
      compiled: what ``jax.jit(...).lower(...).compile()`` returns.
    """
    analysis = compiled.memory_analysis()
    return ProgramMemory(
        temporary=analysis.temp_size_in_bytes,
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
    )


def free_bytes(device: Any = None) -> int | None:
    """Returns how many bytes a device has left for new arrays.

    Args:
      device: a ``jax.Device``; ``None`` takes the default device. A CPU has the host's memory.

    Returns:
      The number of bytes, or ``None`` where the device's allocator does not say.
    """
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return free_host_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def free_host_bytes() -> int:
    """Returns how many bytes of memory the machine can give without swapping."""
    return psutil.virtual_memory().available


def trim_heap() -> None:
    """Gives freed host memory back to the operating system, where the C library is glibc.

    glibc keeps freed blocks of up to 32 MiB for later; between two stages that need blocks of
    different sizes this can be as much as the stages themselves need.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def program_shortage(compiled: Any, what: str) -> str | None:
    """Returns what memory a program lacks, before it runs, or ``None`` if it lacks none.

    The arguments are taken to be in memory already. Devices of one kind are taken to be alike.

    Args:
      compiled: the program, as ``jax.jit(...).lower(...).compile()`` returns it.
      what: what the program does.
    """
    device = compiled.runtime_executable().local_devices()[0]
    return shortage(needed_bytes(compiled), free_bytes(device), what)


def needed_bytes(compiled: Any) -> int:
    """Returns how many bytes of its device a program needs beside its arguments.

    Args:
      compiled: the program, as ``jax.jit(...).lower(...).compile()`` returns it. Of a CPU, whose
        devices share its memory, all of them count.
    """
    memory = memory_of(compiled)
    devices = compiled.runtime_executable().local_devices()
    copies = len(devices) if devices[0].platform == "cpu" else 1
    return copies * (memory.total - memory.arguments)


def shortage(needed: int, free: int | None, what: str) -> str | None:
    """Returns how many bytes are needed and how many are free, or ``None`` if they suffice.

    Args:
      needed: number of bytes that are needed.
      free: number of bytes that are left; ``None``, if it is not known, suffices.
      what: what needs them.
    """
    if free is None or needed <= free:
        return None
    return (
        f"{what} needs {needed / 2**30:.2f} GiB beside what is loaded, but "
        f"{free / 2**30:.2f} GiB are free"
    )


def less_memory(needed: Mapping[str, int]) -> str:
    """Says which settings would need how much where there is a :func:`shortage`.

    Args:
      needed: bytes that are needed with each setting in place of the one that there is.
    """
    if not needed:
        return "nothing is left to be made smaller"
    figures = [f"{setting} would need {size / 2**30:.2f} GiB" for setting, size in needed.items()]
    return ", ".join(figures)


def halves(
    windows: int, tokens: int, cut: Callable[[int, int], tuple[Any, ...]]
) -> dict[str, tuple[Any, ...]]:
    """Returns arguments for half of the batch, and for half of the window, by their settings.

    Args:
      windows: number of windows in the batch; one cannot be halved.
      tokens: number of tokens in a window; one cannot be halved.
      cut: function that returns the arguments for so many windows of so many tokens.
    """
    smaller = {}
    if windows > 1:
        smaller[f"batch_size={windows // 2}"] = cut(windows // 2, tokens)
    if tokens > 1:
        smaller[f"window={tokens // 2}"] = cut(windows, tokens // 2)
    return smaller


class CheckedJit:
    """A jitted function that, before its first run in each shape, checks that its memory suffices.

    Args:
      function: the function to compile; all its arguments are arrays or trees of them.
      what: what it does, for the message.
      smaller: function of the same arguments that returns smaller ones, each by the setting that
        makes them so; the message says how much memory they would need.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        what: str,
        smaller: Callable[..., Mapping[str, tuple[Any, ...]]],
    ):
        self._function = jax.jit(function)
        self._what, self._smaller = what, smaller
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        """Returns ``function(*args)``.

        Raises:
          MemoryError: if the memory does not suffice.
        """
        leaves, structure = jax.tree.flatten(args)
        key = structure, *map(_kind, leaves)
        if key not in self._compiled:
            self._compiled[key] = self._checked(args)
        return self._compiled[key](*args)

    def _checked(self, args: tuple[Any, ...]) -> Any:
        compiled = self._function.lower(*args).compile()
        if lacking := program_shortage(compiled, self._what):
            needed = {
                setting: needed_bytes(self._function.lower(*less).compile())
                for setting, less in self._smaller(*args).items()
            }
            raise MemoryError(f"{lacking}: {less_memory(needed)}")
        return compiled


def _kind(leaf: Any) -> tuple[Any, ...]:
    return jax.numpy.shape(leaf), jax.dtypes.result_type(leaf), getattr(leaf, "sharding", None)


def peak_device_bytes(device: Any = None) -> int | None:
    """Returns the most bytes in use at once on a device since the process began.

    Args:
      device: a ``jax.Device``; ``None`` takes the default device.

    Returns:
      The allocator's count of bytes, or ``None`` where it keeps no count, as on CPU.
    """
    stats = (device or jax.devices()[0]).memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")
