"""Text in, batches of token windows out: read, split by document, tokenise, pack, shuffle.

The pipeline is a pure function of (source, tokenizer, window, seed): two runs see the same
batches, and a grain iterator's state, a small JSON object, says where a run stands.
"""

import dataclasses
import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from sparseffn_jax.evaluate.windows import cut_windows

STDLIB = "stdlib"
# Not worth learning from: tests repeat themselves, the codecs are tables, topics.py is a manual.
_STDLIB_SKIP = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
)
_TEXT_SUFFIXES = frozenset((".txt", ".md", ".rst", ".py", ".text"))
_PIECE_CHARACTERS = 16_384
_LEAST_PIECES = 20


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and the name that decides its split."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class TokenWindows:
    """Fixed windows of token ids, ready to batch.

    Attributes:
      train: ``(n, window + 1)`` int32; inputs are ``[:, :-1]``, targets ``[:, 1:]``.
      validation: the same, from documents that ``train`` has none of.

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
    """Reads ``source`` and returns its training and validation windows.

    Args:
      source: ``"stdlib"`` (the source of the running Python's standard library), a text file,
        a folder of text files, or the name of a Hugging Face dataset with a ``text`` column.
      tokenizer: a transformers fast tokenizer.
      window: tokens a window predicts; at most the model's ``n_positions``.
      validation_fraction: of the documents, chosen by a hash of their names.

    Raises:
      FileNotFoundError, ValueError: as :func:`read_documents`; also when a split is too short
        to fill one window.

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
    """Reads every document of ``source``; see :func:`load_windows` for what that may be.

    A single file is cut into pieces of about 16 kB, or 20 pieces if it is short, at blank lines
    where there are any, so that it can be split.

    Raises:
      FileNotFoundError: if ``source`` is neither here nor a dataset that can be had.
      ValueError: if there is no text in it.
    """
    path = Path(source)
    if source == STDLIB:
        documents = _read_folder(
            Path(sysconfig.get_path("stdlib")), frozenset((".py",)), _STDLIB_SKIP
        )
    elif path.is_dir():
        documents = _read_folder(path, _TEXT_SUFFIXES, frozenset())
    elif path.is_file():
        documents = _cut(Document(path.name, read_text(path)))
    else:
        documents = _read_dataset(source)
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"no text found in {source!r}: it is empty")
    return documents


def read_whole(source: str) -> str:
    """Returns ``source`` as one text: a file as it is, several documents joined by blank lines.

    Args:
      source: as for :func:`load_windows`.

    Raises:
      FileNotFoundError, ValueError: as :func:`read_documents`.
    """
    path = Path(source)
    if path.is_file():
        return read_text(path)
    return "\n\n".join(document.text for document in read_documents(source))


def read_text(path: Path) -> str:
    """Returns a UTF-8 file's text.

    Raises:
      ValueError: if the file is not UTF-8.
    """
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
    """Splits into (train, validation) by a hash of the names: no document is in both.

    The order of ``documents`` does not matter, and a document keeps its rank when others come
    and go.
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
    """Returns the documents' token ids in one int32 row, an end-of-text token after each."""
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
    """Returns an endless iterator of ``(batch_size, window + 1)`` batches, reshuffled each epoch.

    ``get_state()`` and ``set_state()`` of the iterator save and restore its position exactly.

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


def _read_folder(folder: Path, suffixes: frozenset[str], skip: frozenset[str]) -> list[Document]:
    documents = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in suffixes and skip.isdisjoint(name.parts) and path.is_file():
            documents.append(Document(name.as_posix(), read_text(path)))
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
