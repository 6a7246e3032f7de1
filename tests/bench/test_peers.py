"""Every method: within its budget, as fast to count as promised, and near the dense model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import GPT2Config, LlamaConfig

from sparseffn_jax.bench import peers
from sparseffn_jax.bench.monarch import MonarchFFN
from sparseffn_jax.bench.planned import Planned
from sparseffn_jax.bench.published import KeepUnits, fluctuation, magnitude, rank_layers
from sparseffn_jax.bench.quality import METHODS
from sparseffn_jax.bench.stacks import ffn_stack, fresh_ffns
from sparseffn_jax.config import CoreConfig, MicroRefinementConfig, SparseFFNConfig
from sparseffn_jax.evaluate.losses import evaluate_loss
from sparseffn_jax.measure.flops import count_flops
from sparseffn_jax.models.decoder import layers_of, replace_ffns
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.models.llama import LlamaForCausalLM
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.sparsify.dense import DenseFFN, Linear
from sparseffn_jax.sparsify.sizing import size_ffn
from sparseffn_jax.sparsify.streams import LayerActivations

SHAPE = DecoderSpec(2, 16, 64, 256, "gelu_new", gated=False, ffn_bias=True)
GATED = DecoderSpec(2, 16, 64, 176, "silu", gated=True, ffn_bias=False)
SINGLE = {
    name: method
    for name, method in METHODS.items()
    if not isinstance(method, peers.Searched | Planned)
}
RATIOS = (0.15, 0.3, 0.6, 0.95)


@pytest.mark.parametrize("spec", [SHAPE, GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("name", SINGLE)
def test_a_larger_budget_is_used_and_never_exceeded(name, spec):
    method = SINGLE[name]
    # As many layers as the methods need that drop whole ones.
    spec = dataclasses.replace(spec, n_layer=20)
    used = [method.flops_ratio(method.size(spec, ratio)) for ratio in RATIOS]
    assert all(0 < spent <= ratio for spent, ratio in zip(used, RATIOS, strict=True))
    assert used == sorted(used)
    # Blocks and whole ranks are coarse in so small a layer.
    assert used[-1] > 0.7


@pytest.mark.parametrize("name", SINGLE)
def test_no_budget_is_refused(name):
    with pytest.raises(ValueError, match=r"flops_ratio=0\.0001"):
        SINGLE[name].size(SHAPE, 1e-4)


def test_corners_of_the_configuration_space():
    narrow, low_rank = (SINGLE[name].size(SHAPE, 0.5) for name in ("narrow", "low-rank"))
    assert narrow.micro.core.width == 128
    assert narrow.spectral is None
    assert (low_rank.spectral.width, low_rank.polynomial, low_rank.micro) == (256, None, None)
    assert SINGLE["SparseFFN"].size(SHAPE, 0.5) == size_ffn(64, 256, 0.5)
    shares = METHODS["SparseFFN-searched"].candidates
    assert [method.size(SHAPE, 0.5).micro.core.width for method in shares.values()] == [
        32,
        64,
        96,
        112,
        128,
    ]


@pytest.mark.parametrize("spec", [SHAPE, GATED], ids=["plain", "gated"])
def test_monarch_counts_what_its_program_does(spec):
    config = peers.MonarchMethod().size(spec, 0.5)
    layer, x = MonarchFFN(config), jnp.ones((8, spec.d_model))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    dense = (6 if spec.gated else 4) * spec.d_model * spec.d_ff
    assert count_flops(layer.apply, params, x).dot == pytest.approx(8 * config.flops_ratio * dense)


def test_blocks_go_where_weights_meet_large_activations():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 64)).astype(np.float32)
    # The second half of the input channels is nearly silent, and so are 32 hidden units.
    x[:, 32:] *= 0.01
    up, down = rng.standard_normal((64, 256)), rng.standard_normal((256, 64))
    up[:, :32] = 0.0
    dense = DenseFFN((Linear(up, np.zeros(256)),), Linear(down, np.zeros(64)), "relu")
    unplaced = peers.unstructured(SHAPE, 0.5)
    config = peers.place_blocks(unplaced, dense, LayerActivations(x, np.asarray(dense(x))))
    masks = config.micro.core
    assert masks.up_mask.block_shape == (8, 8)
    live = np.array(masks.up_mask.blocks)[:, 4:]
    assert live[:4].all()
    assert not live[4:].any()
    assert not np.array(masks.down_mask.blocks)[:4].any()
    for name in ("up_mask", "down_mask"):
        assert getattr(masks, name).size == getattr(unplaced.micro.core, name).size


def dense_model(spec):
    if spec.gated:
        config = LlamaConfig(
            vocab_size=97, max_position_embeddings=16, hidden_size=64, intermediate_size=176,
            num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    config = GPT2Config(
        vocab_size=97, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@pytest.fixture(scope="module", params=[SHAPE, GATED], ids=["plain", "gated"])
def dense(request):
    model = dense_model(request.param)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: np.asarray(x) * (6.0 if x.ndim == 2 else 1.0), params)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(97, size=(96, 16))


@pytest.mark.parametrize("name", ["Monarch+repair", "block-sparse+repair"])
def test_the_start_is_near_and_distillation_comes_nearer(name, dense, tokens):
    model, params = dense
    method = SINGLE[name]
    wanted = model.apply({"params": params}, tokens)
    errors = []
    for steps in (0, 30):
        start = peers.WarmStart(tokens, distill_steps=steps)
        sparse_model, sparse = method.convert(model, params, method.size(model.spec, 0.5), start)
        logits = jax.jit(sparse_model.apply)({"params": sparse}, tokens)
        errors.append(float(jnp.var(logits - wanted) / jnp.var(wanted)))
    assert errors[1] < errors[0] < 0.6
    attention = [layers_of(model, p)[0][model.attention] for p in (params, sparse)]
    jax.tree.map(np.testing.assert_array_equal, *attention)


def random_ffn(gated=False):
    rng = np.random.default_rng(0)

    def linear(i, o):
        return Linear(*(rng.standard_normal(shape).astype(np.float32) for shape in ((i, o), o)))

    ups = (linear(16, 40), linear(16, 40)) if gated else (linear(16, 40),)
    dense = DenseFFN(ups, linear(40, 16), "relu")
    x = rng.standard_normal((3000, 16)).astype(np.float32)
    return dense, LayerActivations(x, np.asarray(dense(x)))


def hidden_of(dense, x):
    first, *up = (x.astype(np.float64) @ a.weight + a.bias for a in dense.up_maps)
    return np.maximum(first, 0.0) * (up[0] if up else 1.0)


@pytest.mark.parametrize("gated", [False, True])
def test_units_are_scored_as_published(gated):
    dense, activations = random_ffn(gated)
    hidden = hidden_of(dense, activations.x)
    np.testing.assert_allclose(magnitude(dense, activations), np.abs(hidden).mean(0), rtol=1e-5)
    wanted = hidden.var(0) * np.linalg.norm(dense.down.weight.astype(np.float64), axis=1) ** 2
    np.testing.assert_allclose(fluctuation(dense, activations), wanted, rtol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_what_leaves_is_lost_or_its_mean_is_kept_or_made_up_for(gated):
    dense, activations = random_ffn(gated)
    config = SparseFFNConfig(
        16, 40, "relu", gated=gated, micro=MicroRefinementConfig(CoreConfig(24))
    )
    hidden, target = hidden_of(dense, activations.x), np.asarray(activations.target, np.float64)
    kept = np.sort(np.argsort(-np.abs(hidden).mean(0))[:24])
    lost = np.setdiff1d(np.arange(40), kept)
    down, bias = dense.down.weight.astype(np.float64), dense.down.bias
    bare = hidden[:, kept] @ down[kept] + bias
    features = np.hstack([hidden[:, kept], np.ones((len(hidden), 1))])
    wanted = {
        (False, False): bare,
        (False, True): bare + hidden.mean(0)[lost] @ down[lost],
        (True, False): features @ np.linalg.lstsq(features, target)[0],
    }
    for (refit, keep_means), outputs in wanted.items():
        fit = KeepUnits(magnitude, refit, keep_means)
        _, leaves = fit(dense, config, activations)
        y = SparseFFN(config).apply({"params": leaves}, jnp.asarray(activations.x))
        assert np.abs(y - outputs).max() < 2e-2 * outputs.std()


def test_ffns_are_dropped_by_what_each_costs_alone(dense, tokens):
    model, params = dense
    config = METHODS["depth"].size(model.spec, 0.5)
    start = peers.WarmStart(tokens[:8], distill_steps=0)
    dropped, left = METHODS["depth"].convert(model, params, config, start)
    losses = []
    for layer in range(2):
        ffns = [None, None]
        ffns[layer] = peers.NoFFN
        leaves = replace_ffns(model, params, {layer: {}})
        losses.append(evaluate_loss(model.clone(ffns=tuple(ffns)), leaves, tokens[:8], 4))
    assert rank_layers(model, params, tokens[:8], batch_size=4) == list(np.argsort(losses))
    assert [ffn is None for ffn in dropped.ffns] == [loss > min(losses) for loss in losses]
    assert evaluate_loss(dropped, left, tokens[:8], 4) == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("spec", [SHAPE, GATED], ids=["plain", "gated"])
def test_fresh_ffns_are_those_of_a_fresh_model(spec):
    method = peers.MonarchMethod()
    model = dense_model(spec).clone(ffns=method.ffns(method.size(spec, 0.5), 2))
    whole = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    fresh = jax.eval_shape(lambda: fresh_ffns(model))
    for new, old in zip(layers_of(model, fresh), layers_of(model, whole), strict=True):
        assert new["mlp"] == old["mlp"]


def test_a_stack_is_the_models_ffns_one_after_the_other(dense):
    model, params = dense
    x = jax.random.normal(jax.random.key(0), (5, 64))
    layers = [layer["mlp"] for layer in layers_of(model, params)]
    y = np.asarray(x, np.float64)
    for leaves in layers:
        read = DenseFFN.from_params(leaves, model.ffn_layout, model.spec.activation)
        y = read(y.astype(np.float32))
    np.testing.assert_allclose(ffn_stack(model, params)(x), y, rtol=1e-4, atol=1e-4)
    by_layer, by_x = ffn_stack(model, params, train=True)(x)
    assert by_x.shape == x.shape
    assert jax.tree.map(np.shape, by_layer) == jax.tree.map(np.shape, layers)
