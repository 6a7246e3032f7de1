"""Memory of compiled programs, and the peak memory of a device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


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
    analysis: Any = compiled.memory_analysis()
    return ProgramMemory(
        temporary=analysis.temp_size_in_bytes,
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
    )


def peak_device_bytes(device: Any = None) -> int | None:
    """Returns the most bytes in use at once on a device since the process began.

    Args:
      device: a ``jax.Device``; ``None`` takes the default device.

    Returns:
      The allocator's count of bytes, or ``None`` where it keeps no count, as on CPU.
    """
    stats = (device or jax.devices()[0]).memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")
