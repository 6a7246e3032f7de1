import hashlib
import json
import tracemalloc

import grain
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sparseffn_jax as sf
from sparseffn_jax.evaluate.windows import cut_windows
from sparseffn_jax.train import documents
from sparseffn_jax.train.data import TokenWindows, load_windows, make_batches, split_names

WORDS = ("<end>", "<unknown>", "one", "two", "three")
END, _, ONE, TWO, THREE = range(5)
CHATS = "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHATS
    )


def write_words(path, count, line=20):
    """Writes so many words in lines, after every fifth of which a paragraph ends."""
    words = [WORDS[2 + i % 3] for i in range(count)]
    lines = [" ".join(words[i : i + line]) for i in range(0, count, line)]
    path.write_text("".join(x + "\n" * (1 + (i % 5 == 4)) for i, x in enumerate(lines)))


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


def test_cutting_takes_no_more_memory_than_the_windows():
    tokens = np.arange(400_000, dtype=np.int32)
    tracemalloc.start()
    try:
        windows = cut_windows(tokens, 50)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert windows.flags.owndata
    assert peak < 1.2 * windows.nbytes


def test_documents_end_with_an_end_of_text_token(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.txt").write_text("three one")
    windows = load_windows(
        str(tmp_path / "a.txt"), tokenizer, 2, validation_source=str(tmp_path / "b.txt")
    )
    np.testing.assert_array_equal(windows.train, [[ONE, TWO, END]])
    np.testing.assert_array_equal(windows.validation, [[THREE, ONE, END]])
    assert windows.train.dtype == np.int32


def test_tokenizer_without_end_of_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one two")
    headless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="eos_token"):
        load_windows(str(tmp_path), headless, 2)


def test_split_is_disjoint_complete_and_independent_of_order():
    names, sizes = [f"name {i}" for i in range(40)], [1] * 40
    train, validation = split_names(names, sizes, 0.2)
    assert len(validation) == 8
    assert sorted(train + validation) == list(range(40))
    other = split_names(names[::-1], sizes, 0.2)
    assert [[39 - i for i in part] for part in other] == [train, validation]


def test_split_moves_no_document_into_validation_when_one_comes():
    names = [f"name {i}" for i in range(40)]
    _, before = split_names(names, [1] * 40, 0.2)
    _, after = split_names([*names, "another"], [1] * 41, 0.2)
    assert set(after) - set(before) <= {40}


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_split_is_by_size(fraction):
    sizes = np.random.default_rng(0).integers(1, 1000, 400)
    train, validation = split_names([str(i) for i in range(400)], sizes, fraction)
    assert sizes[validation].sum() / sizes.sum() == pytest.approx(fraction, rel=0.03)
    assert sorted(train + validation) == list(range(400))


def test_what_is_larger_than_the_share_is_not_held_out():
    for i in range(20):
        _, validation = split_names([f"{i}", f"other {i}", f"third {i}"], [1000, 100, 1000], 0.1)
        assert validation == [1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_split_fraction_out_of_range(fraction, tokenizer):
    with pytest.raises(ValueError, match="validation_fraction"):
        load_windows("stdlib", tokenizer, 8, fraction)


@pytest.mark.parametrize("counts", [(3000,), (30_000, 2000), (500,) * 6])
def test_the_split_has_its_share_of_tokens(tmp_path, tokenizer, counts):
    for i, count in enumerate(counts):
        write_words(tmp_path / f"{i}.txt", count)
    windows = load_windows(str(tmp_path), tokenizer, 8)
    train, validation = windows.counts.train, windows.counts.validation
    total = train.tokens + validation.tokens
    # Pieces end with an end-of-text token each.
    assert total == sum(counts) + train.documents + validation.documents
    assert 0.04 < validation.tokens / total < 0.06
    ends = np.count_nonzero(windows.train[:, 1:] == END)
    assert train.documents - 1 <= ends <= train.documents


def test_long_texts_are_cut_at_paragraphs_without_overlap(tmp_path):
    text = "\n\n".join(f"paragraph {i}" for i in range(400))
    (tmp_path / "book.txt").write_text(text)
    words = {word: i for i, word in enumerate(("<end>", "paragraph", *map(str, range(400))))}
    model = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    numbered = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>")
    windows = load_windows(str(tmp_path), numbered, 1)
    found = [
        sorted(part[part[:, 0] == words["paragraph"], 1].tolist())
        for part in (windows.train, windows.validation)
    ]
    # A window of one token begins with every token.
    assert sorted(found[0] + found[1]) == list(range(2, 402))


def test_long_chats_are_not_cut(tmp_path, tokenizer):
    for i, count in enumerate((300, 30)):
        row = {"messages": [{"role": "user", "content": " ".join(["one"] * count)}]}
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(row))
    windows = load_windows(str(tmp_path), tokenizer, 8)
    assert windows.counts.train.tokens == 302
    assert windows.counts.validation.tokens == 32
    (tmp_path / "1.jsonl").unlink()
    with pytest.raises(ValueError, match="has 1 document, which cannot be split"):
        load_windows(str(tmp_path), tokenizer, 8)


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


def test_the_split_of_the_standard_library_is_that_of_the_embedded_model():
    tokenizer = sf.load_tokenizer(sf.EMBEDDED_MODEL)
    read = list(documents.Source("stdlib"))
    ranking = sorted(read, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    windows = load_windows("stdlib", tokenizer, 256)
    held_out = round(0.05 * len(read))
    assert windows.counts.validation.documents == held_out
    ids = [i for d in ranking[:held_out] for i in [*tokenizer.encode(d.text), END]]
    assert windows.counts.validation.tokens == len(ids)
    np.testing.assert_array_equal(windows.validation, cut_windows(np.array(ids, np.int32), 256))


def test_counts_of_a_mixed_folder(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("one two three one")
    lines = [json.dumps({"prompt": "one two ", "completion": "three"})] * 30 + ['{"text": ""}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two two"}]
    table = pyarrow.Table.from_pylist([{"messages": messages}] * 30)
    parquet.write_table(table, tmp_path / "rows.parquet")
    for name in ("a.json", "b.json", "c.png"):
        (tmp_path / name).write_text("[]")

    counts = load_windows(str(tmp_path), tokenizer, 1, 0.1, loss_on="completion").counts
    # Five tokens a text, four a row of JSON lines, of which two count, and seven a chat, of which
    # four count: this template has no header that begins a turn.
    sizes, counted = 40 * 5 + 30 * 4 + 30 * 7, 40 * 5 + 30 * 2 + 30 * 4
    assert counts.train.tokens + counts.validation.tokens == sizes
    assert counts.train.documents + counts.validation.documents == 100
    # The first token of a split is predicted from nothing.
    assert counted - 2 <= counts.train.counted + counts.validation.counted <= counted
    assert counts.validation.tokens == pytest.approx(0.1 * sizes, abs=4)
    assert (counts.unread, counts.empty) == ({".json": 2, ".png": 1}, 1)
    assert counts.turns == "prefix"
    assert counts.lines()[2:] == [
        "the assistant's turns were found by rendered prefixes",
        "files not read, of no known format: 2 .json, 1 .png",
        "empty documents left out: 1",
    ]


@pytest.mark.parametrize("most", [100, 1000])
def test_the_most_tokens_are_the_first(tmp_path, tokenizer, most):
    lines = [json.dumps({"text": " ".join([WORDS[2 + i % 3]] * (i % 9))}) for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    windows = load_windows(str(tmp_path / "rows.jsonl"), tokenizer, 1, 0.2, most_tokens=most)
    whole = load_windows(str(tmp_path / "rows.jsonl"), tokenizer, 1, 0.2)
    total, everything = (
        x.counts.train.tokens + x.counts.validation.tokens for x in (windows, whole)
    )
    assert total == min(most, everything)


def test_the_most_tokens_of_one_text_are_its_beginning(tmp_path, tokenizer):
    write_words(tmp_path / "a.txt", 1000)
    write_words(tmp_path / "b.txt", 150)
    options = {"validation_source": str(tmp_path / "b.txt"), "most_tokens": 100}
    windows = load_windows(str(tmp_path / "a.txt"), tokenizer, 99, **options)
    expected = [*(2 + i % 3 for i in range(99)), END]
    np.testing.assert_array_equal(windows.train, [expected])
    assert windows.counts.validation.tokens == 100
    (tmp_path / "c.jsonl").write_text('{"prompt": "one one", "completion": " two"}')
    with pytest.raises(ValueError, match="most_tokens=2 are fewer than the first document"):
        load_windows(str(tmp_path / "c.jsonl"), tokenizer, 1, most_tokens=2)


def test_windows_without_a_completion_are_left_out(tmp_path, tokenizer):
    rows = [{"prompt": "one " * 20, "completion": "two"}, {"text": "three"}] * 10
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    windows = load_windows(str(tmp_path), tokenizer, 4, 0.2, loss_on="completion")
    for tokens, counted in (
        (windows.train, windows.train_counted),
        (windows.validation, windows.validation_counted),
    ):
        assert counted.any(axis=1).all()
        # Every prompt is made of one word.
        np.testing.assert_array_equal(counted, tokens[:, 1:] != ONE)


def test_a_loss_on_completions_needs_some(tmp_path, tokenizer):
    write_words(tmp_path / "a.txt", 1000)
    with pytest.raises(ValueError, match="has no completions"):
        load_windows(str(tmp_path), tokenizer, 4, loss_on="completion")


def test_what_counts_must_fit_the_windows():
    tokens = np.zeros((2, 5), np.int32)
    with pytest.raises(ValueError, match=r"train_counted must hold a bool for each target, \(2, 4"):
        TokenWindows(tokens, tokens, np.ones((2, 5), bool))
    with pytest.raises(ValueError, match="no target of the validation windows"):
        TokenWindows(tokens, tokens, None, np.zeros((2, 4), bool))


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
