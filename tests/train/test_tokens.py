"""Which tokens a loss on completions counts, against what the texts say."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparseffn_jax.train.data import join_tokens, load_windows
from sparseffn_jax.train.documents import Chat, Completion, Document
from sparseffn_jax.train.tokens import tokenize

pytest.importorskip("jinja2")

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# Llama 2's and Mistral's form: the prompt ends with the user's turn.
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}"
    "</s>{% endif %}{% endfor %}"
)
# Phi 3's: an end-of-text token where the assistant is not asked to go on.
ENDING = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}|\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% else %}</s>{% endif %}"
)
# Some put the system's message into the last turn of the user.
UNSTABLE = (
    "{% for m in messages %}{% if loop.last %}<s>last{% endif %}<s>{{ m.role }}\n{{ m.content }}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TURNS = [
    {"role": role, "content": content}
    for role, content in (
        ("system", "be kind"),
        ("user", "hi  there"),
        ("assistant", "hé, you"),
        ("user", "what?"),
        ("assistant", " nothing\n"),
        ("user", "bye"),
    )
]


def make_tokenizer(template=None):
    """Returns a tokenizer of bytes, with two words that merge over the borders of a prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "n")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return tokenizer


def counted_text(tokenizer, tokens):
    """Returns the tokens that count as texts, one for each run of them."""
    edges = np.flatnonzero(np.diff(np.pad(tokens.counted, 1).astype(int)))
    return [tokenizer.decode(tokens.ids[a:b]) for a, b in edges.reshape(-1, 2)]


def one(document, tokenizer, loss_on="completion"):
    (tokens,) = tokenize([document], tokenizer, loss_on)
    assert tokens.ids.dtype == np.int32
    assert tokens.ids.shape == tokens.counted.shape
    return tokens


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["hé, you</s>\n", " nothing\n</s>\n"]),
        (MARKED, ["hé, you</s>", " nothing\n</s>"]),
        (INSTRUCT, [" hé, you</s>", "  nothing\n</s>"]),
        (ENDING, ["hé, you|\n", " nothing\n|\n"]),
    ],
)
def test_what_the_assistant_says_counts(template, expected):
    tokenizer = make_tokenizer(template)
    turns = [turn for turn in TURNS if template is not INSTRUCT or turn["role"] != "system"]
    tokens = one(Chat("a", "a", turns), tokenizer)
    assert counted_text(tokenizer, tokens) == expected
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    np.testing.assert_array_equal(tokens.ids[: len(whole)], whole)
    assert one(Chat("a", "a", turns), tokenizer, "all").counted.all()


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_turns_of_a_prompt_do_not_count(template):
    tokenizer = make_tokenizer(template)
    tokens = one(Chat("a", "a", TURNS[:5], given=4), tokenizer)
    assert [text.rstrip("\n") for text in counted_text(tokenizer, tokens)] == [" nothing\n</s>"]
    assert counted_text(tokenizer, one(Chat("a", "a", TURNS[:2]), tokenizer)) == []


def test_a_template_that_shows_no_turns_is_refused():
    tokenizer = make_tokenizer(UNSTABLE)
    with pytest.raises(ValueError, match=r"^x.jsonl, line 7: .*generation"):
        one(Chat("a", "x.jsonl, line 7", TURNS), tokenizer)
    assert one(Chat("a", "x.jsonl, line 7", TURNS), tokenizer, "all").counted.all()


def test_chats_need_a_template_that_takes_them():
    with pytest.raises(ValueError, match=r"^x.jsonl, line 7: messages need a chat template"):
        one(Chat("a", "x.jsonl, line 7", TURNS), make_tokenizer())
    refusing = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"^x.jsonl, line 7: .* roles must alternate; found \["):
        one(Chat("a", "x.jsonl, line 7", TURNS), refusing)


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("one ", "two", ["two</s>"]),
        # A token with a part of both counts.
        ("one a", "b two", ["ab two</s>"]),
        ("", "two", ["two</s>"]),
        ("one", " two</s>", [" two</s>"]),
    ],
)
def test_what_follows_a_prompt_counts(prompt, completion, expected):
    tokenizer = make_tokenizer()
    tokens = one(Completion("a", prompt, completion), tokenizer)
    assert tokenizer.decode(tokens.ids) == (prompt + completion).removesuffix("</s>") + "</s>"
    assert counted_text(tokenizer, tokens) == expected
    assert one(Completion("a", prompt, completion), tokenizer, "all").counted.all()


def test_texts_have_no_prompt():
    tokenizer = make_tokenizer()
    tokens = one(Document("a", "one"), tokenizer)
    assert (tokenizer.decode(tokens.ids), tokens.counted.all()) == ("one</s>", True)


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_what_parts_chats_is_not_theirs_to_say(loss_on):
    tokenizer = make_tokenizer("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokens = one(Chat("a", "a", TURNS[1:3]), tokenizer, loss_on)
    assert tokens.ids[-1] == tokenizer.eos_token_id
    assert tokens.counted[-1] == (loss_on == "all")


def test_many_documents_are_as_one_by_one():
    tokenizer = make_tokenizer(CHATML)
    documents = [Document("a", "one"), Completion("b", "one", "two"), Chat("c", "c", TURNS)] * 900
    together = list(tokenize(documents, tokenizer, "completion"))
    assert [tokens.document for tokens in together] == documents
    for document, tokens in zip(documents[-3:], together[-3:], strict=True):
        alone = one(document, tokenizer)
        np.testing.assert_array_equal(tokens.ids, alone.ids)
        np.testing.assert_array_equal(tokens.counted, alone.counted)


def test_texts_stay_whole_whatever_the_tokenizer_was_last_called_for(tmp_path):
    plain, cutting = make_tokenizer(), make_tokenizer()
    backend = cutting.backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=64, pad_id=5, pad_token="!")
    kept = backend.truncation, backend.padding
    documents = [Document("a", "one two three"), Completion("b", "one ", "two")]
    for loss_on in ("all", "completion"):
        for whole, tokens in zip(
            tokenize(documents, plain, loss_on), tokenize(documents, cutting, loss_on), strict=True
        ):
            np.testing.assert_array_equal(tokens.ids, whole.ids)
            np.testing.assert_array_equal(tokens.counted, whole.counted)
    np.testing.assert_array_equal(*(join_tokens(documents[:1], t)[0] for t in (plain, cutting)))
    (tmp_path / "a.txt").write_text("one two three\n\n" * 30)
    for most in (None, 100):
        windows = [
            load_windows(str(tmp_path), each, 8, 0.2, most_tokens=most) for each in (plain, cutting)
        ]
        np.testing.assert_array_equal(windows[1].train, windows[0].train)
    assert (backend.truncation, backend.padding) == kept
