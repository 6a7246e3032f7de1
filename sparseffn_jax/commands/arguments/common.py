"""What the arguments of several commands share."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from sparseffn_jax.checkpoints.folders import find_gguf, local_folder

Precision = Literal["float32", "bfloat16", "float16"]


def check_at_least(least: int, arguments: Any, *names: str) -> None:
    """Checks numbers that the user gave.

    Args:
      least: the smallest value that each may have; ``None`` may stand for a default.
      arguments: the object that has them.
      *names: their names.

    Raises:
      ValueError: if one is too small.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def check_share(name: str, value: float) -> None:
    """Checks a number from 0 to 1 that the user gave.

    Raises:
      ValueError: if it is none.
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} must lie between 0 and 1")


def check_models(*sources: str | None) -> None:
    """Checks names of models, as far as this machine can tell; ``None`` is none.

    Raises:
      CheckpointError: if one is neither a folder, a GGUF file nor a possible name on the hub.
    """
    for source in filter(None, sources):
        if find_gguf(source) is None:
            local_folder(source)


def check_files(files: Collection[Path | None]) -> None:
    """Checks that files that are to be read are there; ``None`` is none.

    Raises:
      FileNotFoundError: if one is not.
    """
    for path in filter(None, files):
        if not path.expanduser().is_file():
            raise FileNotFoundError(f"there is no file {path}")
