"""Valid texts, rows and chats, and the faults that the fuzzer of loaders puts into them."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sparseffn_jax as sf

SUFFIXES = (".jsonl", ".parquet", ".txt")
Files = dict[str, bytes]
_CHATML = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s> {% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


class Refused(ValueError):
    """A text was refused, and the message names the file."""


def load(folder: Path) -> None:
    """Reads a folder of texts, or its only file, with a loss on all tokens or on completions.

    Raises:
      Refused: if it is refused with a message that names it.
    """
    files = sorted(folder.iterdir())
    source = str(files[0]) if len(files) == 1 else str(folder)
    data = b"".join(file.read_bytes() for file in files)
    has_completions = b"messages" in data or b"completion" in data
    loss_on = "completion" if has_completions and len(data) % 2 else "all"
    try:
        sf.load_windows(source, _tokenizer(), 4, 0.3, loss_on=loss_on, most_tokens=5000)
    except (ValueError, OSError) as error:
        if str(folder) in str(error):
            raise Refused(str(error)) from error
        raise


def make_seeds() -> dict[str, Files]:
    """Returns valid files of every form, and a folder with all of them."""
    turns = [
        {"role": role, "content": f"{role} one two"} for role in ("system", "user", "assistant")
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    rows = {
        "text": [{"text": "one two three " * 9, "id": i} for i in range(20)],
        "chats": [{"messages": turns * (1 + i % 2)} for i in range(12)],
        "parts": [
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}]}, call]}
            for _ in range(12)
        ],
        "completions": [{"prompt": "one two", "completion": " three four"} for _ in range(20)],
        "chat completions": [
            {"prompt": turns[:2], "completion": turns[2:], "tools": [tool]} for _ in range(12)
        ],
    }
    seeds = {}
    for name, each in rows.items():
        seeds[f"text lines of {name}"] = {"rows.jsonl": _lines(each)}
        seeds[f"text table of {name}"] = {"rows.parquet": _table(each)}
    seeds["text folder"] = {
        "a.txt": b"one two three\n\n" * 30,
        "b.jsonl": _lines(rows["chats"]),
        "c.parquet": _table(rows["completions"]),
    }
    return seeds


def change_a_row(choose: random.Random, files: Files) -> None:
    """Changes, adds or removes values anywhere in a row."""
    name = choose.choice(sorted(files) or [""])
    rows = _rows(name, files.get(name, b""))
    if not rows:
        return
    for _ in range(choose.choice((1, 1, 3))):
        _change(choose, choose.choice(rows))
    try:
        files[name] = _table(rows) if name.endswith(".parquet") else _lines(rows)
    # Tables refuse much, such as columns of two types.
    except (pa.ArrowException, OverflowError, RecursionError, UnicodeError, ValueError, TypeError):
        return


def change_a_column(choose: random.Random, files: Files) -> None:
    """Gives a table's column another type, another name or a twin, or takes all rows away."""
    name = "rows.parquet" if "rows.parquet" in files else "c.parquet"
    rows = _rows(name, files.get(name, b""))
    if not rows:
        return
    table = pa.Table.from_pylist(rows)
    i = choose.randrange(table.num_columns)
    values = choose.choice(
        (
            pa.array([2**40] * len(rows), pa.timestamp("s")),
            pa.array([b"\xff\xfe"] * len(rows), pa.binary()).view(pa.string()),
            pa.array([b"text"] * len(rows), pa.binary()),
            pa.array(["one two"] * len(rows)).dictionary_encode(),
            pa.array(["one two"] * len(rows), pa.large_string()),
            pa.array([None] * len(rows)),
            pa.array([[("role", "user"), ("content", "x")]] * len(rows), pa.map_("str", "str")),
            table.column(i),
        )
    )
    column = choose.choice((table.column_names[i], "text", "messages", "prompt", "tools", "", "x"))
    if choose.random() < 0.5:
        table = table.set_column(i, column, values)
    else:
        table = table.append_column(column, values)
    files[name] = _written(choose, table.slice(0, choose.choice((0, len(rows)))))


def put_in_a_line(choose: random.Random, files: Files) -> None:
    """Puts a strange line between the rows."""
    name = "rows.jsonl" if "rows.jsonl" in files else "b.jsonl"
    lines = files.get(name, b"").split(b"\n")
    line = choose.choice(
        (
            b"[" * 100_000,
            b'{"text":' * 50_000,
            b'{"messages": [' + b"[" * 900 + b"]" * 900 + b"]}",
            b'{"text": ' + b"1" * 5000 + b"}",
            b'{"text": NaN}',
            b'{"text": "\\ud800"}',
            b'{"text": "a", "text": null}',
            b'\xef\xbb\xbf{"text": "a"}',
            '{"text": "a"}'.encode("utf-16"),
            b'{"text": "\\u0000\\u2028"}',
            b"\x00",
            b"\r",
            b"null",
            b'"text"',
            b'{"text": "' + b"one " * 20_000 + b'"}',
        )
    )
    lines.insert(choose.randrange(len(lines) + 1), line)
    files[name] = choose.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)


FAULTS: tuple[Callable[[random.Random, Files], None], ...] = (
    change_a_row,
    change_a_row,
    change_a_row,
    change_a_column,
    put_in_a_line,
)


def _change(choose: random.Random, holder: Any) -> None:
    """Changes something in a row, at any depth."""
    while True:
        keys = list(range(len(holder))) if isinstance(holder, list) else sorted(holder, key=str)
        if not keys:
            break
        key = choose.choice(keys)
        if not (isinstance(holder[key], dict | list) and holder[key]) or choose.random() < 0.3:
            break
        holder = holder[key]
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    strange = (
        *(None, True, 0, -1, 2**70, 1e308, float("nan"), "", "x", "user", "\ud800", "\0", "</s>"),
        *([], {}, [[]], [None], [{}], {"type": "image_url"}, {"role": "user"}, "one " * 999, deep),
        [{"role": "user", "content": "x"}],
    )
    names = ("role", "content", "text", "messages", "prompt", "completion", "tools", "type", "")
    if isinstance(holder, list):
        if holder and choose.random() < 0.7:
            holder[choose.randrange(len(holder))] = choose.choice(strange)
        else:
            holder.append(choose.choice(strange))
        return
    kind = choose.randrange(4)
    key = choose.choice(sorted(holder, key=str) or [""])
    if kind == 0:
        holder.pop(key, None)
    elif kind == 1:
        holder[choose.choice(names)] = holder.pop(key, None)
    else:
        holder[key if kind == 2 else choose.choice(names)] = choose.choice(strange)


def _rows(name: str, data: bytes) -> list[Any]:
    """Returns the rows of a file, or nothing if it has been damaged."""
    try:
        if name.endswith(".parquet"):
            return parquet.read_table(io.BytesIO(data)).to_pylist()
        rows = [json.loads(line) for line in data.split(b"\n") if line.strip()]
        return [row for row in rows if isinstance(row, dict | list)]
    except (pa.ArrowException, ValueError, RecursionError, OverflowError, OSError):
        return []


def _lines(rows: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def _table(rows: list[Any]) -> bytes:
    return _written(random.Random(len(rows)), pa.Table.from_pylist(rows))


def _written(choose: random.Random, table: Any) -> bytes:
    data = io.BytesIO()
    compression = choose.choice(("none", "snappy", "zstd", "gzip"))
    parquet.write_table(table, data, compression=compression, row_group_size=7)
    return data.getvalue()


def _tokenizer() -> Any:
    words = ("</s>", "<s>", "<?>", "one", "two", "three", "user", "assistant", "system")
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<?>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=_CHATML
    )
