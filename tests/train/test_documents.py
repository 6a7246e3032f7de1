import json

import pytest

from sparseffn_jax.train import documents
from sparseffn_jax.train.documents import Chat, Completion, Document, Source, parse_row, read_text

USER, ASSISTANT = ({"role": role, "content": role} for role in ("user", "assistant"))


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def test_a_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("one\n\ntwo")
    assert list(Source(str(tmp_path / "book.txt"))) == [Document("book.txt", "one\n\ntwo")]


def test_folder_gives_its_files_by_relative_name_and_counts_the_others(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("bee")
    (tmp_path / "a.txt").write_text("ay")
    for name in ("c.bin", "sub/d.bin", "Makefile"):
        (tmp_path / name).write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text(" \n")
    source = Source(str(tmp_path))
    for _ in range(2):
        assert list(source) == [Document("a.txt", "ay"), Document("sub/b.md", "bee")]
        assert source.unread == {".bin": 2, "without a suffix": 1}
        assert source.empty == 1


def test_each_line_of_json_lines_is_a_document(tmp_path):
    texts = ("one", "two\n\nth\u2028ree")
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    (tmp_path / "some.jsonl").write_text("\n\n".join(lines) + "\n")
    expected = [Document("some.jsonl#1", "one"), Document("some.jsonl#3", "two\n\nth\u2028ree")]
    assert list(Source(str(tmp_path / "some.jsonl"))) == expected
    (tmp_path / "more.txt").write_text("four")
    assert list(Source(str(tmp_path))) == [Document("more.txt", "four"), *expected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "one", "id": 3}, Document("n", "one")),
        ({"prompt": "one", "completion": "two", "text": "x"}, Completion("n", "one", "two")),
        ({"messages": [USER, ASSISTANT], "prompt": "x"}, Chat("n", "p", [USER, ASSISTANT])),
        (
            {"prompt": [USER], "completion": [ASSISTANT], "messages": None},
            Chat("n", "p", [USER, ASSISTANT], given=1),
        ),
        # OpenAI's parts, and the keys without values that tables add.
        (
            {"messages": [{"role": "u", "content": [{"type": "text", "text": "a"}], "name": None}]},
            Chat("n", "p", [{"role": "u", "content": "a"}]),
        ),
        (
            {
                "messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}],
                "tools": '[{"name": "f"}]',
            },
            Chat(
                "n",
                "p",
                [USER, {"role": "assistant", "tool_calls": [{"id": "1"}], "content": ""}],
                tools=[{"name": "f"}],
            ),
        ),
    ],
)
def test_a_row_is_a_document_by_its_columns(row, expected):
    assert parse_row(row, "n", "p") == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "is no JSON"),
        ("\udcff", "is no JSON"),
        (5000 * "[", "is no JSON"),
        (f'{{"text": {"1" * 5000}}}', "is no JSON"),
        ("[1]", 'expected "text"'),
        ("3", 'expected "text"'),
        ("{}", 'expected "text"'),
        ('{"text": 3}', 'expected "text"'),
        ('{"text": null}', 'expected "text"'),
        ('{"prompt": "x"}', 'expected "text"'),
        ('{"prompt": "x", "completion": []}', 'expected "text"'),
        ('{"text": "x", "messages": "x"}', 'expected "text"'),
        ('{"text": "\\ud800"}', "expected Unicode text"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [3]}', 'the strings "role" and "content", not 3'),
        ('{"messages": [{"role": "user", "content": 3}]}', 'the strings "role" and "content"'),
        ('{"messages": [{"role": "user"}]}', 'no "content"'),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', 'the strings "role"'),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "expected Unicode text"),
        ('{"messages": [{"role": "user", "content": ""}], "tools": "x"}', 'objects as "tools"'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, expected):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=rf"some.jsonl, line 2.*{expected}"):
        list(Source(str(path)))


def test_parquet_has_the_same_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [USER, ASSISTANT], "text": None, "id": 1}, {"messages": None, "text": "x"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "some.parquet")
    path = tmp_path / "some.parquet"
    expected = [
        Chat("some.parquet#0", f"{path}, row 0 (the first is 0)", [USER, ASSISTANT]),
        Document("some.parquet#1", "x"),
    ]
    assert list(Source(str(path))) == expected
    assert list(Source(str(tmp_path))) == expected


def test_a_bad_row_of_parquet_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "some.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(ValueError, match=r"some.parquet, row 1 \(the first is 0\): expected"):
        list(Source(str(path)))
    parquet.write_table(pyarrow.table({"body": ["one"]}), path)
    with pytest.raises(ValueError, match=r"some.parquet: expected.*found the columns \['body'\]"):
        list(Source(str(path)))
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"some.parquet cannot be read as parquet"):
        list(Source(str(path)))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "some.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"sparseffn_jax\[parquet\]"):
        list(Source(str(tmp_path)))


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"text": "one", "id": 1}, {"text": "two", "id": 2}])
    table.save_to_disk(tmp_path / "table")
    expected = [Document("table#0", "one"), Document("table#1", "two")]
    assert list(Source(str(tmp_path / "table"))) == expected
    splits = {"train": table, "test": table.select([0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert [d.text for d in Source(str(tmp_path / "both"))] == ["one", "two"]
    assert [d.text for d in Source(str(tmp_path / "both" / "test"))] == ["one"]
    (tmp_path / "table" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="no dataset can be read"):
        list(Source(str(tmp_path / "table")))


def test_a_dataset_of_the_hub_is_streamed_on_request(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        table = datasets.Dataset.from_list([{"text": "one", "id": 1}, {"text": "two", "id": 2}])
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source, streamed in (("some/words", False), ("some/words:small:test", True)):
        names = [f"{source}#{i}" for i in (0, 1)]
        assert [d.name for d in Source(source, streamed=streamed)] == names
    assert asked == [
        ("some/words", None, "train", False),
        ("some/words", "small", "test", True),
    ]


@pytest.mark.parametrize("source", ["text.txt", "corpus/", "./corpus", "a/b/c", "~/no-corpus"])
def test_what_can_be_no_datasets_name_is_not_asked_for(source, monkeypatch):
    monkeypatch.setattr(documents, "_hub_dataset", lambda name, _: pytest.fail(name))
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        list(Source(source))


def test_missing_dataset(monkeypatch):
    # Without the datasets library, as without the network, the name can be had from nowhere.
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="no file, folder or Hugging Face dataset"):
        list(Source("no-such/corpus"))


def test_the_standard_library_is_a_corpus():
    names = {document.name for document in Source("stdlib")}
    assert {"argparse.py", "asyncio/events.py"} <= names
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)


def test_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    (tmp_path / "b.bin").write_text("\n")
    with pytest.raises(ValueError, match=r"no text found.*it has 1 .bin"):
        list(Source(str(tmp_path)))


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8.*iconv"):
        read_text(path)
