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
    """

    compute_capability: str | None
    devices: int


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


def triton_refusal(capabilities: Collection[str], *, is_forced: bool = False) -> str | None:
    """Returns the reason why a Pallas kernel for Triton cannot run, or ``None`` if it can.

    Without a GPU here, programs are taken to be for one that the kernel suits.

    Args:
      capabilities: the compute capabilities that the kernel suits.
      is_forced: whether the user asks for the kernel: then it runs beside other devices too.
    """
    target = _target.get() or Target(_compute_capability(), jax.device_count())
    if triton() is None:
        return "this version of JAX has no Triton compiler for kernels"
    if target.compute_capability not in (None, *capabilities):
        return (
            f"it needs a GPU of compute capability {' or '.join(capabilities)}, not "
            f"{target.compute_capability}"
        )
    if target.devices > 1 and not is_forced:
        # The partitioner cannot divide such a kernel among them.
        return "there are several devices"
    return None


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
