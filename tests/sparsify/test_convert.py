"""sparsify: exact where it can be, and each stage nearer to the dense model than the one before."""

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import make_config, make_model
from transformers import GPT2Config

from sparseffn_jax.bench.ablation import select_layer
from sparseffn_jax.checkpoints.pretrained import Pretrained
from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.models.decoder import ffn_module, layers_of
from sparseffn_jax.models.families import FAMILIES
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.sparsify.convert import sparsify
from sparseffn_jax.sparsify.fit import fit_layer
from sparseffn_jax.sparsify.sizing import size_model

D, D_FF, GATED_D_FF, VOCAB, WINDOW = 32, 128, 88, 97, 16
DENSE = SparseFFNConfig(D, D_FF, micro=MicroRefinementConfig(CoreConfig(D_FF)))


def checkered(rows, columns, side):
    blocks = np.indices((rows // side, columns // side)).sum(0) % 2 == 0
    return BlockMask.from_array(blocks, (side, side))


PARTS = {
    "low rank": SparseFFNConfig(
        D, D_FF, spectral=SpectralConfig("low_rank", D_FF, rank=12), polynomial=PolynomialConfig(4)
    ),
    "low rank and core": SparseFFNConfig(
        D,
        D_FF,
        spectral=SpectralConfig("low_rank", 96, rank=8, down_rank=10),
        polynomial=PolynomialConfig(3, groups=4),
        micro=MicroRefinementConfig(CoreConfig(32)),
    ),
    "circulant and core": SparseFFNConfig(
        D,
        D_FF,
        spectral=SpectralConfig(
            "block_circulant", 64, block_size=4, frequency_mask=(True, True, False)
        ),
        polynomial=PolynomialConfig(4),
        micro=MicroRefinementConfig(CoreConfig(48)),
    ),
    "masked core and a correction": SparseFFNConfig(
        D,
        D_FF,
        spectral=SpectralConfig("low_rank", 64, rank=8),
        micro=MicroRefinementConfig(
            CoreConfig(64, checkered(D, 64, 16), checkered(64, D, 16)),
            corrections=(checkered(D, D, 8),),
        ),
    ),
    "narrow": SparseFFNConfig(D, D_FF, micro=MicroRefinementConfig(CoreConfig(48))),
    "core and bypass": SparseFFNConfig(
        D,
        D_FF,
        spectral=SpectralConfig("low_rank", rank=8),
        micro=MicroRefinementConfig(CoreConfig(48)),
    ),
    "gated core and circulant bypass": SparseFFNConfig(
        D,
        GATED_D_FF,
        "silu",
        SpectralConfig("block_circulant", block_size=4),
        micro=MicroRefinementConfig(CoreConfig(24)),
        gated=True,
        bias=False,
    ),
    "masked core and bypass": SparseFFNConfig(
        D,
        D_FF,
        spectral=SpectralConfig("low_rank", rank=8),
        micro=MicroRefinementConfig(CoreConfig(64, checkered(D, 64, 16))),
    ),
    "gated low rank and core": SparseFFNConfig(
        D,
        GATED_D_FF,
        "silu",
        SpectralConfig("low_rank", 64, rank=8),
        PolynomialConfig(4),
        MicroRefinementConfig(CoreConfig(16)),
        gated=True,
        bias=False,
    ),
    # More freedom than the model had: biases.
    "gated circulant and masked core": SparseFFNConfig(
        D,
        GATED_D_FF,
        "silu",
        SpectralConfig("block_circulant", 64, block_size=4),
        PolynomialConfig(3),
        MicroRefinementConfig(CoreConfig(32, checkered(D, 32, 8), checkered(32, D, 8))),
        gated=True,
    ),
}


@pytest.fixture(scope="module")
def dense():
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=WINDOW, n_embd=D, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    # A freshly drawn model is nearly linear; a trained one is not.
    return model, jax.tree.map(lambda x: np.asarray(x) * (8.0 if x.ndim == 2 else 1.0), params)


@pytest.fixture(scope="module")
def gated():
    config = make_config("llama", max_position_embeddings=WINDOW)
    model = FAMILIES["llama"](config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: np.asarray(x) * (8.0 if x.ndim == 2 else 1.0), params)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(VOCAB, size=(224, WINDOW))


def ffn_error(dense, sparse, tokens):
    """Share of the dense FFNs' output variance that the sparse FFNs miss on the same inputs."""
    model, params = dense
    _, state = model.apply({"params": params}, tokens, mutable=["intermediates"])
    shares = []
    for i in range(model.spec.n_layer):
        x = layers_of(model, state["intermediates"])[i]["ffn_input"][0]
        outputs = []
        for m, p in (dense, sparse):
            leaves = jax.tree.map(jnp.asarray, layers_of(m, p)[i]["mlp"])
            outputs.append(ffn_module(m, i).apply({"params": leaves}, x))
        target, output = (np.asarray(y, np.float64).reshape(-1, D) for y in outputs)
        shares.append(np.sum((target - output) ** 2) / np.sum((target - target.mean(0)) ** 2))
    return np.mean(shares)


def test_density_one_is_the_dense_model(dense, tokens):
    model, params = dense
    sparse_model, sparse_params = sparsify(model, params, DENSE, tokens)
    logits = model.apply({"params": params}, tokens[:8])
    sparse_logits = sparse_model.apply({"params": sparse_params}, tokens[:8])
    np.testing.assert_allclose(sparse_logits, logits, atol=1e-5)
    for i in ("0", "1"):
        old = params["transformer"]["h"][i]["mlp"]
        new = sparse_params["transformer"]["h"][i]["mlp"]
        np.testing.assert_array_equal(new["core"]["up"]["kernel"], old["c_fc"]["kernel"].T)
        np.testing.assert_array_equal(new["core"]["down"]["kernel"], old["c_proj"]["kernel"].T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_density_one_in_every_family(name, dtype, tokens):
    config = make_config(name, **({"mlp_bias": True} if name == "llama" else {}))
    model, params = make_model(name, config=config)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    sparse_model, sparse = sparsify(model, params, size_model(model.spec, 1.0), tokens[:64])
    assert {leaf.dtype for leaf in jax.tree.leaves(sparse)} == {jnp.dtype(dtype)}
    logits = model.apply({"params": params}, tokens[:4])
    actual = sparse_model.apply({"params": sparse}, tokens[:4])
    np.testing.assert_allclose(actual, logits, atol=1e-5, rtol=0)


def test_all_components_lose_nothing(dense, tokens):
    config = SparseFFNConfig(D, D_FF, spectral=SpectralConfig("low_rank", D_FF, rank=D))
    sparse = sparsify(*dense, config, tokens, distill_steps=0)
    assert ffn_error(dense, sparse, tokens[:32]) < 1e-3


@pytest.mark.parametrize("name", PARTS)
def test_each_stage_is_better(dense, gated, tokens, name):
    dense, config = gated if PARTS[name].gated else dense, PARTS[name]
    train, held_out = tokens[:192], tokens[192:]
    stages = [(fit_layer, 0), (fit_layer, 150)]
    if name in ("narrow", "core and bypass"):
        stages.insert(0, (select_layer, 0))
    errors = [
        ffn_error(dense, sparsify(*dense, config, train, fit=fit, distill_steps=steps), held_out)
        for fit, steps in stages
    ]
    assert 1.0 > errors[0] > errors[1], errors
    assert errors == sorted(errors, reverse=True)


def test_the_core_takes_the_important_units(dense, tokens):
    model, params = dense
    layer = params["transformer"]["h"]["0"]["mlp"]
    silent = np.arange(0, D_FF, 2)
    down = layer["c_proj"]["kernel"].copy()
    down[:, silent] = 0.0
    layer = {**layer, "c_proj": {**layer["c_proj"], "kernel": down}}
    layers = {**params["transformer"]["h"], "0": {**params["transformer"]["h"]["0"], "mlp": layer}}
    params = {**params, "transformer": {**params["transformer"], "h": layers}}
    config = SparseFFNConfig(D, D_FF, micro=MicroRefinementConfig(CoreConfig(D_FF // 2)))
    _, sparse = sparsify(model, params, (config, None), tokens, distill_steps=0)
    kernel = sparse["transformer"]["h"]["0"]["mlp"]["core"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, layer["c_fc"]["kernel"].T[:, 1::2])


def test_only_the_replaced_ffns_change(dense, tokens):
    model, params = dense
    before = {path: leaf.copy() for path, leaf in flatten_dict(params).items()}
    sparse_model, sparse = sparsify(
        model, params, (None, PARTS["low rank and core"]), tokens, distill_steps=2
    )
    assert sparse_model.ffns[0] is None
    for path, leaf in flatten_dict(params).items():
        np.testing.assert_array_equal(leaf, before[path])
        if path[:4] != ("transformer", "h", "1", "mlp"):
            assert flatten_dict(sparse)[path] is leaf
    radius = sparse_model.ffns[1].polynomial.radius
    assert radius != PARTS["low rank and core"].polynomial.radius


def test_distillation_is_deterministic(dense, tokens):
    runs = [
        sparsify(*dense, PARTS["low rank"], tokens, distill_steps=3, seed=1)[1] for _ in range(2)
    ]
    jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 64}, "d_model=64"),
        ({"d_ff": 256}, "d_ff=256"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"micro": MicroRefinementConfig(CoreConfig(129))}, "core width=129"),
        ({"gated": True}, "gated=True, but the model has False"),
        ({"bias": False}, "bias=False, but the model's FFN has biases"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(dense, tokens, change, message):
    config = dataclasses.replace(DENSE, **change)
    with pytest.raises(ValueError, match=message):
        sparsify(*dense, config, tokens)


def test_other_bad_inputs_are_refused(dense, tokens):
    model, params = dense
    with pytest.raises(ValueError, match="3 FFN configs for a model of n_layer=2"):
        sparsify(model, params, (DENSE,) * 3, tokens)
    with pytest.raises(ValueError, match="calibration tokens are too few"):
        sparsify(model, params, DENSE, tokens[:2])
    with pytest.raises(ValueError, match="token id 97"):
        sparsify(model, params, DENSE, np.full_like(tokens, 97))
    with pytest.raises(ValueError, match="n_positions=16"):
        sparsify(model, params, DENSE, np.zeros((64, 17), np.int32))
    sparse_model, sparse_params = sparsify(model, params, DENSE, tokens)
    with pytest.raises(ValueError, match="layer 0 is already sparse"):
        sparsify(sparse_model, sparse_params, DENSE, tokens)


@pytest.fixture(scope="module")
def first_try():
    """A model as it is loaded, and a row of tokens."""
    model, params = make_model("gpt2")
    tokens = np.random.default_rng(0).integers(97, size=700)
    return Pretrained(model.config, params), tokens


def test_a_pretrained_a_ratio_and_tokens_are_enough(first_try):
    pretrained, tokens = first_try
    model, params = pretrained.model(), pretrained.params
    window = pretrained.spec.n_positions
    rows = tokens[: len(tokens) // window * window].reshape(-1, window)
    config = size_model(pretrained.spec, 0.4)
    expected, expected_params = sparsify(model, params, config, rows, distill_steps=0)
    calls = (
        lambda: sparsify(pretrained, 0.4, tokens, distill_steps=0),
        lambda: sparsify(pretrained, config, calibration=jnp.asarray(rows), distill_steps=0),
        lambda: sparsify(model, params, config=0.4, calibration=tokens, distill_steps=0),
    )
    for call in calls:
        sparse, params_of_sparse = call()
        assert sparse.ffns == expected.ffns
        chex.assert_trees_all_equal(params_of_sparse, expected_params)


def test_a_pretrained_is_shown_in_a_line(first_try):
    shown = "Pretrained(gpt2, 2 layers of d_model=32 and d_ff=128, 0 of them sparse"
    assert repr(first_try[0]) == f"{shown})"
    read = dataclasses.replace(first_try[0], folder=Path("models/gpt2"))
    assert repr(read) == f"{shown}, from models/gpt2)"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0.4,), {}, TypeError, "takes config, calibration beside a Pretrained: 1 of 2"),
        (({}, 0.4, np.zeros((2, 8), int)), {}, TypeError, "beside a Pretrained: 3 of 2 are given"),
        ((0.4, "some text"), {}, TypeError, "calibration is a text: expected token ids"),
        ((0.4, np.zeros((99, 8))), {}, TypeError, "calibration is of type float64: expected token"),
        ((0.4, np.full(700, -1)), {}, ValueError, "calibration holds token id -1"),
        ((0.4, np.zeros(9, int)), {}, ValueError, "9 calibration tokens are too few"),
        ((4, np.zeros(700, int)), {}, ValueError, "flops_ratio=4 must lie above 0 and not above 1"),
        (("0.4", np.zeros(700, int)), {}, TypeError, "config is a str: expected the share"),
        ((0.4, np.zeros(700, int)), {"fit": "svd"}, TypeError, "fit='svd': expected a function"),
    ],
)
def test_what_sparsify_is_called_with_by_mistake(arguments, options, error, message, first_try):
    with pytest.raises(error, match=message):
        sparsify(first_try[0], *arguments, **options)
