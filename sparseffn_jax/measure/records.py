"""Records of a measurement: its folder, its JSON file and the versions that it was taken with."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def check_folder(folder: Path) -> None:
    """Checks that a folder is there or can be made, and be written to, without touching anything.

    Raises:
      ValueError: if not.
    """
    path = folder.expanduser().absolute()
    there = next(ancestor for ancestor in (path, *path.parents) if ancestor.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write to {folder}: {there} is a file; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {folder}: Permission denied; give another")


def make_folder(folder: Path) -> None:
    """Makes a folder and checks, before any work is done, that results can be written to it.

    Raises:
      ValueError: if results cannot be written to the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".sparseffn-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; give another") from error


def write_json(path: Path, values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes indented JSON to ``path``; the file is written whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def versions() -> dict[str, str]:
    """Returns the device, the number of CPUs and the library versions of this process, by name."""
    import flax
    import jax
    import transformers

    return {
        "device": jax.devices()[0].device_kind,
        "cpu_count": str(os.cpu_count()),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "transformers": transformers.__version__,
    }
