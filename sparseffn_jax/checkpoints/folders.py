"""Finds a model's folder, here or on the hub, and replaces a folder or file as a whole."""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from sparseffn_jax.checkpoints.errors import CheckpointError

PathLike = str | os.PathLike[str]

SAFETENSORS = "model.safetensors"
MSGPACK = "flax_model.msgpack"
_MODEL = "the folder that holds it, or a .gguf file"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What the Hub shows of a model.
CARD = "README.md"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def find_gguf(source: PathLike) -> Path | None:
    """Returns the GGUF file that ``source`` names, or ``None`` if it names something else.

    Raises:
      CheckpointError: if there is no such file.
    """
    file = Path(source).expanduser()
    if file.suffix.lower() != ".gguf" or file.is_dir():
        return None
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}: expected a GGUF file of that name")
    return file


def local_folder(source: PathLike, instead: str = _MODEL) -> Path | None:
    """Returns a local folder, or ``None`` if ``source`` may be a name on the hub.

    Args:
      source: path or name.
      instead: what to give instead of a file, for the message.

    Raises:
      CheckpointError: if it is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give {instead}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name := os.fspath(source)):
        raise CheckpointError(f"there is no folder {name}")
    return None


def find_folder(source: PathLike) -> Path:
    """Returns a local folder, or downloads the model of that name and returns where it lies.

    Raises:
      CheckpointError: if there is neither.
    """
    return _find(source, "model", _MODEL, _download_model)


def find_adapter(source: PathLike) -> Path:
    """Returns a local folder, or downloads the adapter of that name and returns where it lies.

    Raises:
      CheckpointError: if there is neither, or it is not an adapter's.
    """
    folder = _find(
        source,
        "adapter",
        "the folder that holds it",
        lambda name: _download(name, ADAPTER_CONFIG, ADAPTER_WEIGHTS),
    )
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {ADAPTER_CONFIG}: give an adapter folder as peft's")
    return folder


def check_replaceable(
    folder: PathLike,
    overwrite: bool,
    sources: Collection[str] = (),
    holds: str = "config.json",
) -> None:
    """Checks that ``save_pretrained`` may write ``folder``, before the work that leads there.

    Args:
      folder: the folder to write.
      overwrite: whether a model that is there may be replaced.
      sources: names of models that are read, which must stay.
      holds: a file by which a folder is known to be one that may be replaced.

    Raises:
      CheckpointError: if something is there that must not be replaced.
    """
    target = Path(folder).expanduser()
    for source in sources:
        read = Path(source).expanduser().resolve()
        if target.resolve() in (read, *read.parents):
            raise CheckpointError(
                f"{target} holds the model that is read, {source}, and would be replaced: name "
                "another folder"
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file: name a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} is not empty, nothing was written: name another folder, or pass "
            "overwrite=True to replace it"
        )
    if not (target / holds).is_file():
        kind = "an adapter" if holds == ADAPTER_CONFIG else "a model"
        raise CheckpointError(
            f"{target} is not {kind} folder (it has no {holds}) and will not be replaced: name "
            "another one"
        )


def check_new_file(file: PathLike, overwrite: bool, sources: Collection[str] = ()) -> None:
    """Checks that a file may be written, before the work that leads there.

    Args:
      file: the file to write.
      overwrite: whether a file that is there may be replaced.
      sources: names of models that are read, which must stay.

    Raises:
      CheckpointError: if something is there that must not be replaced.
    """
    target = Path(file).expanduser()
    if any(target.resolve() == Path(source).expanduser().resolve() for source in sources):
        raise CheckpointError(f"{target} is the model that is read, and would be replaced")
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: name a file")
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target} is there already, nothing was written: name another file, or pass "
            "overwrite=True (--overwrite) to replace it"
        )


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yields a file's name beside ``target`` that takes its place when the block succeeds."""
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        to_disk(staging)
        os.replace(staging, target)
        to_disk(target.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` that takes its place when the block succeeds."""
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    old = staging.with_name(f"{staging.name}.old")
    try:
        staging.mkdir(parents=True)
        yield staging
        # After a power failure there must be one whole folder, so the new one is on the disk before
        # the old one goes.
        for path in (*staging.rglob("*"), staging):
            to_disk(path)
        if target.exists():
            target.rename(old)
        staging.rename(target)
        to_disk(target.parent)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for folder in (staging, old):
            shutil.rmtree(folder, ignore_errors=True)


def to_disk(path: Path, *, uncache: bool = False) -> None:
    """Returns once a file, or a folder's list of names, has reached the disk.

    Args:
      path: the file or folder.
      uncache: whether what is read back later is to come from the disk, and not from the cache.

    Raises:
      OSError: if the disk does not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if uncache and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _find(source: PathLike, what: str, instead: str, download: Callable[[str], Path]) -> Path:
    if (folder := local_folder(source, instead)) is not None:
        return folder
    name = os.fspath(source)
    try:
        return download(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name!r} is not a folder here, and the Hugging Face Hub did not give such a {what} "
            f"({type(error).__name__}): check its spelling and the network, or give a local folder"
        ) from error


def _download_model(name: str) -> Path:
    folder = _download(name, *_files(SAFETENSORS))
    if not any(folder.glob("*.safetensors")):
        folder = _download(name, *_files(MSGPACK))
    return folder


def _files(weights: str) -> tuple[str, ...]:
    stem, suffix = weights.split(".")
    others = ("config.json", CARD, *TOKENIZER_FILES)
    return (*others, weights, f"{stem}-*.{suffix}", f"{weights}.index.json")


def _download(name: str, *files: str) -> Path:
    # Imported here: what is on this machine needs no client of the hub.
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(files)))
