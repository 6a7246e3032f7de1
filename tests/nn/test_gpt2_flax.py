"""Against the real FlaxGPT2LMHeadModel, which lives in transformers < 5."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers import GPT2Config

from sparseffn_jax.nn.decoder import init_cache
from sparseffn_jax.nn.gpt2 import GPT2LMHeadModel

if int(transformers.__version__.split(".")[0]) >= 5:
    pytest.skip("transformers 5 has no FlaxGPT2LMHeadModel", allow_module_level=True)

BATCH, TOKENS, VOCAB = 3, 12, 97

CONFIGS = {
    "default": {},
    "gelu": {"activation_function": "gelu", "n_head": 8},
    "relu-inner": {"activation_function": "relu", "n_inner": 40, "n_layer": 3},
    "silu-one-head": {"activation_function": "silu", "n_head": 1},
    "epsilon": {"layer_norm_epsilon": 0.3},
    "untied": {"tie_word_embeddings": False},
    "untied-quick-gelu": {"tie_word_embeddings": False, "activation_function": "quick_gelu"},
}


def random_flax_model(**changes):
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": VOCAB}
    config = GPT2Config(**{**small, **changes})
    model = transformers.FlaxGPT2LMHeadModel(config, _do_init=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype),
        flax.core.unfreeze(model.params_shape_tree),
    )
    return model, params


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_its_params_apply_unchanged(name, padding):
    reference, params = random_flax_model(**CONFIGS[name])
    model = GPT2LMHeadModel(reference.config)
    ids = jax.random.randint(jax.random.key(0), (BATCH, TOKENS), 0, VOCAB)
    ours = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), ours)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)

    mask = np.ones((BATCH, TOKENS), np.int32)
    for row, count in enumerate((0, 3, 7)):
        if padding == "right":
            mask[row, TOKENS - count :] = 0
        elif padding == "left":
            mask[row, :count] = 0
    positions = np.tile(np.arange(TOKENS), (BATCH, 1))
    expected = reference(ids, mask, positions, params=params).logits
    actual = model.apply({"params": params}, ids, None if padding is None else mask, positions)
    real = mask.astype(bool)
    np.testing.assert_allclose(actual[real], expected[real], atol=1e-4, rtol=0)


def test_its_cache_decodes_alike():
    reference, params = random_flax_model()
    model = GPT2LMHeadModel(reference.config)
    ids = jax.random.randint(jax.random.key(0), (BATCH, TOKENS), 0, VOCAB)
    cache, past = init_cache(model, BATCH, 20), reference.init_cache(BATCH, 20)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, past)
    for start, end in ((0, 7), (7, 8), (8, 9)):
        positions = jnp.tile(jnp.arange(start, end), (BATCH, 1))
        expected = reference(
            ids[:, start:end],
            params=params,
            attention_mask=jnp.ones((BATCH, 20), jnp.int32),
            position_ids=positions,
            past_key_values=past,
        )
        past = expected.past_key_values
        actual, changed = model.apply(
            {"params": params, "cache": cache}, ids[:, start:end], mutable=["cache"]
        )
        cache = changed["cache"]
        np.testing.assert_allclose(actual, expected.logits, atol=1e-4, rtol=0)
