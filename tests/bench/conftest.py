import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

import sparseffn_jax as sf
from sparseffn_jax.bench import comparison, planned
from sparseffn_jax.measure.costs import parameters_ratio
from sparseffn_jax.measure.timing import PairedTimes

TEXT = "\n\n".join(f"def f{i}(x):\n    return x + {i * i % 97}\n" for i in range(600))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Settings that name a tiny dense GPT-2 and a text for it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "corpus.txt").write_text(TEXT)
    vocabulary = {"<|endoftext|>": 0} | {
        token: i + 1 for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=16, n_embd=32, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = sf.GPT2LMHeadModel(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    sf.save_pretrained(folder / "dense", model, params, tokenizer=tokenizer)
    return {"model": str(folder / "dense"), "text": str(folder / "corpus.txt")}


@pytest.fixture
def exact_clock(monkeypatch):
    """Time is what the parameters say it is."""

    def weigh(model, params, train=False):
        return sum(leaf.size for leaf in jax.tree.leaves(params["transformer"]["h"]["0"]["mlp"]))

    def time_stacks(baseline, candidate, x, *, repeats, least_seconds):
        del least_seconds
        return PairedTimes((float(baseline),) * repeats, (float(candidate),) * repeats)

    class Clock:
        def __init__(self, model, tokens):
            del model, tokens

        def prices(self, configs, on_size):
            del on_size
            return {None: 1.0} | {c: parameters_ratio(c) for c in configs if c is not None}

    monkeypatch.setattr(comparison, "ffn_stack", weigh)
    monkeypatch.setattr(comparison, "time_stacks", time_stacks)
    monkeypatch.setattr(planned, "FFNClock", Clock)
