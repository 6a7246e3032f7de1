import hashlib
import json

import grain
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparseffn_jax.evaluate.windows import cut_windows
from sparseffn_jax.train import data
from sparseffn_jax.train.data import (
    Document,
    load_windows,
    make_batches,
    read_documents,
    read_whole,
    split_documents,
    tokenize,
)

WORDS = ("<end>", "<unknown>", "one", "two", "three")
END, _, ONE, TWO, THREE = range(5)


@pytest.fixture(scope="module")
def tokenizer():
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize(("length", "window"), [(41, 8), (47, 8), (9, 8), (30, 1)])
def test_every_token_but_the_first_is_a_target_once(length, window):
    windows = cut_windows(np.arange(length, dtype=np.int32), window)
    assert windows.shape == ((length - 1) // window, window + 1)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows[:, 1:].ravel(), 1 + np.arange(windows[:, 1:].size))
    np.testing.assert_array_equal(windows[:, :-1].ravel(), np.arange(windows[:, 1:].size))
    assert length - 1 - windows[:, 1:].size < window


def test_pack_of_too_few_tokens_is_empty():
    assert cut_windows(np.arange(8, dtype=np.int32), 8).shape == (0, 9)


def test_documents_end_with_an_end_of_text_token(tokenizer):
    tokens = tokenize([Document("a", "one two"), Document("b", "three")], tokenizer)
    np.testing.assert_array_equal(tokens, [ONE, TWO, END, THREE, END])
    assert tokens.dtype == np.int32


def test_tokenizer_without_end_of_text(tokenizer):
    headless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="eos_token"):
        tokenize([Document("a", "one")], headless)


def test_split_is_disjoint_complete_and_independent_of_order():
    documents = [Document(f"name {i}", f"text {i}") for i in range(40)]
    train, validation = split_documents(documents, 0.2)
    assert len(validation) == 8
    assert set(train).isdisjoint(validation)
    assert set(train) | set(validation) == set(documents)
    assert split_documents(documents[::-1], 0.2) == (train, validation)


def test_split_moves_no_document_into_validation_when_one_comes():
    documents = [Document(f"name {i}", "") for i in range(40)]
    _, before = split_documents(documents, 0.2)
    _, after = split_documents([*documents, Document("another", "")], 0.2)
    assert set(after) - set(before) <= {Document("another", "")}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_split_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="validation_fraction"):
        split_documents([Document("a", ""), Document("b", "")], fraction)


@pytest.mark.parametrize(
    "text",
    [
        "short text",
        "\n\n".join(f"paragraph {i} " + "word " * 50 for i in range(400)),
        "no_blank_in_it" * 9000,
    ],
    ids=["short", "paragraphs", "one word"],
)
def test_a_single_file_is_cut_into_pieces_without_loss(tmp_path, text):
    path = tmp_path / "book.txt"
    path.write_text(text)
    pieces = read_documents(str(path))
    assert "".join(piece.text for piece in pieces) == text
    assert len({piece.name for piece in pieces}) == len(pieces)
    train, validation = split_documents(pieces, 0.05)
    share = sum(len(d.text) for d in validation) / len(text)
    assert 0.0 < share < 0.4
    assert train


def test_pieces_end_at_paragraphs(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"paragraph {i}" for i in range(400)))
    assert all(piece.text.endswith("\n\n") for piece in read_documents(str(path))[:-1])


def test_folder_gives_its_text_files_by_relative_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("bee")
    (tmp_path / "a.txt").write_text("ay")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text(" \n")
    assert read_documents(str(tmp_path)) == [Document("a.txt", "ay"), Document("sub/b.md", "bee")]


def test_each_line_of_json_lines_is_a_document(tmp_path):
    texts = ("one", "two\n\nth\u2028ree")
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    (tmp_path / "some.jsonl").write_text("\n\n".join(lines) + "\n")
    expected = [Document("some.jsonl#1", "one"), Document("some.jsonl#3", "two\n\nth\u2028ree")]
    assert read_documents(str(tmp_path / "some.jsonl")) == expected
    (tmp_path / "more.txt").write_text("four")
    assert read_documents(str(tmp_path)) == [Document("more.txt", "four"), *expected]
    assert read_whole(str(tmp_path / "some.jsonl")) == "one\n\ntwo\n\nth\u2028ree"


@pytest.mark.parametrize(
    "line", ["{", "[1]", "3", '{"text": 3}', '{"text": "\\ud800"}', 5000 * "["]
)
def test_a_line_without_a_text_is_named(tmp_path, line):
    (tmp_path / "some.jsonl").write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"some.jsonl, line 2: expected a JSON object with a str"):
        read_documents(str(tmp_path / "some.jsonl"))


@pytest.mark.parametrize("source", ["text.txt", "corpus/", "./corpus", "a/b/c", "~/no-corpus"])
def test_what_can_be_no_datasets_name_is_not_asked_for(source, monkeypatch):
    monkeypatch.setattr(data, "_read_dataset", lambda name: pytest.fail(name))
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_documents(source)


def test_the_standard_library_is_a_corpus():
    names = {document.name for document in read_documents("stdlib")}
    assert {"argparse.py", "asyncio/events.py"} <= names
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)


def test_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match="no text found"):
        read_documents(str(tmp_path))


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8.*iconv"):
        read_documents(str(path))


def test_missing_dataset(monkeypatch):
    # Without the datasets library, as without the network, the name can be had from nowhere.
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="no file, folder or Hugging Face dataset"):
        read_documents("no-such/corpus")


def test_text_too_short_for_a_window(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("one two three")
    with pytest.raises(ValueError, match="too few for one window of 17"):
        load_windows(str(path), tokenizer, 16)


def test_load_windows_is_deterministic(tmp_path, tokenizer):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(" ".join(WORDS[2 + (i + j) % 3] for j in range(50 + i)))
    first, second = (load_windows(str(tmp_path), tokenizer, 8, 0.2) for _ in range(2))
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.validation, second.validation)
    assert first.train.shape[1] == first.validation.shape[1] == 9
    assert len(first.train) > len(first.validation) > 0


def test_each_epoch_has_every_window_once_in_an_order_of_its_own():
    batches = make_batches(np.arange(12)[:, None], 4, seed=3)
    first, second = (np.concatenate([next(batches) for _ in range(3)]).ravel() for _ in range(2))
    np.testing.assert_array_equal(np.sort(first), np.arange(12))
    np.testing.assert_array_equal(np.sort(second), np.arange(12))
    assert (first != second).any()


def test_batches_depend_on_the_seed_alone():
    def digest(seed):
        batches = make_batches(np.arange(64)[:, None], 4, seed)
        return hashlib.sha256(b"".join(next(batches).tobytes() for _ in range(20))).hexdigest()

    assert digest(0) == digest(0) != digest(1)


def test_iterator_state_restores_the_position():
    windows = np.arange(40, dtype=np.int32)[:, None]
    batches = make_batches(windows, 4, seed=0)
    for _ in range(13):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(9)]
    other = make_batches(windows, 4, seed=0)
    assert isinstance(other, grain.DatasetIterator)
    other.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(other), batch)
    assert expected[0].dtype == np.int32


def test_fewer_windows_than_a_batch():
    with pytest.raises(ValueError, match="3 training windows do not fill one batch of 4"):
        make_batches(np.zeros((3, 9), np.int32), 4, seed=0)
