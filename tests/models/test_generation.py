import copy
import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tiny_models import LONGROPE

from sparseffn_jax.checkpoints.pretrained import load_pretrained
from sparseffn_jax.config import CoreConfig, MicroRefinementConfig, SparseFFNConfig, SpectralConfig
from sparseffn_jax.models import families, generation
from sparseffn_jax.models.generation import Sampling, generate, left_pad
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.ops.masks import BlockMask

VOCAB, NEW = 97, 64
PROMPTS = [[5, 17, 3, 80, 42, 9, 11], [1], [60, 2, 33], [7, 7, 7, 90]]

COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 80,
}  # fmt: skip
GPT = {"n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 4}
WINDOW = {"use_sliding_window": True, "sliding_window": 6}
SETTINGS = {
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 6, "head_dim": 12},
    "qwen2": {**LLAMA, **WINDOW, "max_window_layers": 1},
    "qwen3": {**LLAMA, **WINDOW, "max_window_layers": 0, "head_dim": 12},
    # All of the texts are long.
    "phi3": {
        **LLAMA, "rope_scaling": LONGROPE, "original_max_position_embeddings": 4,
        "pad_token_id": 0,
    },
    "smollm3": {**LLAMA, "num_hidden_layers": 3, "no_rope_layer_interval": 2, "pad_token_id": 0},
    # A scalar and a depth with which a random model does not say one token again and again.
    "gemma3_text": {
        **LLAMA, "num_hidden_layers": 5, "sliding_window_pattern": 2, "sliding_window": 6,
        "query_pre_attn_scalar": 4, "head_dim": 12, "pad_token_id": 0,
    },
}  # fmt: skip
FAMILIES = {
    name: family.config_class(**copy.deepcopy(SETTINGS[name]), **COMMON)
    for name, family in families.FAMILIES.items()
}


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory):
    @functools.cache
    def make(family):
        return random_pair(family, tmp_path_factory.mktemp(family))

    return make


def random_pair(family, folder):
    """A random model of one family, in PyTorch and loaded from what PyTorch saved."""
    torch = pytest.importorskip("torch")
    config = FAMILIES[family]
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and "weight" in name else 0.0, 0.2)
    reference.save_pretrained(folder)
    loaded = load_pretrained(folder)
    return reference, loaded.model(), loaded.params


def torch_generate(reference, prompts, **settings):
    import torch

    ids, mask = left_pad(prompts)
    out = reference.generate(
        torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask), do_sample=False,
        pad_token_id=0, max_new_tokens=NEW, **settings,
    )  # fmt: skip
    return out[:, ids.shape[1] :].numpy()


def new_tokens(model, params, prompts=PROMPTS, max_new_tokens=NEW, **settings):
    out = np.asarray(generate(model, params, prompts, max_new_tokens, **settings))
    width = max(map(len, prompts))
    np.testing.assert_array_equal(out[:, :width], left_pad(prompts)[0])
    return out[:, width:]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_pytorch(make_pair, family):
    reference, model, params = make_pair(family)
    expected = torch_generate(reference, PROMPTS, eos_token_id=None)
    np.testing.assert_array_equal(new_tokens(model, params), expected)
    # Rows that stay apart and do not settle on one token: else little would have been compared.
    assert all((a != b).any() for a, b in itertools.combinations(expected, 2))
    assert min(len(set(row)) for row in expected.tolist()) > 2


def test_a_cache_that_stops_fitting_is_refused():
    settings = {**copy.deepcopy(SETTINGS["phi3"]), "original_max_position_embeddings": 72}
    family = families.FAMILIES["phi3"]
    model = family(family.config_class(**settings, **COMMON))
    # What is refused before anything runs needs no parameters.
    with pytest.raises(ValueError, match=r"=70 would .* 7 tokens past 72, .* at most 66 tokens"):
        generate(model, {}, PROMPTS, 70)


@pytest.fixture(scope="module")
def greedy(make_pair):
    _, model, params = make_pair("gpt2")
    return model, params, new_tokens(model, params)


def test_end_of_text_ends_its_row_and_the_loop(greedy):
    model, params, free = greedy
    end = int(free[0, 10])
    stopped = new_tokens(model, params, eos_token_id=[end, int(free[1, 20])])
    ends = (end, int(free[1, 20]))
    for row, expected in zip(stopped, free, strict=True):
        places = np.flatnonzero(np.isin(expected, ends))
        length = places[0] + 1 if len(places) else NEW
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert set(row[length:]) <= {row[length - 1]}
    # Every row ends at once: the loop must, and what it has not written must be filled.
    out = new_tokens(model, params, eos_token_id=list(range(VOCAB)))
    np.testing.assert_array_equal(out, np.repeat(free[:, :1], NEW, axis=1))


def test_decoding_in_parts_changes_nothing_and_stops_early(greedy):
    model, params, free = greedy
    sampling = Sampling()
    state = generation.start(model, params, PROMPTS, NEW, sampling)
    for length in (9, 9, 15, 71):
        state = generation.advance(model, params, state, length, sampling)
        assert int(state.length) == max(length, 8)
        np.testing.assert_array_equal(state.tokens[:, 7:length], free[:, : length - 7])
    end = int(free[0, 3])
    state = generation.start(model, params, PROMPTS[:1], NEW, sampling, eos_token_id=end)
    state = generation.advance(model, params, state, 71, sampling, eos_token_id=end)
    assert int(state.length) == 7 + list(free[0]).index(end) + 1


def test_a_length_beyond_the_room_is_refused(greedy):
    model, params, _ = greedy
    state = generation.start(model, params, PROMPTS, 5, Sampling())
    with pytest.raises(ValueError, match="length=13 exceeds the 12 tokens"):
        generation.advance(model, params, state, 13, Sampling())


def test_lists_with_a_mask_are_those_without_padding(greedy):
    model, params, free = greedy
    ids, mask = left_pad(PROMPTS)
    out = generate(model, params, ids.tolist(), NEW, prompt_mask=mask)
    np.testing.assert_array_equal(out[:, ids.shape[1] :], free)


def test_settings_and_equal_models_do_not_compile_again(greedy):
    model, params, _ = greedy
    sizes = [f._cache_size() for f in (generation._prefill, generation._decode)]
    for i, settings in enumerate(
        ({"temperature": 0.5}, {"temperature": 0.9, "top_k": 5}, {"top_p": 0.3, "temperature": 1.0},
         {"repetition_penalty": 1.3, "eos_token_id": 3})
    ):  # fmt: skip
        same = dataclasses.replace(model)
        new_tokens(same, params, key=jax.random.key(i), **settings)
    assert [f._cache_size() for f in (generation._prefill, generation._decode)] == sizes


def test_sampling_follows_its_settings(greedy):
    model, params, free = greedy
    key = jax.random.key(0)
    hot = new_tokens(model, params, temperature=5.0, key=key)
    np.testing.assert_array_equal(hot, new_tokens(model, params, temperature=5.0, key=key))
    assert (hot != new_tokens(model, params, temperature=5.0, key=jax.random.key(1))).any()
    for truncation in ({"top_k": 1}, {"top_p": 1e-6}):
        cold = new_tokens(model, params, temperature=5.0, key=key, **truncation)
        np.testing.assert_array_equal(cold, free)
    assert [len(set(row)) for row in new_tokens(model, params, repetition_penalty=1e6)] == [NEW] * 4


# --- the logits' processors --------------------------------------------------------------------


def random_logits():
    return np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32) * 3


@pytest.mark.parametrize("top_k", [1, 7, VOCAB])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_truncation_equals_transformers(top_k, top_p):
    torch = pytest.importorskip("torch")
    logits = random_logits()
    expected = transformers.TopKLogitsWarper(top_k)(None, torch.tensor(logits))
    expected = transformers.TopPLogitsWarper(top_p)(None, expected).numpy()
    actual = jax.jit(generation.truncate)(logits, np.int32(top_k), np.float32(top_p))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.8])
def test_the_repetition_penalty_equals_transformers(penalty):
    torch = pytest.importorskip("torch")
    logits, ids = random_logits(), np.random.default_rng(1).integers(0, VOCAB, (3, 20))
    process = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = process(torch.tensor(ids), torch.tensor(logits)).numpy()
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    actual = generation.penalize(logits, seen, np.float32(penalty))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_draws_have_the_truncated_distribution():
    logits = np.tile(random_logits()[:1], (20_000, 1))
    settings = generation.as_data(Sampling(1.0, 2.0, top_k=6, top_p=0.9), VOCAB)
    unseen = np.zeros(logits.shape, bool)
    draws = jax.jit(generation.choose)(logits, unseen, settings, jax.random.key(0))
    kept = np.sort(logits[0].astype(np.float64) / 2.0)[::-1][:6]
    p = np.exp(kept - kept.max())
    p /= p.sum()
    p = p[: np.searchsorted(np.cumsum(p), 0.9) + 1]
    counts = np.bincount(draws, minlength=VOCAB)[np.argsort(-logits[0])]
    assert counts[len(p) :].sum() == 0
    np.testing.assert_allclose(counts[: len(p)] / len(logits), p / p.sum(), atol=0.015)


# --- wrong use ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": np.zeros((1, 0), np.int32)}, "the prompt is empty"),
        ({"prompt": [[1, 2], []]}, "prompt 1 is empty"),
        ({"prompt": [[1, VOCAB]]}, f"token id {VOCAB}, vocab_size={VOCAB}"),
        ({"prompt": [[1, -4]]}, "token id -4"),
        ({"prompt_mask": np.array([[1, 1, 0]])}, "padded on the right"),
        ({"prompt_mask": np.array([[1, 0, 1]])}, "has a gap"),
        ({"prompt_mask": np.ones((1, 2))}, r"prompt_mask has shape \(1, 2\)"),
        ({"prompt": [[1, 2], [3]], "prompt_mask": np.ones((2, 2))}, "prompts .* differ in length"),
        ({"prompt": np.array([[1.0, 2.7]])}, "holds 1.0, of dtype float64: give token ids"),
        ({"prompt": [[1, 2], [1.9]]}, "holds 1.9, of dtype float64"),
        ({"prompt": np.array([[True, False]])}, "holds True, of dtype bool"),
        ({"prompt": np.array([[1, 2**40]])}, f"token id {2**40}"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 78}, "81 tokens exceeds n_positions=80"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": 1.0, "key": None}, "sampling needs a key"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": VOCAB + 1}, f"top_k={VOCAB + 1} must lie between 1 and vocab_size={VOCAB}"),
        ({"top_p": 0.0}, "top_p=0.0 must lie above 0"),
        ({"top_p": 1.1}, "top_p=1.1 must lie above 0 and not above 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
    ],
)
def test_wrong_calls_are_refused(greedy, arguments, message):
    model, params, _ = greedy
    good = {"prompt": jnp.array([[1, 2, 3]]), "max_new_tokens": 2, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=message):
        generate(model, params, **{**good, **arguments})


def test_sparse_ffns_decode_what_the_whole_model_says_and_are_packed_before():
    blocks = [[True, False, True, False], [False, True, True, True]]
    core = CoreConfig(
        128,
        BlockMask((16, 32), blocks),
        BlockMask((32, 16), list(zip(*blocks, strict=True))),
        implementation="masked",
    )
    ffn = SparseFFNConfig(
        32,
        128,
        FAMILIES["gpt2"].activation_function,
        SpectralConfig("block_circulant", 64, block_size=8),
        micro=MicroRefinementConfig(core),
    )
    model = GPT2LMHeadModel(FAMILIES["gpt2"], ffns=(ffn, ffn))
    prompt = jnp.array([[5, 17, 3, 80]])
    params = jax.jit(model.init)(jax.random.key(0), prompt)["params"]
    tokens = np.asarray(generate(model, params, prompt, 12))
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens[:, :-1]))
    np.testing.assert_array_equal(tokens[:, 4:], np.argmax(logits[:, 3:], -1))

    # The masked plan puts every block into a matrix of zeros: two a layer, and none while decoding.
    shape = "f32[2,4,16,32]"
    packing = jax.make_jaxpr(functools.partial(generation.pack, model, batch_size=1))(params)
    assert shape in str(packing)
    assert shape not in str(traced_decoding(model, params, prompt).jaxpr)


def test_reading_a_prompt_computes_the_last_logits_alone(greedy):
    model, params, _ = greedy
    prompt = jnp.zeros((2, 40), jnp.int32)
    program = generation._prefill.lower(
        generation._ByValue(model), 12, params, prompt, jnp.zeros(2, jnp.int32),
        jax.random.key(0), generation.as_data(Sampling(), VOCAB), jnp.array([-1]),
    ).compile()  # fmt: skip
    shapes = [
        tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", program.as_text())
    ]
    of_words = {shape for shape in shapes if VOCAB in shape}
    assert (2, VOCAB) in of_words
    assert max(map(math.prod, of_words)) < prompt.size * VOCAB


def traced_decoding(model, params, prompt):
    sampling = generation.as_data(Sampling(), VOCAB)
    state = generation._prefill.eval_shape(
        generation._ByValue(model), 12, params, prompt, jnp.zeros(len(prompt), jnp.int32),
        jax.random.key(0), sampling, jnp.array([-1]),
    )  # fmt: skip
    packed = generation.pack(model, params, len(prompt))
    return generation._decode.trace(
        generation._ByValue(model), params, packed, state, 16, sampling, jnp.array([-1])
    )


def test_decoding_gpt2_copies_no_kernel(greedy):
    model, params, _ = greedy
    program = traced_decoding(model, params, jnp.array([[5, 17, 3, 80]])).lower().compile()
    kernels = r"f32\[(32,(32|96|128)|(96|128),32)\]\S* (copy|transpose)\("
    assert re.findall(kernels, program.as_text()) == []
