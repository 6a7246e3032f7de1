"""Which folders are whole: a manifest with the SHA-256 of every file, written last.

A folder is *sealed* once its manifest has reached the disk, after all its other files. It is
*whole* while it holds exactly the files that its manifest names, with the contents they had then.
So a crash at any moment shows, and so does a file that is lost, cut short, swapped or changed.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from sparseffn_jax.checkpoints.folders import to_disk

_MANIFEST = "manifest.json"


def seal(folder: Path, label: str) -> None:
    """Writes the manifest of a folder whose files will not change any more.

    Args:
      folder: the folder to seal.
      label: says what the folder holds; a manifest with another label does not count.

    Raises:
      OSError: if a file cannot be read or brought to the disk.
    """
    digests = {}
    for file in _files(folder):
        # What is read back later must come from the disk.
        to_disk(file, uncache=True)
        digests[file.relative_to(folder).as_posix()] = _sha256(file)
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            to_disk(path)
    partial = folder / f"{_MANIFEST}.partial"
    partial.write_text(json.dumps({"label": label, "sha256": digests}, indent=1), encoding="utf-8")
    to_disk(partial)
    os.replace(partial, folder / _MANIFEST)
    to_disk(folder)
    to_disk(folder.parent)


def is_sealed(folder: Path) -> bool:
    """Says whether the folder has a manifest; only :func:`find_damage` compares its files."""
    return (folder / _MANIFEST).is_file()


def find_damage(folder: Path, label: str) -> str | None:
    """Reads all of a folder; returns what is wrong with it, or ``None`` if it is whole."""
    if not is_sealed(folder):
        return "it was not written to the end"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        digests = manifest["sha256"]
        if manifest["label"] != label:
            return f"it holds {manifest['label']}, not {label}"
        found = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
        if differing := sorted(digests.keys() ^ found.keys()):
            name = differing[0]
            return f"{name} is {'missing' if name in digests else 'not of it'}"
        for name, file in found.items():
            if _sha256(file) != digests[name]:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"it cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    return None


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path != folder / _MANIFEST:
            yield path


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
