import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import GPT2Config

from sparseffn_jax.checkpoints.tokenizers import load_tokenizer
from sparseffn_jax.defaults import EMBEDDED_MODEL
from sparseffn_jax.models import generation
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.models.text_generation import generate_text, stream_text

TEXT = "naïve 日本語 🎉 class Foo: pass\nreturn 1"
PROMPTS = ["def f():\n", "π = 3", "x"]


class Reciter(nn.Module):
    """Has one script a row and writes its tokens, whatever it reads."""

    config: GPT2Config
    ffns: tuple = ()
    dtype: type = jnp.float32

    @property
    def spec(self):
        return GPT2LMHeadModel.spec_of(self.config)

    cache_border = staticmethod(GPT2LMHeadModel.cache_border)

    def __call__(self, *args, **kwargs):
        return self.last_hidden_state(*args, **kwargs)

    @nn.compact
    def last_hidden_state(
        self, input_ids, attention_mask=None, position_ids=None, init_cache=False
    ):
        script = self.param("script", nn.initializers.zeros, (len(input_ids), 99), jnp.int32)
        read = self.variable("cache", "read", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            read.value += 1
        token = jax.lax.dynamic_index_in_dim(script, read.value - 1, 1)
        logits = jax.nn.one_hot(token, self.config.vocab_size)
        return jnp.broadcast_to(logits, (*input_ids.shape, self.config.vocab_size))

    def head(self):
        return types.SimpleNamespace(logits=lambda hidden: hidden)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED_MODEL)


def recite(tokenizer, texts, function=generate_text, ended=True, **settings):
    model = Reciter(GPT2Config(vocab_size=len(tokenizer), n_positions=256))
    script = np.full((len(texts), 99), tokenizer.encode("!")[0])
    for row, text in zip(script, texts, strict=True):
        ids = text if isinstance(text, list) else tokenizer.encode(text)
        row[: len(ids) + 1] = [*ids, tokenizer.eos_token_id]
        if not ended:
            row[len(ids) :] = ids[-1]
    settings.setdefault("max_new_tokens", 98)
    return function(
        model, {"script": script}, tokenizer, PROMPTS[: len(texts)], **settings
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 98])
def test_pieces_are_whole_characters_and_add_up(tokenizer, chunk):
    pieces = list(recite(tokenizer, [TEXT, "a", "🎉🎉"], stream_text, chunk=chunk))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == [TEXT, "a", "🎉🎉"]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for row in pieces for piece in row)
    # The emoji takes several tokens here, or the test would show nothing.
    assert len(tokenizer.encode("🎉")) > 1
    tokens = len(tokenizer.encode(TEXT)) + 1
    assert len(pieces) == 1 + -(-(tokens - 1) // chunk)


def test_an_unfinished_character_comes_at_the_end(tokenizer):
    ids = tokenizer.encode("a 🎉")[:-1]
    pieces = [piece for (piece,) in recite(tokenizer, [ids], stream_text)]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[-1].endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("chunk", [1, 5, 98])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["class"], "naïve 日本語 🎉 "),
        (["pass\nreturn 2", "ass\nr"], "naïve 日本語 🎉 class Foo: p"),
        (["Foo", "cl"], "naïve 日本語 🎉 "),
        (["日本語"], "naïve "),
        (["nothing like it"], TEXT),
        (["return 12"], TEXT),
    ],
)
def test_stop_strings(tokenizer, stop, expected, chunk):
    pieces = list(recite(tokenizer, [TEXT, "tick"], stream_text, stop=stop, chunk=chunk))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == [expected, "tick"]


def test_a_stopped_row_stops_the_loop(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "sparseffn_jax.models.text_generation.advance",
        lambda *args, **kwargs: asked.append(args[3]) or generation.advance(*args, **kwargs),
    )
    assert recite(tokenizer, [TEXT], ended=False, stop=["naïve"]) == [""]
    assert len(asked) == 1


def test_a_stream_packs_its_weights_once(tokenizer, monkeypatch):
    packed, pack = [], generation.pack

    def counted(*args):
        packed.append(args)
        return pack(*args)

    monkeypatch.setattr("sparseffn_jax.models.text_generation.pack", counted)
    monkeypatch.setattr(generation, "pack", counted)
    assert len(list(recite(tokenizer, [TEXT], stream_text))) > 2
    assert len(packed) == 1


def test_the_limit_cuts_and_padding_changes_nothing(tokenizer):
    ids = tokenizer.encode(TEXT)
    expected = [tokenizer.decode(ids[:7])] * 2
    assert recite(tokenizer, [TEXT, TEXT], max_new_tokens=7) == expected
    assert recite(tokenizer, [TEXT, TEXT], max_new_tokens=7, least_length=40) == expected


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a stop string is empty"):
        recite(tokenizer, [TEXT], stop=["a", ""])


@pytest.mark.parametrize("chunk", [0, -1])
def test_pieces_of_no_token_are_refused(tokenizer, chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk} must be at least 1"):
        next(recite(tokenizer, [TEXT], stream_text, chunk=chunk))


def test_no_new_token_is_refused_as_such(tokenizer):
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        recite(tokenizer, [TEXT], max_new_tokens=0)


def test_a_string_is_one_prompt(tokenizer):
    def write(model, params, tokenizer, prompts, **settings):
        return generate_text(model, params, tokenizer, prompts[0], **settings)

    assert recite(tokenizer, [TEXT], write) == [TEXT]
