"""The data pipeline: reads text, splits it by document, tokenises, cuts windows and shuffles.

The pipeline is a pure function of (source, tokenizer, window, seed), so that two runs see the same
batches. The state of a grain iterator, a small JSON object, records the position of a run.
"""

import dataclasses
import hashlib
import json
import reprlib
import sysconfig
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from sparseffn_jax.defaults import STDLIB
from sparseffn_jax.evaluate.windows import cut_windows
from sparseffn_jax.train.sources import JSON_LINES, PARQUET, TEXT_SUFFIXES, check_source

# Not worth learning from: tests repeat themselves, the codecs are tables, topics.py is a manual.
_STDLIB_SKIP = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
)
_PIECE_CHARACTERS = 16_384
_LEAST_PIECES = 20


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and the name by which it is assigned to training or validation."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class TokenWindows:
    """Windows of token ids of one length, for training and for validation.

    Attributes:
      train: token ids ``(n, window + 1)``, int32; the inputs are ``[:, :-1]`` and the targets
        ``[:, 1:]``.
      validation: token ids ``(k, window + 1)``, int32, from documents of which ``train`` has no
        part.

    Example:
      >>> import numpy as np
      >>> import sparseffn_jax as sf
      >>> tokens = np.arange(170, dtype=np.int32).reshape(10, 17)
      >>> windows = sf.TokenWindows(train=tokens[2:], validation=tokens[:2])
      >>> windows.train[:, :-1].shape  # Eight windows of sixteen inputs.
      (8, 16)
    """

    train: Int[np.ndarray, "n w"]
    validation: Int[np.ndarray, "k w"]


def load_windows(
    source: str,
    tokenizer: Any,
    window: int,
    validation_fraction: float = 0.05,
) -> TokenWindows:
    """Reads text and returns its training and validation windows.

    Args:
      source: ``"stdlib"`` (the source code of the running Python's standard library), a text file,
        a ``.jsonl`` file whose lines have a ``"text"``, a folder of such files, or the name of a
        Hugging Face dataset with a ``text`` column.
      tokenizer: a transformers fast tokenizer with an end-of-text token.
      window: number of tokens that a window predicts; at most the model's ``n_positions``.
      validation_fraction: share of the documents that are kept for validation, between 0 and 1.
        They are chosen by a hash of their names.

    Raises:
      FileNotFoundError: if ``source`` is no file, folder or dataset that can be read.
      ValueError: if the text is empty, is not UTF-8, cannot be split, or is too short for one
        window in each split; if the tokenizer has no end-of-text token; or if
        ``validation_fraction`` is out of its range.

    Example:
      >>> import pathlib, tempfile
      >>> import sparseffn_jax as sf
      >>> tokenizer = sf.load_tokenizer(sf.EMBEDDED_MODEL)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for name in ("first.txt", "second.txt"):
      ...         _ = pathlib.Path(folder, name).write_text("import os, sys; " * 20)
      ...     windows = sf.load_windows(folder, tokenizer, window=16, validation_fraction=0.5)
      >>> windows.train.dtype.name, windows.train.shape[1]
      ('int32', 17)
    """
    train, validation = split_documents(read_documents(source), validation_fraction)
    windows = {}
    for name, documents in (("train", train), ("validation", validation)):
        tokens = tokenize(documents, tokenizer)
        windows[name] = cut_windows(tokens, window)
        if not len(windows[name]):
            raise ValueError(
                f"the {name} split of {source!r} has {len(tokens)} tokens, too few for one "
                f"window of {window + 1}: give more text or a shorter window"
            )
    return TokenWindows(**windows)


def read_documents(source: str) -> list[Document]:
    """Reads every document of a source.

    A line of a ``.jsonl`` file, a JSON object with a string ``text``, is a document, and so is any
    other file. A source of one document is cut into pieces of about 16 kB, or into 20 if it is
    short, so that it can be split: at blank lines where there are any.

    Args:
      source: a source of text, as :func:`load_windows` takes it.

    Raises:
      FileNotFoundError: if ``source`` is no file, folder or dataset that can be read.
      ValueError: if there is no text in it, or a file is not UTF-8 or no ordinary file.
    """
    check_source(source)
    path = Path(source).expanduser()
    if source == STDLIB:
        documents = _read_folder(
            Path(sysconfig.get_path("stdlib")), frozenset((".py",)), _STDLIB_SKIP
        )
    elif path.is_dir():
        documents = _read_folder(path, TEXT_SUFFIXES | {JSON_LINES}, frozenset())
    elif path.is_file():
        documents = _read_file(path, path.name)
        documents = _cut(documents[0]) if len(documents) == 1 else documents
    else:
        documents = _read_dataset(source)
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"no text found in {source!r}: it is empty")
    return documents


def read_whole(source: str) -> str:
    """Returns a source as one text.

    A text file is returned as it is; several documents are joined by blank lines.

    Args:
      source: a source of text, as :func:`load_windows` takes it.

    Raises:
      FileNotFoundError: if ``source`` is no file, folder or dataset that can be read.
      ValueError: if there is no text in it, or a file is not UTF-8 or no ordinary file.
    """
    check_source(source)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix != JSON_LINES:
        return read_text(path)
    return "\n\n".join(document.text for document in read_documents(source))


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file.

    Raises:
      ValueError: if the file is not UTF-8.
    """
    if path.suffix == PARQUET:
        raise ValueError(
            f"{path} is a table, not text: write it as .jsonl, one JSON object with a "
            '"text" in each line'
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): "
            "convert it, for example with iconv -t utf-8"
        ) from error


def split_documents(
    documents: list[Document], validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Splits documents into those for training and those for validation, by a hash of their names.

    The order of ``documents`` does not matter. Two documents keep their order in the ranking by
    hash when other documents are added or removed.

    Args:
      documents: at least two documents.
      validation_fraction: share of the documents that are kept for validation, between 0 and 1.

    Returns:
      The training documents and the validation documents; there is at least one of the latter.

    Raises:
      ValueError: if there are fewer than two documents or the fraction is out of its range.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction={validation_fraction} must lie between 0 and 1")
    if len(documents) < 2:
        raise ValueError(
            f"{len(documents)} document cannot be split into training and validation text: "
            "give a longer file, or a folder with several"
        )
    ranked = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    held_out = max(1, round(validation_fraction * len(ranked)))
    return ranked[held_out:], ranked[:held_out]


def tokenize(documents: list[Document], tokenizer: Any) -> Int[np.ndarray, " n"]:
    """Returns the documents' token ids in one int32 row, with an end-of-text token after each.

    Raises:
      ValueError: if the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token) to part documents")
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(
        [document.text for document in documents], add_special_tokens=False
    )
    end = [tokenizer.eos_token_id]
    return np.concatenate([np.array(e.ids + end, np.int32) for e in encodings])


def make_batches(
    windows: Int[np.ndarray, "n w"], batch_size: int, seed: int
) -> grain.DatasetIterator:
    """Returns an endless iterator of batches ``(batch_size, window + 1)``, reshuffled each epoch.

    The iterator's methods ``get_state()`` and ``set_state()`` save and restore its position
    exactly.

    Args:
      windows: token ids ``(n, window + 1)``.
      batch_size: number of windows in a batch.
      seed: seed of the order of the windows.

    Raises:
      ValueError: if there are fewer windows than ``batch_size``.
    """
    if len(windows) < batch_size:
        raise ValueError(
            f"{len(windows)} training windows do not fill one batch of {batch_size}: "
            "give more text, a smaller batch or a shorter window"
        )
    source: Any = windows
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    # The windows are in memory already: reading threads would only take cores from the model.
    in_line = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.batch(batch_size, drop_remainder=True).to_iter_dataset(in_line))


def _read_file(path: Path, name: str) -> list[Document]:
    """Reads a text file, which is one document, or JSON lines, each of which is one."""
    if path.suffix != JSON_LINES:
        return [Document(name, read_text(path))]
    documents = []
    # Not splitlines: JSON allows other ends of a line within a string.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (KeyError, RecursionError, TypeError, ValueError):
            text = None
        if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(
                f'{path}, line {number}: expected a JSON object with a string "text" of Unicode, '
                f"not {reprlib.repr(line)}"
            )
        documents.append(Document(f"{name}#{number}", text))
    return documents


def _read_folder(folder: Path, suffixes: frozenset[str], skip: frozenset[str]) -> list[Document]:
    documents = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in suffixes and skip.isdisjoint(name.parts) and path.is_file():
            documents += _read_file(path, name.as_posix())
    return documents


def _cut(document: Document) -> list[Document]:
    text, pieces, start = document.text, [], 0
    size = max(1, min(_PIECE_CHARACTERS, len(text) // _LEAST_PIECES))
    while start < len(text):
        end = _break_after(text, start + size, start + 2 * size)
        pieces.append(Document(f"{document.name}#{len(pieces)}", text[start:end]))
        start = end
    return pieces


def _break_after(text: str, start: int, stop: int) -> int:
    """Returns the best place from ``start`` to ``stop`` to cut: after a paragraph, line or word."""
    for separator in ("\n\n", "\n", " "):
        found = text.find(separator, start, stop)
        if found >= 0:
            return found + len(separator)
    return start


def _read_dataset(name: str) -> list[Document]:
    missing = FileNotFoundError(
        f"no file, folder or Hugging Face dataset called {name!r}: give the path of a text file "
        f"or folder, {STDLIB!r} for the Python standard library, or the name of a dataset with a "
        "'text' column (needs the network and pip install 'sparseffn_jax[hub]')"
    )
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing from None
    try:
        table = datasets.load_dataset(name, split="train")
    except (FileNotFoundError, ConnectionError) as error:
        raise missing from error
    except ValueError as error:
        raise ValueError(f"dataset {name!r}: {error}") from error
    if "text" not in table.column_names:
        raise ValueError(
            f"dataset {name!r} has no 'text' column, only {', '.join(table.column_names)}"
        )
    return [Document(f"{name}#{i}", text) for i, text in enumerate(table["text"])]
