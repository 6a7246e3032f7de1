import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from train_models import SPARSE_FFN, make_model
from transformers import GPT2Config

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.evaluate import losses
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.step import (
    add_adapters,
    init_state,
    make_stage,
    make_step,
    merge_adapters,
)

CONFIG = TrainConfig(recipe="ffn_only", batch_size=4, warmup_steps=0)


def run_step(model, params, batch, config, teacher=(None, None), rate_factor=1.0):
    params = add_adapters(config, params)
    stage = make_stage(config, params, 0)
    state, frozen = init_state(stage, params)
    step = make_step(model, stage, config, teacher[0])
    return step(state, frozen, teacher[1], batch, 0, 0, rate_factor)


def test_accumulation_changes_nothing_but_rounding(model_and_params, windows):
    model, params = model_and_params
    batch = windows.train[:4]
    whole, metrics = run_step(model, params, batch, CONFIG)
    config = dataclasses.replace(CONFIG, accumulate_steps=4)
    parts, metrics_in_parts = run_step(model, params, batch, config)
    chex.assert_trees_all_close(metrics_in_parts, metrics, rtol=1e-4)
    # The first moments: Adam's update itself is the gradient's sign, which rounding may turn.
    chex.assert_trees_all_close(
        jax.tree.leaves(parts.optimizer), jax.tree.leaves(whole.optimizer), rtol=1e-3, atol=1e-6
    )


def test_the_callers_parameters_survive_the_donation(model_and_params, windows):
    model, params = model_and_params
    before = jax.tree.map(np.array, params)
    run_step(model, params, windows.train[:4], CONFIG)
    chex.assert_trees_all_equal(params, before)


def test_bfloat16_model_has_float32_master_weights(windows):
    model, params = make_model(dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    state, metrics = run_step(model, params, windows.train[:4], CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    assert np.isfinite(metrics["loss"])


def test_the_rate_factor_scales_the_update(model_and_params, windows):
    model, params = model_and_params
    _, whole = run_step(model, params, windows.train[:4], CONFIG)
    _, half = run_step(model, params, windows.train[:4], CONFIG, rate_factor=0.5)
    for name in ("update_norm", "learning_rate", "ffn_learning_rate"):
        np.testing.assert_allclose(half[name], 0.5 * whole[name], rtol=1e-5)
    assert whole["learning_rate"] == pytest.approx(5e-4)
    assert whole["ffn_learning_rate"] == pytest.approx(2.5e-4)


def test_losses_are_weighted(model_and_params, windows):
    model, params = model_and_params
    teacher, teacher_params = make_model(ffns=(None,))
    config = dataclasses.replace(CONFIG, distill_weight=0.7, temperature=3.0, hidden_weight=0.2)
    batch = windows.train[:4]
    _, metrics = run_step(model, params, batch, config, (teacher, teacher_params))
    (outputs, states), (soft, soft_states) = (
        jax.jit(partial(losses.forward, m, with_hidden_states=True))(p, batch[:, :-1])
        for m, p in ((model, params), (teacher, teacher_params))
    )
    logits, soft_logits = (o.head.logits(o.hidden) for o in (outputs, soft))
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    cross_entropy = -np.take_along_axis(log_p, batch[:, 1:, None], -1).mean()
    log_p, log_q = (
        np.asarray(jax.nn.log_softmax(x / 3.0), np.float64) for x in (logits, soft_logits)
    )
    expected = (
        0.3 * cross_entropy
        + 0.7 * 3.0**2 * (np.exp(log_q) * (log_q - log_p)).sum(-1).mean()
        + 0.2 * losses.hidden_state_mse(states, soft_states)
    )
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], cross_entropy, rtol=1e-5)


def test_adapters_start_exact_and_merge_away(model_and_params):
    _, params = model_and_params
    config = TrainConfig(recipe="lora", lora_rank=3)
    with_adapters = add_adapters(config, params)
    adapters = flatten_dict(with_adapters["lora"])
    assert {path[-2:] for path in adapters} == {("kernel", "a"), ("kernel", "b")}
    assert {leaf.shape[1] for path, leaf in adapters.items() if path[-1] == "a"} == {3}
    chex.assert_trees_all_equal(merge_adapters(config, with_adapters), params)


def test_targets_and_ranks_are_named_as_in_peft():
    """Layer 0 is sparse, layer 1 dense."""
    _, params = make_model(ffns=(SPARSE_FFN, None))
    attention = {f"{i}.attn.{name}" for i in (0, 1) for name in ("c_attn", "c_proj")}

    def ranks(targets, **settings):
        config = TrainConfig(recipe="lora", lora_rank=4, lora_targets=targets, **settings)
        flat = flatten_dict(add_adapters(config, params)["lora"])
        return {".".join(path[2:-2]): a.shape[1] for path, a in flat.items() if path[-1] == "a"}

    assert ranks("attention") == dict.fromkeys(attention, 4)
    assert ranks("all-linear") == dict.fromkeys(attention | {"1.mlp.c_fc", "1.mlp.c_proj"}, 4)
    assert ranks("c_proj") == {"0.attn.c_proj": 4, "1.attn.c_proj": 4, "1.mlp.c_proj": 4}
    assert ranks("attn.c_proj, mlp.c_fc", lora_ranks="c_fc=2, 0.attn.c_proj=1") == {
        "0.attn.c_proj": 1, "1.attn.c_proj": 4, "1.mlp.c_fc": 2,
    }  # fmt: skip
    # Of the maps of a name, those that are targets.
    assert ranks("attn.c_proj", lora_ranks="c_proj=1") == {"0.attn.c_proj": 1, "1.attn.c_proj": 1}
    with pytest.raises(
        ValueError, match=r"'q_proj', 'proj': .* attn.c_attn, .* mlp.c_fc, .*Sparse"
    ):
        ranks("c_attn,q_proj,proj")
    with pytest.raises(ValueError, match="'up': adapters can be on"):
        ranks("up")
    with pytest.raises(ValueError, match="gives c_fc a rank, but lora_targets='c_attn'"):
        ranks("c_attn", lora_ranks="c_fc=2")
    with pytest.raises(ValueError, match="rank=99 does not fit"):
        ranks("c_attn", lora_ranks="c_attn=99")


def test_the_scale_of_adapters():
    assert TrainConfig(recipe="lora").lora_scale(16) == 1.0
    assert TrainConfig(recipe="lora", lora_alpha=4.0).lora_scale(16) == 0.25
    assert TrainConfig(recipe="lora", lora_alpha=4.0, lora_rslora=True).lora_scale(16) == 1.0


def step_memory(model, config, window):
    """Compiles an update without running it; returns bytes inside the step and in the slots."""
    ids = jax.ShapeDtypeStruct((1, window), jnp.int32)
    params = jax.eval_shape(lambda i: model.init(jax.random.key(0), i)["params"], ids)
    stage = make_stage(config, params, 0)
    state, frozen = jax.eval_shape(lambda p: init_state(stage, p), params)
    batch = jax.ShapeDtypeStruct((config.batch_size, window + 1), jnp.int32)
    step = make_step(model, stage, config).lower(state, frozen, None, batch, 0, 0, 1.0)
    slots = jax.tree.leaves(state.optimizer)
    temporary = step.compile().memory_analysis().temp_size_in_bytes
    return temporary, sum(leaf.size * leaf.dtype.itemsize for leaf in slots)


def test_freezing_saves_memory_at_gpt2s_width():
    ffn = SparseFFNConfig(
        d_model=768,
        d_ff=3072,
        spectral=SpectralConfig(width=3072, rank=192),
        polynomial=PolynomialConfig(),
        micro=MicroRefinementConfig(core=CoreConfig(width=384)),
    )
    model = GPT2LMHeadModel(GPT2Config(n_layer=3), (ffn,) * 3)
    needed = {}
    for recipe in ("full", "ffn_only"):
        temporary, slots = step_memory(model, TrainConfig(recipe=recipe, batch_size=2), window=128)
        needed[recipe] = temporary + slots
        print(
            f"\n{recipe}: temporary {temporary / 2**20:.1f} MiB + optimizer "
            f"{slots / 2**20:.1f} MiB = {needed[recipe] / 2**20:.1f} MiB"
        )
    assert needed["ffn_only"] < 0.6 * needed["full"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU compiler's fault is mended")
def test_a_steps_work_grows_with_depth_and_not_with_its_square():
    config = dataclasses.replace(CONFIG, recipe="full")

    def operations(n_layer):
        model, params = make_model((None,) * n_layer)
        stage = make_stage(config, params, 0)
        state, frozen = init_state(stage, params)
        batch = jax.ShapeDtypeStruct((4, 17), jnp.int32)
        step = make_step(model, stage, config)
        compiled = step.lower(state, frozen, None, batch, 0, 0, 1.0).compile()
        return compiled.cost_analysis()["flops"]

    two, four, eight = map(operations, (2, 4, 8))
    # Recomputing all later blocks' residual gradients in every block adds 2 % already here.
    assert eight - four == pytest.approx(2 * (four - two), rel=1e-3)
