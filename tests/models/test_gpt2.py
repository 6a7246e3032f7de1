import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import GPT2Config

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.models.decoder import init_cache
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.ops.masks import BlockMask

BATCH, TOKENS, VOCAB = 3, 12, 97

KLT = SparseFFNConfig(
    d_model=32,
    d_ff=128,
    spectral=SpectralConfig(transform="low_rank", width=48, rank=8),
    polynomial=PolynomialConfig(degree=3),
    micro=MicroRefinementConfig(core=CoreConfig(width=16)),
)
DFT = SparseFFNConfig(
    d_model=32,
    d_ff=128,
    spectral=SpectralConfig(transform="block_circulant", width=64, block_size=8),
    micro=MicroRefinementConfig(
        corrections=(BlockMask.from_array(np.eye(4), (8, 8)),),
    ),
)


def make_config(**changes):
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": VOCAB}
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2Config(**{**small, **dropout, "bos_token_id": 0, "eos_token_id": 0, **changes})


def make_model(ffns=(), config=None, **kwargs):
    """Returns a model and parameters without zeros and ones, so that every leaf matters."""
    model = GPT2LMHeadModel(config or make_config(), ffns, **kwargs)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.array(mean + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes_of(model))


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), make_ids(shape=(1, 1)))["params"]


def dropout_key(seed=0):
    # Compiles in a fraction of threefry's time.
    return jax.random.key(seed, impl="rbg")


def run(model, params, *args, **kwargs):
    # Not jitted: the small programs of one model's operations serve the next model too.
    return model.apply({"params": params}, *args, **kwargs)


def make_ids(seed=0, shape=(BATCH, TOKENS)):
    return jax.random.randint(jax.random.key(seed), shape, 0, VOCAB)


def padding_mask(side):
    """Rows with 0, 3 and 7 padded positions on one side."""
    mask = np.ones((BATCH, TOKENS), np.int32)
    for row, count in enumerate((0, 3, 7)):
        if side == "right":
            mask[row, TOKENS - count :] = 0
        else:
            mask[row, :count] = 0
    return mask


# --- parity with PyTorch -----------------------------------------------------------------------


def random_torch_model(config):
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel as TorchGPT2

    torch.manual_seed(0)
    model = TorchGPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return torch, model


def from_torch(model, tied):
    """Renames and transposes by hand: what the tree must look like, whatever ours says."""
    params = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name == "lm_head.weight":
            if not tied:
                params[("lm_head", "kernel")] = array.T
            continue
        *path, leaf = name.split(".")
        if path[-1] in ("wte", "wpe"):
            leaf = "embedding"
        elif path[-1].startswith("ln_"):
            leaf = {"weight": "scale", "bias": "bias"}[leaf]
        elif leaf == "weight":
            leaf, array = "kernel", array.T
        params[(*path, leaf)] = array
    return unflatten_dict(params)


CONFIGS = {
    "default": {},
    "gelu": {"activation_function": "gelu", "n_head": 8},
    "relu-inner": {"activation_function": "relu", "n_inner": 40},
    "silu-one-head": {"activation_function": "silu", "n_head": 1, "n_inner": 96},
    "quick-gelu": {"activation_function": "quick_gelu", "layer_norm_epsilon": 1e-2},
    "epsilon": {"layer_norm_epsilon": 0.3},
    "untied": {"tie_word_embeddings": False},
    "unscaled": {"scale_attn_weights": False},
    "by-layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "by-layer-unscaled": {
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "tie_word_embeddings": False,
    },
    "upcast": {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
}


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_pytorch(name, padding):
    config = make_config(**CONFIGS[name])
    torch, reference = random_torch_model(config)
    ids, mask = np.asarray(make_ids()), None if padding is None else padding_mask(padding)
    with torch.no_grad():
        expected = reference(
            torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask)
        ).logits.numpy()
    params = from_torch(reference, config.tie_word_embeddings)
    actual = run(GPT2LMHeadModel(config), params, ids, mask)
    real = np.ones_like(ids, bool) if mask is None else mask.astype(bool)
    np.testing.assert_allclose(np.asarray(actual)[real], expected[real], atol=1e-4, rtol=0)


def test_the_parity_configs_differ_from_one_another():
    ids = make_ids()
    _, params = make_model()
    logits = [
        run(GPT2LMHeadModel(make_config(**changes)), params, ids)
        for changes in (
            {},
            {"activation_function": "relu"},
            {"layer_norm_epsilon": 1e-2},
            {"scale_attn_weights": False},
            {"scale_attn_by_inverse_layer_idx": True},
            {"n_head": 8},
        )
    ]
    for one, other in itertools.combinations(logits, 2):
        assert jnp.abs(one - other).max() > 1e-3


def test_position_ids_are_used():
    torch, reference = random_torch_model(make_config())
    ids, positions = np.asarray(make_ids()), np.tile(np.arange(TOKENS)[::-1] + 5, (BATCH, 1))
    with torch.no_grad():
        expected = reference(
            torch.tensor(ids), position_ids=torch.tensor(positions.copy())
        ).logits.numpy()
    actual = run(GPT2LMHeadModel(make_config()), from_torch(reference, True), ids, None, positions)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


# --- dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_drops(rate):
    model, params = make_model(config=make_config(**{rate: 0.5}))
    # One document twice: rows that drop alike would give equal logits.
    ids = jnp.tile(make_ids(shape=(1, TOKENS)), (2, 1))

    @jax.jit
    def logits(seed):
        rngs = {"dropout": dropout_key(seed)}
        return model.apply({"params": params}, ids, deterministic=False, rngs=rngs)

    deterministic = run(model, params, ids)
    np.testing.assert_array_equal(logits(0), logits(0))
    assert jnp.abs(logits(0) - logits(1)).max() > 1e-3
    assert jnp.abs(logits(0) - deterministic).max() > 1e-3
    assert jnp.abs(logits(0)[0] - logits(0)[1]).max() > 1e-3


def test_dropout_of_rate_zero_is_deterministic():
    model, params = make_model()
    rngs = {"dropout": dropout_key()}
    dropped = run(model, params, make_ids(), deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(dropped, run(model, params, make_ids()))


@pytest.mark.parametrize("scaled", [True, False])
def test_tiny_attention_dropout_keeps_the_attention(scaled):
    """The path with dropout is another one: at a rate that drops nothing it must agree."""
    changes = {"scale_attn_weights": scaled, "scale_attn_by_inverse_layer_idx": True}
    model, params = make_model(config=make_config(attn_pdrop=1e-7, **changes))
    mask, rngs = padding_mask("right"), {"dropout": dropout_key()}
    for attention_mask in (None, mask):
        dropped = run(model, params, make_ids(), attention_mask, deterministic=False, rngs=rngs)
        expected = run(model, params, make_ids(), attention_mask)
        np.testing.assert_allclose(dropped, expected, atol=1e-5, rtol=0)


# --- decoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ffns", "prefill"), [((), 5), ((), 1), ((KLT, DFT), 5)], ids=["dense", "dense-1", "sparse"]
)
def test_cached_decoding_equals_the_full_forward(ffns, prefill):
    model, params = make_model(ffns)
    ids = make_ids()
    cache = init_cache(model, BATCH, TOKENS + 3)

    @jax.jit
    def step(cache, ids):
        logits, changed = model.apply({"params": params, "cache": cache}, ids, mutable=["cache"])
        return changed["cache"], logits

    pieces = []
    for start, end in [(0, prefill), *((t, t + 1) for t in range(prefill, TOKENS))]:
        cache, logits = step(cache, ids[:, start:end])
        pieces.append(logits)
    expected = run(model, params, ids)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, atol=1e-5, rtol=0)


def test_cached_decoding_of_a_left_padded_batch():
    model, params = make_model((KLT, None))
    ids, mask, length = make_ids(), jnp.array(padding_mask("left")), TOKENS + 2
    positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    cache_mask = jnp.pad(mask, ((0, 0), (0, length - TOKENS)), constant_values=1)

    @jax.jit
    def step(cache, ids, positions):
        variables = {"params": params, "cache": cache}
        logits, changed = model.apply(variables, ids, cache_mask, positions, mutable=["cache"])
        return changed["cache"], logits

    cache, pieces = init_cache(model, BATCH, length), []
    for start, end in [(0, 8), *((t, t + 1) for t in range(8, TOKENS))]:
        cache, logits = step(cache, ids[:, start:end], positions[:, start:end])
        pieces.append(logits)
    actual = jnp.concatenate(pieces, 1)
    full = run(model, params, ids, mask, positions)
    real = np.asarray(mask, bool)
    np.testing.assert_allclose(actual[real], full[real], atol=1e-5, rtol=0)
    # Padding has no influence at all: the last row alone, without its seven padded positions.
    alone = run(model, params, ids[2:, 7:])
    np.testing.assert_allclose(actual[2:, 7:], alone, atol=1e-5, rtol=0)


# --- what a training run relies on -------------------------------------------------------------


@pytest.mark.parametrize("ffns", [(), (KLT, DFT)], ids=["dense", "sparse"])
def test_no_token_sees_its_future(ffns):
    model, params = make_model(ffns)
    forward = jax.jit(lambda ids: model.apply({"params": params}, ids))
    ids = make_ids()
    before = forward(ids)
    for t in range(TOKENS):
        after = forward(ids.at[:, t].set((ids[:, t] + 1) % VOCAB))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (jnp.abs(before - after).max(-1)[:, t:] > 0).all()


def test_remat_changes_no_number():
    config = make_config(resid_pdrop=0.1, n_layer=1)
    plain, params = make_model((KLT,), config)
    remat_model = GPT2LMHeadModel(config, (KLT,), remat=True)
    ids, rngs = make_ids(), {"dropout": dropout_key()}

    @partial(jax.jit, static_argnums=1)
    def loss_and_grads(params, remat):
        def loss(params):
            logits = (remat_model if remat else plain).apply(
                {"params": params}, ids, deterministic=False, rngs=rngs
            )
            return (jax.nn.logsumexp(logits, -1) ** 2).mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, logits), grads = loss_and_grads(params, False)
    (_, remat_logits), remat_grads = loss_and_grads(params, True)
    np.testing.assert_array_equal(logits, remat_logits)
    for grad, remat_grad in zip(jax.tree.leaves(grads), jax.tree.leaves(remat_grads), strict=True):
        assert jnp.abs(grad).max() > 0
        np.testing.assert_allclose(grad, remat_grad, atol=1e-5, rtol=1e-5)


def test_remat_recomputes():
    ids = make_ids()

    def saved_bytes(remat):
        model, params = make_model(remat=remat)
        _, pullback = jax.eval_shape(
            lambda params: jax.vjp(lambda p: model.apply({"params": p}, ids).sum(), params), params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert saved_bytes(True) < 0.8 * saved_bytes(False)


def test_bfloat16_compute_with_float32_params():
    model, params = make_model((KLT, None))
    half = GPT2LMHeadModel(make_config(), (KLT, None), dtype=jnp.bfloat16)
    logits, state = jax.jit(
        lambda params: half.apply({"params": params}, make_ids(), mutable=["intermediates"])
    )(params)
    assert logits.dtype == jnp.float32
    hidden = state["intermediates"]["transformer"]["h"]["hidden_states"]
    assert {leaf.dtype for leaf in hidden} == {jnp.dtype(jnp.bfloat16)}
    expected = run(model, params, make_ids())
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 2e-2
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half))} == {jnp.dtype(jnp.float32)}


# --- the pluggable FFN -------------------------------------------------------------------------


def test_each_layer_has_its_own_ffn():
    model, params = make_model((KLT, None, DFT), config=make_config(n_layer=3))
    layers = params["transformer"]["h"]
    assert set(layers["1"]["mlp"]) == {"c_fc", "c_proj"}
    assert layers["0"]["mlp"]["spectral"]["up"]["axes"].shape == (32, 8)
    assert layers["2"]["mlp"]["spectral"]["up"]["real"].shape == (5, 4, 8)
    dense = GPT2LMHeadModel(make_config(n_layer=3))

    def outside_mlp(tree):
        return {path: x.shape for path, x in flatten_dict(tree).items() if "mlp" not in path}

    assert outside_mlp(params) == outside_mlp(shapes_of(dense))
    assert jnp.isfinite(run(model, params, make_ids())).all()


def test_a_full_core_is_the_dense_ffn():
    core = SparseFFNConfig(
        d_model=32, d_ff=128, micro=MicroRefinementConfig(core=CoreConfig(width=128))
    )
    dense, params = make_model()
    expected = run(dense, params, make_ids())
    layers = {}
    for i, layer in params["transformer"]["h"].items():
        c_fc, c_proj = layer["mlp"]["c_fc"], layer["mlp"]["c_proj"]
        mlp = {
            "core": {
                "up": {"kernel": c_fc["kernel"].T, "bias": c_fc["bias"]},
                "down": {"kernel": c_proj["kernel"].T},
            },
            "bias": c_proj["bias"],
        }
        layers[i] = {**layer, "mlp": mlp}
    params = {**params, "transformer": {**params["transformer"], "h": layers}}
    actual = run(GPT2LMHeadModel(make_config(), (core, core)), params, make_ids())
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


class Halve(nn.Module):
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return x * self.param("factor", nn.initializers.constant(0.5), (), self.param_dtype)


def test_a_module_of_the_users_own_as_ffn():
    model, params = make_model((Halve, None))
    assert params["transformer"]["h"]["0"]["mlp"].keys() == {"factor"}
    logits = run(model, params, make_ids())
    params["transformer"]["h"]["0"]["mlp"]["factor"] *= 2
    assert jnp.abs(run(model, params, make_ids()) - logits).max() > 1e-3


# --- wrong use ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 5}, "n_head=5 does not divide n_embd=32"),
        ({"activation_function": "gelo"}, "unknown activation 'gelo'"),
    ],
)
def test_a_config_it_cannot_honour_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(GPT2LMHeadModel(make_config(**changes)))


def test_wrong_calls_are_refused():
    model, params = make_model()
    with pytest.raises(ValueError, match="25 tokens do not fit n_positions=24"):
        model.apply({"params": params}, make_ids(shape=(1, 25)))
    with pytest.raises(ValueError, match=r"attention_mask has shape .* expected \(3, 12\)"):
        model.apply({"params": params}, make_ids(), np.ones((BATCH, 1)))
    with pytest.raises(ValueError, match="exceeds n_positions=24"):
        init_cache(model, 1, 25)
    cache = init_cache(model, BATCH, 8)
    with pytest.raises(ValueError, match="12 tokens do not fit a cache of 8"):
        model.apply({"params": params, "cache": cache}, make_ids(), mutable=["cache"])
    with pytest.raises(ValueError, match="ffns has 1 entries"):
        shapes_of(GPT2LMHeadModel(make_config(), (KLT,)))
