"""Against the real Flax models, which live in transformers < 5."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tiny_models import POSITIONS, VOCAB, make_config

from sparseffn_jax.models.decoder import init_cache
from sparseffn_jax.models.families import FAMILIES

if int(transformers.__version__.split(".")[0]) >= 5:
    pytest.skip("transformers 5 has no Flax models", allow_module_level=True)

BATCH, TOKENS = 3, 12

# Flax's LLaMA and Mistral know no rope_theta, rope_scaling, head_dim, mlp_bias or tied head.
CONFIGS = {
    "gpt2": {
        "default": {},
        "gelu": {"activation_function": "gelu", "n_head": 8},
        "relu-inner": {"activation_function": "relu", "n_inner": 40, "n_layer": 3},
        "silu-one-head": {"activation_function": "silu", "n_head": 1},
        "epsilon": {"layer_norm_epsilon": 0.3},
        "untied": {"tie_word_embeddings": False},
        "untied-quick-gelu": {"tie_word_embeddings": False, "activation_function": "quick_gelu"},
    },
    "gptj": {
        "default": {},
        "gelu-inner": {"activation_function": "gelu", "n_inner": 40, "n_layer": 3},
        "whole-head": {"rotary_dim": 8, "activation_function": "relu"},
        "epsilon": {"rotary_dim": 6, "layer_norm_epsilon": 0.3},
    },
    "llama": {
        "default": {},
        "one-for-all-heads": {"num_key_value_heads": 1, "num_hidden_layers": 3},
        "attention-bias": {"attention_bias": True, "num_key_value_heads": 4},
        "epsilon-gelu": {"rms_norm_eps": 0.3, "hidden_act": "gelu"},
    },
    "mistral": {
        "default": {},
        "no-window": {"sliding_window": None, "num_key_value_heads": 4},
        "itself-and-one": {"sliding_window": 2, "hidden_act": "relu"},
        "wide": {"sliding_window": 12, "num_hidden_layers": 3, "rms_norm_eps": 1e-2},
    },
}


def random_flax_model(name, **changes):
    """Returns Flax's model and parameters for it, and our config of the same."""
    config = make_config(name, **changes)
    theirs = make_config(name, **changes)
    if name == "mistral":
        # Flax counts the tokens before a token, PyTorch (and we) the token too; none is 0 there.
        theirs.sliding_window = (config.sliding_window or POSITIONS) - 1
    classes = {"gpt2": "FlaxGPT2LMHeadModel", "gptj": "FlaxGPTJForCausalLM"}
    flax_class = classes.get(name, f"Flax{name.capitalize()}ForCausalLM")
    model = getattr(transformers, flax_class)(theirs, _do_init=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype),
        flax.core.unfreeze(model.params_shape_tree),
    )
    return model, params, config


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize(("name", "variant"), [(n, v) for n in CONFIGS for v in CONFIGS[n]])
def test_its_params_apply_unchanged(name, variant, padding):
    reference, params, config = random_flax_model(name, **CONFIGS[name][variant])
    model = FAMILIES[name](config)
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


@pytest.mark.parametrize("name", CONFIGS)
def test_its_cache_decodes_alike(name):
    reference, params, config = random_flax_model(name)
    model = FAMILIES[name](config)
    ids = jax.random.randint(jax.random.key(0), (BATCH, TOKENS), 0, VOCAB)
    cache, past = init_cache(model, BATCH, 20), reference.init_cache(BATCH, 20)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, flax.core.unfreeze(past))
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
