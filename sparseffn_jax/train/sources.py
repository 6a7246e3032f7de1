"""What names a text, and whether it is there; cheap to import, for the command line."""

from pathlib import Path

from sparseffn_jax.defaults import STDLIB

JSON_LINES, PARQUET = ".jsonl", ".parquet"
SUFFIXES = frozenset((".txt", ".md", ".rst", ".py", ".text", JSON_LINES, PARQUET))
# What lies there may never end, or answer only once.
_NO_TEXTS = frozenset(("proc", "sys"))


def check_source(source: str) -> None:
    """Checks a source of text, before anything is read, as far as this machine can tell.

    Args:
      source: a source of text, as :func:`sparseffn_jax.load_windows` takes it.

    Raises:
      FileNotFoundError: if ``source`` is a path, and nothing is there.
      ValueError: if it is no ordinary file or folder.
    """
    if source == STDLIB:
        return
    path = Path(source).expanduser()
    if path.exists():
        is_ordinary = path.is_file() or path.is_dir()
        if not is_ordinary or _NO_TEXTS.intersection(path.resolve().parts[1:2]):
            raise ValueError(f"{source} is no ordinary file: copy the text into one, and give that")
    elif _is_path(source):
        raise FileNotFoundError(
            f"there is no file or folder {source!r}: check its spelling, or give the name of a "
            "Hugging Face dataset"
        )


def check_sources(*sources: str | None) -> None:
    """Checks several sources as :func:`check_source` does; ``None`` is none."""
    for source in sources:
        if source is not None:
            check_source(source)


def _is_path(source: str) -> bool:
    """Tells whether a source can be no dataset's name, which is a word, or two with a slash."""
    return (
        source.startswith(("/", ".", "~"))
        or source.endswith("/")
        or source.count("/") > 1
        or Path(source).suffix in SUFFIXES
    )
