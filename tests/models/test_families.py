"""All families but GPT-2 against PyTorch, and what every family promises."""

import itertools
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import (
    D_FF,
    LONGROPE,
    POSITIONS,
    VOCAB,
    D,
    from_torch,
    make_config,
    make_ids,
    make_model,
    random_torch_model,
    shapes_of,
)

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.models.decoder import ffn_module, init_cache, layers_of
from sparseffn_jax.models.families import FAMILIES, family
from sparseffn_jax.models.llama import check_windows, layer_window
from sparseffn_jax.models.paths import is_attention_kernel, is_attention_or_norm
from sparseffn_jax.nn.lora import init_lora
from sparseffn_jax.nn.rotary import rotary_table
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.train.sharding import leaf_sharding

BATCH, TOKENS = 3, 12
# GPT-2 has tests of its own.
NEW = [name for name in FAMILIES if name != "gpt2"]

CONFIGS = {
    "gptj": {
        "default": {},
        "gelu-inner": {"activation_function": "gelu", "n_inner": 40, "n_layer": 3},
        "whole-head": {"rotary_dim": 8, "activation_function": "relu"},
        "one-head": {"rotary_dim": 6, "n_head": 1},
        "epsilon": {"rotary_dim": 2, "layer_norm_epsilon": 0.3},
    },
    "llama": {
        "default": {},
        "every-head-its-own": {"num_key_value_heads": 4, "rope_theta": 100.0},
        "biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        "tied-head-dim": {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
        "epsilon": {"rms_norm_eps": 0.3, "num_hidden_layers": 3},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        "old-linear": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 50.0},
        "dynamic": {
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 7,
        },
        "llama3": {
            "rope_theta": 50.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    },
    "mistral": {
        "default": {},
        "no-window": {"sliding_window": None, "num_key_value_heads": 4},
        "head-dim": {"head_dim": 16, "sliding_window": 3, "hidden_act": "relu"},
        "tied-wide": {"tie_word_embeddings": True, "sliding_window": 12, "rope_theta": 100.0},
        "itself": {"sliding_window": 1},
        "epsilon": {"rms_norm_eps": 0.3},
    },
    "qwen2": {
        "default": {},
        "no-window": {"use_sliding_window": False, "rope_theta": 100.0},
        "tied-wide": {"tie_word_embeddings": True, "num_key_value_heads": 4, "sliding_window": 9},
        "windows-first": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
        },
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rms_norm_eps": 0.3},
    },
    "qwen3": {
        "default": {},
        "epsilon": {"rms_norm_eps": 0.3, "rope_theta": 100.0},
        "biases": {"attention_bias": True, "num_key_value_heads": 4, "num_hidden_layers": 3},
        "tied-window": {
            "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4,
            "max_window_layers": 1, "head_dim": 8,
        },
    },
    "phi3": {
        # Twelve tokens are a long text, as 8 were the longest of pretraining.
        "default": {},
        "short-text": {"original_max_position_embeddings": 16},
        "unscaled": {"rope_scaling": None, "sliding_window": 5, "rms_norm_eps": 0.3},
        "half-a-head": {
            "rope_scaling": None, "partial_rotary_factor": 0.5, "num_key_value_heads": 4,
        },
        "tied-half-a-head": {
            "tie_word_embeddings": True, "partial_rotary_factor": 0.5, "num_hidden_layers": 3,
            "rope_scaling": {
                "type": "longrope", "long_factor": [1.5, 4.0], "short_factor": [1.0, 1.2],
            },
        },
    },
    "smollm3": {
        "default": {},
        "every-third": {
            "no_rope_layers": None, "no_rope_layer_interval": 3, "num_hidden_layers": 3,
        },
        "window-without-positions": {"use_sliding_window": True, "sliding_window": 4},
        "biases": {
            "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
        "epsilon": {"rms_norm_eps": 0.3, "rope_theta": 100.0},
    },
    "gemma3_text": {
        "default": {},
        "untied-biases": {
            "tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 4,
        },
        "bases": {"rope_theta": 100.0, "rope_local_base_freq": 30.0, "rms_norm_eps": 0.1},
        "windows-last": {
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3, "query_pre_attn_scalar": 8, "head_dim": 8,
        },
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 3},
    },
}  # fmt: skip
# What the installed transformers has.
ALL_CONFIGS = [(name, variant) for name in NEW for variant in CONFIGS[name]]


def sparse_ffn(name):
    spec = FAMILIES[name].spec_of(make_config(name))
    return SparseFFNConfig(
        D,
        spec.d_ff,
        spec.activation,
        spectral=SpectralConfig(transform="low_rank", width=40, rank=8),
        polynomial=PolynomialConfig(degree=3),
        micro=MicroRefinementConfig(core=CoreConfig(width=16)),
        gated=spec.gated,
        bias=spec.ffn_bias,
    )


def run(model, params, *args, **kwargs):
    # Not jitted: the small programs of one model's operations serve the next model too.
    return model.apply({"params": params}, *args, **kwargs)


def left_padding():
    """Rows with 0, 3 and 7 padded positions, and positions that count real tokens."""
    mask = np.ones((BATCH, TOKENS), np.int32)
    mask[1, :3] = mask[2, :7] = 0
    return mask, np.maximum(np.cumsum(mask, 1) - 1, 0)


# --- parity with PyTorch -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), ALL_CONFIGS)
def test_logits_equal_pytorch(name, variant):
    torch = pytest.importorskip("torch")
    config = make_config(name, **CONFIGS[name][variant])
    reference, model = random_torch_model(config), FAMILIES[name](config)
    params, ids = from_torch(reference), np.asarray(make_ids())
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes_of(model))
    mask, positions = left_padding()
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits
        padded = reference(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
        ).logits
    actual = run(model, params, ids)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    actual, real = run(model, params, ids, mask, positions), mask.astype(bool)
    np.testing.assert_allclose(actual[real], padded.numpy()[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NEW)
def test_bfloat16_logits_equal_pytorch(name):
    torch = pytest.importorskip("torch")
    config = make_config(name)
    reference = random_torch_model(config).bfloat16()
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), from_torch(reference))
    model = FAMILIES[name](config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    ids = np.asarray(make_ids())
    logits = run(model, params, ids)
    assert logits.dtype == jnp.float32
    with torch.no_grad():
        # The same rounded weights: once in PyTorch's bfloat16, once in float32.
        for expected in (reference(torch.tensor(ids)), reference.float()(torch.tensor(ids))):
            expected = expected.logits.float().numpy()
            error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
            assert error < 3e-2


@pytest.mark.parametrize("name", NEW)
def test_the_parity_configs_differ_from_one_another(name):
    """Among those whose parameters have one shape: whatever one flips must change the numbers."""
    default = shapes_of(FAMILIES[name](make_config(name)))
    logits = []
    for variant, changes in CONFIGS[name].items():
        model = FAMILIES[name](make_config(name, **changes))
        if jax.tree.map(jnp.shape, shapes_of(model)) == jax.tree.map(jnp.shape, default):
            logits.append((variant, run(model, make_model(name)[1], make_ids())))
    assert len(logits) > 1
    for (_, one), (_, other) in itertools.combinations(logits, 2):
        assert jnp.abs(one - other).max() > 1e-3


# --- decoding ----------------------------------------------------------------------------------

DECODED = [
    ("gptj", "default", False),
    ("llama", "llama3", False),
    ("llama", "default", True),
    # Twelve tokens: far beyond a window of 3 or 5.
    ("mistral", "default", False),
    ("mistral", "head-dim", True),
    ("qwen2", "default", True),
    ("phi3", "short-text", False),
    ("phi3", "unscaled", True),
    ("smollm3", "window-without-positions", False),
    ("gemma3_text", "default", True),
    ("gemma3_text", "windows-last", False),
]


@pytest.mark.parametrize(
    ("name", "variant", "sparse"), [case for case in DECODED if case[0] in FAMILIES]
)
def test_cached_decoding_equals_the_full_forward(name, variant, sparse):
    config = make_config(name, **CONFIGS[name][variant])
    model, params = make_model(name, (sparse_ffn(name), None) if sparse else (), config)
    mask, positions = (jnp.array(part) for part in left_padding())
    ids, length = make_ids(), TOKENS + 2
    cache_mask = jnp.pad(mask, ((0, 0), (0, length - TOKENS)), constant_values=1)

    @jax.jit
    def step(cache, ids, positions):
        variables = {"params": params, "cache": cache}
        logits, changed = model.apply(variables, ids, cache_mask, positions, mutable=["cache"])
        return changed["cache"], logits

    cache, pieces = init_cache(model, BATCH, length), []
    for start, end in [(0, 4), *((t, t + 1) for t in range(4, TOKENS))]:
        cache, logits = step(cache, ids[:, start:end], positions[:, start:end])
        pieces.append(logits)
    actual, full = jnp.concatenate(pieces, 1), run(model, params, ids, mask, positions)
    real = np.asarray(mask, bool)
    np.testing.assert_allclose(actual[real], full[real], atol=5e-5, rtol=0)
    # Padding has no influence at all: the last row alone, without its seven padded positions.
    alone = run(model, params, ids[2:, 7:])
    np.testing.assert_allclose(actual[2:, 7:], alone, atol=5e-5, rtol=0)


def test_without_positions_decoding_counts_on():
    model, params = make_model("llama")
    ids, cache = make_ids(), init_cache(model, BATCH, TOKENS)
    for end in (5, 6):
        start = 0 if end == 5 else 5
        logits, state = run_cached(model, params, cache, ids[:, start:end])
        cache = state["cache"]
    np.testing.assert_allclose(logits[:, 0], run(model, params, ids)[:, 5], atol=1e-5, rtol=0)


def run_cached(model, params, cache, ids):
    return model.apply({"params": params, "cache": cache}, ids, mutable=["cache"])


# --- what a training run relies on -------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
def test_no_token_sees_its_future(name):
    model, params = make_model(name, (sparse_ffn(name), None))
    forward = jax.jit(lambda ids: model.apply({"params": params}, ids))
    ids = make_ids()
    before = forward(ids)
    for t in (0, 5, 11):
        after = forward(ids.at[:, t].set((ids[:, t] + 1) % VOCAB))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        moved = (jnp.abs(before - after).max(-1) > 0)[:, t:]
        # Two layers of windows of five reach eight tokens ahead.
        assert moved[:, : 9 if name == "mistral" else None].all()
        assert name != "mistral" or not moved[:, 9:].any()


@pytest.mark.parametrize("name", NEW)
def test_remat_and_dropout(name):
    rate = {"attn_pdrop": 0.5} if name == "gptj" else {"attention_dropout": 0.5}
    config = make_config(name, **rate)
    model, params = make_model(name, (sparse_ffn(name), None), config)
    rematerialised = FAMILIES[name](config, (sparse_ffn(name), None), remat=True)
    ids = jnp.tile(make_ids(shape=(1, TOKENS)), (2, 1))

    @partial(jax.jit, static_argnums=0)
    def loss_and_grads(remat, params):
        def loss(params):
            rngs = {"dropout": jax.random.key(0, impl="rbg")}
            logits = (rematerialised if remat else model).apply(
                {"params": params}, ids, deterministic=False, rngs=rngs
            )
            return (jax.nn.logsumexp(logits, -1) ** 2).mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    grads, logits = loss_and_grads(False, params)
    # One document twice: rows that drop alike would give equal logits.
    assert jnp.abs(logits[0] - logits[1]).max() > 1e-3
    again, same_logits = loss_and_grads(True, params)
    np.testing.assert_allclose(logits, same_logits, atol=1e-5, rtol=0)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(again), strict=True):
        assert jnp.abs(one).max() > 0
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


# --- what the library asks a family ------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_says_of_itself(name):
    config = make_config(name)
    spec = FAMILIES[name].spec_of(config)
    assert (spec.n_layer, spec.d_model, spec.d_ff) == (2, D, D_FF[name])
    assert spec.n_positions == POSITIONS
    assert spec.gated == (name not in ("gpt2", "gptj"))
    model, params = make_model(name)
    assert model.spec == spec
    kernels = jax.tree.leaves(layers_of(model, params)[0]["mlp"])
    assert sum(leaf.ndim == 2 for leaf in kernels) == (3 if spec.gated else 2)
    assert any(leaf.ndim == 1 for leaf in kernels) == spec.ffn_bias
    # The FFN alone, on what the model gave it, is what the model used.
    _, state = run(model, params, make_ids(), mutable=["intermediates"])
    x = layers_of(model, state["intermediates"])[1]["ffn_input"][0]
    y = ffn_module(model, 1).apply({"params": layers_of(model, params)[1]["mlp"]}, x)
    assert y.shape == x.shape == (BATCH, TOKENS, D)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 2 * POSITIONS),
        ({"rope_type": "dynamic", "factor": 1.5}, 36),
        (None, POSITIONS),
    ],
)
def test_scaling_lengthens_the_context(scaling, positions):
    config = make_config("llama", rope_scaling=scaling)
    assert FAMILIES["llama"].spec_of(config).n_positions == positions


@pytest.mark.parametrize("ratio", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sparse_ffn_sized_for_a_family(name, ratio):
    ffn = size_model(FAMILIES[name].spec_of(make_config(name)), ratio)
    assert 0.85 * ratio < flops_ratio(ffn) <= ratio
    shapes = shapes_of(FAMILIES[name](make_config(name), (ffn, None)))
    collection = shapes[FAMILIES[name].layer_path[0]][FAMILIES[name].layer_path[1]]
    assert ("bias" in collection["0"]["mlp"]) == (not ffn.gated)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_is_dealt_out_and_hidden_units_over_the_tensor_axis(name):
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    params = shapes_of(FAMILIES[name](make_config(name), (sparse_ffn(name), None)))
    params["lora"] = jax.eval_shape(
        lambda key: init_lora(key, params, 2, is_attention_kernel), jax.random.key(0)
    )
    hidden = {D_FF[name], 40, 16}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        spec = leaf_sharding(mesh, path, leaf.shape).spec
        if leaf.ndim == 2 and path[-1].key != "polynomial":
            assert any(spec), path
        for size, axis in zip(leaf.shape, spec, strict=False):
            assert size not in hidden or axis == "tensor", path


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_and_norms_are_what_the_family_calls_them(name):
    paths = list(flatten_dict(shapes_of(FAMILIES[name](make_config(name)))))
    # What is left of a block without its FFN, and of the body without its embeddings.
    expected = {
        path
        for path in paths
        if "mlp" not in path and path[-1] != "embedding" and path[0] != "lm_head"
    }
    assert {path for path in paths if is_attention_or_norm(path)} == expected
    used = {part for path in expected for part in path}
    assert used >= {FAMILIES[name].attention, *FAMILIES[name].norms}
    kernels = {path for path in expected if path[-1] == "kernel"}
    assert {path for path in paths if is_attention_kernel(path)} == kernels


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"'bert': known .* are gpt2, gptj, llama, mistral, qwen2"):
        family("bert")
    with pytest.raises(ValueError, match="'gemma3': that is Gemma 3 with images; give the text"):
        family("gemma3")


REFUSED = [
    ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ("gptj", {"n_head": 5}, "n_head=5 does not divide n_embd=32"),
    ("gptj", {"rotary_dim": 12}, "rotary_dim=12 exceeds the 8 channels"),
    ("gptj", {"rotary_dim": 3}, "3 rotary channels"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_att"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn': exp"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0"),
    ("mistral", {"hidden_act": "sillu"}, "unknown activation 'sillu'"),
    ("qwen2", {"sliding_window": 0}, "sliding_window=0: sliding_attention needs"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types=.*expected full_att"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0: expected a pos"),
    ("phi3", {"rope_scaling": None, "partial_rotary_factor": 0.4}, "gives 3 rotary channels"),
    ("phi3", {"rope_scaling": None, "partial_rotary_factor": 2.0}, "gives 16 rotary channels"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "a model of embeddings"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window=None: sliding_attention needs"),
    ("smollm3", {"no_rope_layers": [2, 1]}, r"no_rope_layers=\[2, 1\]: expected"),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"), [case for case in REFUSED if case[0] in FAMILIES]
)
def test_a_config_it_cannot_honour_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(FAMILIES[name](make_config(name, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"long_factor": [1.0, 2.0, 3.0]}, r"long_factor=\[1.0, 2.0, 3.0\]: longrope needs 4 pos"),
        ({"short_factor": [1.0, 0.0, 1.0, 1.0]}, r"short_factor=.*: longrope needs 4 positive"),
        ({"short_factor": None}, r"short_factor=None: longrope needs 4 positive"),
        ({"factor": 2.0}, r"factor=2.0: longrope needs .*24 over .*=8, 3, or none"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings=0: .*positive"),
    ],
)
def test_longrope_that_transformers_lets_pass(changes, message):
    given = {**LONGROPE, "rope_type": "longrope", "rope_theta": 10000.0}
    given |= {"original_max_position_embeddings": 8, **changes}
    config = types.SimpleNamespace(rope_parameters=given, max_position_embeddings=POSITIONS)
    with pytest.raises(ValueError, match=message):
        rotary_table(jnp.zeros((1, 1), jnp.int32), 8, config)


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"use_sliding_window": False, "max_window_layers": 1}, [None, None, None]),
        ({"use_sliding_window": True, "max_window_layers": 1}, [None, 4, 4]),
        ({"sliding_window_pattern": 3}, [4, 4, None]),
    ],
)
def test_windows_of_configs_without_layer_types(settings, windows):
    config = types.SimpleNamespace(num_hidden_layers=3, sliding_window=4, **settings)
    check_windows(config)
    assert [layer_window(config, i) for i in range(3)] == windows


def test_wrong_calls_are_refused():
    model, params = make_model("llama")
    with pytest.raises(ValueError, match="25 tokens do not fit n_positions=24"):
        run(model, params, make_ids(shape=(1, 25)))
    with pytest.raises(ValueError, match="exceeds n_positions=24"):
        init_cache(model, 1, 25)
    with pytest.raises(ValueError, match=r"attention_mask has shape .* expected \(3, 12\)"):
        run(model, params, make_ids(), np.ones((BATCH, 1)))
    with pytest.raises(ValueError, match="ffns has 1 entries"):
        shapes_of(FAMILIES["llama"](model.config, (sparse_ffn("llama"),)))
