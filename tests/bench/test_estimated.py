"""The prices of a plan for a GPU that is not here, from the shapes of a model alone."""

import jax.numpy as jnp
import pytest
from transformers import LlamaConfig

import sparseffn_jax as sf
from sparseffn_jax.bench.estimated import EstimatedFFNClock, estimate_layer, known_gpu
from sparseffn_jax.bench.estimated_model import (
    EstimatedModelClock,
    compile_pass,
    estimate_model,
)

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=1,
    num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
)  # fmt: skip
TOKENS = 8 * 512


@pytest.fixture
def model():
    return sf.LlamaForCausalLM(CONFIG, dtype=jnp.bfloat16)


@pytest.fixture
def narrow(model):
    return sf.size_ffn(1024, 4096, 0.25, "silu", gated=True, bias=False)


@pytest.mark.parametrize("train", [False, True])
def test_prices_are_times_over_the_dense_layers(model, narrow, train):
    gpu = known_gpu("h100")
    clock = EstimatedFFNClock(model, TOKENS, gpu, train=train)
    done = []
    prices = clock.prices([None, narrow], lambda *counts: done.append(counts))
    assert done == [(1, 2), (2, 2)]
    mode = "training" if train else "forward"
    estimate = estimate_layer(narrow, mode, TOKENS, jnp.bfloat16, gpu)
    assert prices == {None: 1.0, narrow: estimate.seconds / clock.dense_seconds()}
    assert 0.25 < prices[narrow] < 0.5
    assert clock.speedup([narrow, None]) == pytest.approx(2.0 / (1.0 + prices[narrow]))


@pytest.mark.parametrize("train", [False, True])
def test_a_budget_of_ffn_time_gives_the_speedup_of_the_model(model, narrow, train):
    gpu = known_gpu("h100")
    clock = EstimatedFFNClock(model, TOKENS, gpu, train=train)
    whole = EstimatedModelClock(model, 8, 512, clock, gpu, train=train)
    assert whole.speedup([None]) == 1.0
    assert whole.ffn_budget(1.0) == 1.0
    reached, price = whole.speedup([narrow]), clock.prices([narrow])[narrow]
    assert reached > 1.1
    # As nearly as the layer is fused with what lies around it. In training the optimizer has less
    # to do as well, which prices of layers do not know.
    assert (0.0 if train else 0.8 * price) < whole.ffn_budget(reached) < 1.2 * price


@pytest.mark.parametrize("name", ["evaluation", "training step", "decoding"])
def test_a_models_speedup_is_beside_what_its_layers_promise(model, narrow, name):
    gpu = known_gpu("h100")
    compiled = compile_pass(model, name, 8, 512, gpu)
    row = estimate_model(model, compiled, narrow, name, 8, 512, gpu)
    assert row["tokens"] == (8 if name == "decoding" else TOKENS)
    assert row["dense_seconds"] == gpu.seconds(compiled) > row["sparse_seconds"]
    assert row["speedup"] == row["dense_seconds"] / row["sparse_seconds"]
    assert row["ffn_speedup"] > row["promised"] > 1.0
    # In training the optimizer has less to do as well, which layers do not know.
    assert row["speedup"] > 0.9 * row["promised"]
    assert row["sparse_bytes"] < row["dense_bytes"]


def test_a_decoding_step_writes_its_token_into_the_cache_in_place(model):
    program = compile_pass(model, "decoding", 8, 512, known_gpu("h100"))
    cache = 2 * 8 * 512 * 1024 * 2
    assert program.memory.aliased >= cache
    # It reads the weights and the cache once, or little more.
    weights = program.memory.arguments - cache
    assert weights < program.bytes_moved < 1.5 * (weights + 2 * cache)
