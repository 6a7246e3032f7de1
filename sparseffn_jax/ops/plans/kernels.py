"""Whether kernels that are written by hand can run in the program that is being traced."""

import contextlib
import contextvars
import functools
import importlib
import warnings
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """What a program is compiled for.

    Attributes:
      compute_capability: that of the NVIDIA GPU, such as ``"9.0"``; ``None`` if it is not known.
      devices: number of devices that may share the program.
      parts: list that takes the jaxprs of kernels as each device runs them, once the program is
        compiled for several.
    """

    compute_capability: str | None
    devices: int
    parts: list[Any]


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Says what the programs that are traced inside the block are for, if not for this machine.

    Args:
      target: the GPU, which need not be here, and how many of them.
    """
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def devices() -> int:
    """Returns how many devices may share the program that is being traced."""
    return target.devices if (target := _target.get()) else jax.device_count()


def triton_refusal(capabilities: Collection[str]) -> str | None:
    """Returns the reason why a Pallas kernel for Triton cannot run, or ``None`` if it can.

    Without a GPU here, programs are taken to be for one that the kernel suits.

    Args:
      capabilities: the compute capabilities that the kernel suits.
    """
    target = _target.get()
    capability = target.compute_capability if target else _compute_capability()
    if triton() is None:
        return "this version of JAX has no Triton compiler for kernels"
    if capability not in (None, *capabilities):
        return f"it needs a GPU of compute capability {' or '.join(capabilities)}, not {capability}"
    return None


def parts() -> list[Any] | None:
    """Returns the list that takes the parts of divided kernels, if they are asked for."""
    return target.parts if (target := _target.get()) else None


def is_for_a_gpu() -> bool:
    """Returns whether the program that is being traced is for a GPU, here or elsewhere."""
    return _target.get() is not None or jax.default_backend() == "gpu"


def is_for_this_gpu() -> bool:
    """Returns whether the program that is being traced is for a GPU of this machine."""
    return _target.get() is None and jax.default_backend() == "gpu"


@functools.cache
def triton() -> Any:
    """Returns ``jax.experimental.pallas.triton``, or ``None``: JAX means to remove it one day."""
    try:
        module = pallas_module("triton")
        pallas_module("ops.gpu.attention")
    except ImportError:
        return None
    # JAX 0.6 has it under another name.
    return module if hasattr(module, "CompilerParams") else None


def pallas_module(name: str) -> Any:
    """Imports a module of ``jax.experimental.pallas`` that JAX calls deprecated.

    Args:
      name: its name within Pallas.

    Raises:
      ImportError: if this version of JAX no longer has it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"jax.experimental.pallas.{name}")


def _compute_capability() -> str | None:
    try:
        return jax.local_devices(backend="gpu")[0].compute_capability
    except RuntimeError:
        return None
