"""Memory of compiled programs, and the most that a device has held."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """What a compiled program needs on its device, in bytes, as XLA has assigned its buffers.

    Attributes:
      temporary: buffers that live inside the program: activations, and whatever else is not
        handed out.
      arguments: inputs.
      outputs: results.
      aliased: the part of the outputs that reuses donated arguments.
    """

    temporary: int
    arguments: int
    outputs: int
    aliased: int

    @property
    def total(self) -> int:
        """Everything that is alive while the program runs."""
        return self.temporary + self.arguments + self.outputs - self.aliased


def program_memory(
    function: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
) -> ProgramMemory:
    """Compiles ``function`` for the default device, without running it, and returns its memory.

    Args:
      function: any JAX function; with ``jax.grad`` around a loss the temporary bytes include what
        is stored for the backward pass.
      *args: arrays, or ``jax.ShapeDtypeStruct`` for them.
      donate_argnums: arguments whose buffers the results may reuse; see ``jax.jit``.
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
      device: a ``jax.Device``; the default one if ``None``.

    Returns:
      The allocator's count, or ``None`` where it keeps none, as on CPU.
    """
    stats = (device or jax.devices()[0]).memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")
