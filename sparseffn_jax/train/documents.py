"""Reads documents: texts, completions of prompts, and chats, from files, folders and datasets.

A row of JSON lines, of a parquet file or of a Hugging Face dataset is a document by its columns:
``messages`` is a chat, ``prompt`` and ``completion`` are two texts or two lists of messages, and
``text`` is a text. These are the formats of TRL (https://huggingface.co/docs/trl/dataset_formats).
"""

import collections
import contextlib
import dataclasses
import json
import reprlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparseffn_jax.checkpoints.errors import is_failure, one_line
from sparseffn_jax.defaults import STDLIB
from sparseffn_jax.train.sources import JSON_LINES, PARQUET, SUFFIXES, check_source

# Not worth learning from: tests repeat themselves, the codecs are tables, topics.py is a manual.
_STDLIB_SKIP = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
)
# One of them is in each folder that the datasets library has saved a dataset to.
_DATASET_FILES = ("state.json", "dataset_dict.json")
_COLUMNS = ("messages", "prompt", "completion", "text", "tools")
_EXPECTED = (
    'expected "text", a string; or "messages", a list of objects with a "role" and a "content"; or '
    '"prompt" and "completion", two strings or two such lists'
)
Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
      name: what it is assigned to training or validation by.
      text: the text.
    """

    name: str
    text: str

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn from it."""
        return not self.text.strip()


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and the text that follows it.

    Attributes:
      name: what it is assigned to training or validation by.
      prompt: the text that is given.
      completion: the text that is to be learned.
    """

    name: str
    prompt: str
    completion: str

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn from it."""
        return not self.completion.strip()


@dataclasses.dataclass(frozen=True)
class Chat:
    """Messages, of which a tokenizer's chat template makes a text.

    Attributes:
      name: what it is assigned to training or validation by.
      place: where it was found, for messages about it.
      messages: objects with a ``role`` and mostly a ``content``, a string.
      given: number of messages at the beginning that are a prompt, whoever speaks in them.
      tools: JSON schemas of the functions that the assistant may call, or ``None``.
    """

    name: str
    place: str
    messages: list[Message]
    given: int = 0
    tools: list[Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn from it."""
        return False


AnyDocument = Document | Completion | Chat


class Source:
    """The documents of a file, a folder or a dataset, to be read one by one.

    Attributes:
      name: the source, as it was given.
      unread: the files of a folder that are of no known format: how many there are by suffix.
      empty: number of documents without any text, which are left out.

    Args:
      name: ``"stdlib"``, the path of a file or of a folder, or the name of a dataset on the
        Hugging Face Hub, ``NAME``, ``NAME:CONFIGURATION`` or ``NAME:CONFIGURATION:SPLIT``.
      streamed: whether a dataset of the Hub is read row by row and not downloaded before.

    Raises:
      FileNotFoundError: if there is no such source.
      ImportError: if a library is missing that reads it.
    """

    def __init__(self, name: str, *, streamed: bool = False):
        self.name, self._streamed = name, streamed
        self.unread: collections.Counter[str] = collections.Counter()
        self.empty = 0

    def __iter__(self) -> Iterator[AnyDocument]:
        self.unread.clear()
        self.empty, found = 0, False
        for document in self._documents():
            found |= not document.is_empty
            self.empty += document.is_empty
            if not document.is_empty:
                yield document
        if not found:
            others = f"; it has {_counted(self.unread)}" if self.unread else ""
            raise ValueError(f"no text found in {self.name!r}: it is empty{others}")

    def _documents(self) -> Iterator[AnyDocument]:
        check_source(self.name)
        path = Path(self.name).expanduser()
        if self.name == STDLIB:
            return self._folder(Path(sysconfig.get_path("stdlib")))
        if path.is_dir():
            is_dataset = any((path / file).is_file() for file in _DATASET_FILES)
            return _saved_dataset(path) if is_dataset else self._folder(path)
        if path.is_file():
            return _file(path, path.name)
        return _hub_dataset(self.name, self._streamed)

    def _folder(self, folder: Path) -> Iterator[AnyDocument]:
        is_stdlib = self.name == STDLIB
        suffixes, skip = (frozenset((".py",)), _STDLIB_SKIP) if is_stdlib else (SUFFIXES, ())
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if not frozenset(skip).isdisjoint(name.parts) or not path.is_file():
                continue
            if path.suffix in suffixes:
                yield from _file(path, name.as_posix())
            elif not is_stdlib:
                self.unread[path.suffix or "without a suffix"] += 1


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file.

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


def parse_row(row: Any, name: str, place: str) -> AnyDocument:
    """Returns the document that a row of JSON lines or of a table is.

    Args:
      row: a dict from columns to values. Of several formats it has that which comes first:
        messages, prompt and completion, text. A column without a value is as good as none.
      name: the document's name.
      place: where the row was found, for the message of an error.

    Raises:
      ValueError: if it has none of the formats; the message names the place and the row.
    """
    columns = {}
    if isinstance(row, dict):
        columns = {name: row[name] for name in _COLUMNS if row.get(name) is not None}
    match columns:
        case {"messages": [*messages]}:
            chat = Chat(name, place, _messages(messages, place), 0, _tools(columns, place))
            return _checked(chat, [chat.messages, chat.tools], place)
        case {"prompt": str(prompt), "completion": str(completion)}:
            return _checked(Completion(name, prompt, completion), prompt + completion, place)
        case {"prompt": [*prompt], "completion": [*completion]}:
            messages = _messages(prompt, place) + _messages(completion, place)
            chat = Chat(name, place, messages, len(prompt), _tools(columns, place))
            return _checked(chat, [chat.messages, chat.tools], place)
        case {"text": str(text)} if not columns.keys() & {"messages", "completion"}:
            return _checked(Document(name, text), text, place)
    raise ValueError(f"{place}: {_EXPECTED}; found {reprlib.repr(row)}")


def _messages(messages: list[Any], place: str) -> list[Message]:
    """Returns messages whose content is a string, or is missing as in a call of a tool."""
    checked = []
    for message in messages:
        # Tables give every message every key that one of them has.
        keys = message if isinstance(message, dict) else {}
        keys = {key: value for key, value in keys.items() if value is not None}
        content = keys.get("content", "")
        if isinstance(content, list) and content:
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if not isinstance(keys.get("role"), str) or not isinstance(content, str):
            raise ValueError(
                f'{place}: expected a message with the strings "role" and "content", not '
                f"{reprlib.repr(message)}"
            )
        if "content" not in keys and not keys.get("tool_calls"):
            raise ValueError(f'{place}: a message has no "content": {reprlib.repr(message)}')
        checked.append({**keys, "content": content})
    if not checked:
        raise ValueError(f"{place}: expected at least one message, found an empty list")
    return checked


def _tools(columns: dict[str, Any], place: str) -> list[Any] | None:
    tools = columns.get("tools")
    if isinstance(tools, str):
        # Tables cannot hold schemas that differ: TRL writes them as JSON there.
        try:
            tools = json.loads(tools)
        except (RecursionError, ValueError):
            tools = columns["tools"]
    if tools is None or (isinstance(tools, list) and all(isinstance(x, dict) for x in tools)):
        return tools or None
    raise ValueError(f'{place}: expected a list of objects as "tools", not {reprlib.repr(tools)}')


def _checked(document: AnyDocument, content: Any, place: str) -> AnyDocument:
    """Returns the document if all its text is Unicode: JSON can hold halves of characters."""
    try:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        text.encode()
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place}: expected Unicode text ({one_line(error)}); found {reprlib.repr(content)}"
        ) from error
    return document


def _file(path: Path, name: str) -> Iterator[AnyDocument]:
    """Reads a text file, which is one document, or a file of rows, each of which is one."""
    if path.suffix == JSON_LINES:
        yield from _json_lines(path, name)
    elif path.suffix == PARQUET:
        for i, row in enumerate(_parquet_rows(path)):
            yield parse_row(row, f"{name}#{i}", f"{path}, row {i} (the first is 0)")
    else:
        yield Document(name, read_text(path))


def _json_lines(path: Path, name: str) -> Iterator[AnyDocument]:
    with path.open("rb") as file:
        # Not text lines: JSON allows other ends of a line within a string.
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode())
            except (RecursionError, ValueError) as error:
                raise ValueError(
                    f"{place} is no JSON ({one_line(error)}): {reprlib.repr(line)}"
                ) from error
            yield parse_row(row, f"{name}#{number}", place)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            f"{path}: parquet files need pyarrow: pip install 'sparseffn_jax[parquet]'"
        ) from None
    # Damaged files raise all of these; the MemoryError of those that announce too much is Arrow's,
    # and a date beyond Python's is a ValueError.
    failures = (pyarrow.ArrowException, ArithmeticError, OSError, ValueError)
    with _reading(path, failures):
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
    columns = _known_columns(names, str(path))
    with file, _reading(path, failures):
        for batch in file.iter_batches(columns=columns, batch_size=1024):
            yield from batch.to_pylist()


@contextlib.contextmanager
def _reading(path: Path, failures: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except failures as error:
        raise ValueError(f"{path} cannot be read as parquet: {one_line(error)}") from error


def _known_columns(columns: Iterable[str], place: str) -> list[str]:
    """Returns the columns to be read, and not images and the like beside them."""
    columns = list(columns)
    known = [column for column in _COLUMNS if column in columns]
    if not known or known == ["tools"]:
        raise ValueError(f"{place}: {_EXPECTED}; found the columns {reprlib.repr(columns)}")
    return known


def _saved_dataset(path: Path) -> Iterator[AnyDocument]:
    """Reads a folder that ``save_to_disk`` of the datasets library wrote."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            f"{path} is a Hugging Face dataset: pip install 'sparseffn_jax[hub]'"
        ) from None
    try:
        table = datasets.load_from_disk(str(path))
        if isinstance(table, dict):
            split = "train" if "train" in table or len(table) != 1 else next(iter(table))
            if split not in table:
                names = ", ".join(map(str, table))
                raise ValueError(f"it has no split 'train' but {names}: give the folder of one")
            table = table[split]
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ValueError(f"no dataset can be read from {path}: {one_line(error)}") from error
    return _rows(table, path.name, str(path))


def _hub_dataset(source: str, streamed: bool) -> Iterator[AnyDocument]:
    missing = (
        f"no file, folder or Hugging Face dataset called {source!r}: give the path of a text file "
        f"or folder, {STDLIB!r} for the Python standard library, or the name of a dataset "
        "(needs the network and pip install 'sparseffn_jax[hub]')"
    )
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise FileNotFoundError(missing) from None
    name, configuration, split, *_ = (*source.split(":"), "", "")
    try:
        table = datasets.load_dataset(
            name, configuration or None, split=split or "train", streaming=streamed
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(missing) from error
    except ValueError as error:
        raise ValueError(
            f"dataset {source!r}: {error}; a configuration and a split are named as in "
            "NAME:CONFIGURATION:SPLIT"
        ) from error
    return _rows(table, source, f"dataset {source!r}")


def _rows(table: Any, name: str, place: str) -> Iterator[AnyDocument]:
    # A stream may not know its columns before its first row.
    if table.column_names is not None:
        table = table.select_columns(_known_columns(table.column_names, place))
    for i, row in enumerate(table):
        yield parse_row(row, f"{name}#{i}", f"{place}, row {i} (the first is 0)")


def _counted(kinds: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
