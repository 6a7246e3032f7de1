import dataclasses
import itertools
import json
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from train_models import make_model

from sparseffn_jax.evaluate import losses
from sparseffn_jax.evaluate.fused_loss import mean_loss
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.guard import DivergenceError, GuardConfig
from sparseffn_jax.train.loop import train
from sparseffn_jax.train.loss_scale import dynamic_loss_scale
from sparseffn_jax.train.step import init_state, make_stage, make_step

CONFIG = TrainConfig(
    steps=12, batch_size=3, recipe="full", learning_rate=1e-2, warmup_steps=0, log_every=1,
    eval_every=12, save_every=4, guard=GuardConfig(snapshot_every=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def half():
    return make_model(dtype=jnp.float16)


def test_only_sound_gradients_reach_the_optimizer():
    scaled, plain = dynamic_loss_scale(optax.adam(0.1), 8.0, interval=3), optax.adam(0.1)
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state, plain_state = scaled.init(params), plain.init(params)
    rng, scales = np.random.default_rng(0), []
    # inf, nan, sound: which gradients come.
    for kind in "ssisssnissssssss":
        grads = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), jnp.float32), params)
        updates, plain_new = plain.update(grads, plain_state)
        if kind == "s":
            plain_state = plain_new
        else:
            grads["b"] = grads["b"].at[1].set({"i": jnp.inf, "n": jnp.nan}[kind])
            updates = jax.tree.map(jnp.zeros_like, updates)
        actual, state = scaled.update(grads, state)
        chex.assert_trees_all_equal(actual, updates)
        chex.assert_trees_all_equal(state.inner, plain_state)
        scales.append(float(state.scale))
    assert scales == [8, 8, 4, 4, 4, 8, 4, 2, 2, 2, 4, 4, 4, 8, 8, 8]


def test_the_scale_stays_within_its_limits():
    optimizer = dynamic_loss_scale(optax.sgd(0.1), 2.0, interval=1)
    state = optimizer.init(jnp.ones(1))
    for _ in range(3):
        _, state = optimizer.update(jnp.full(1, jnp.inf), state)
    assert state.scale == 1.0
    for _ in range(40):
        _, state = optimizer.update(jnp.ones(1), state)
    assert state.scale == 2.0**32


def first_moments(model, params, batch, config):
    stage = make_stage(config, params, 0, model.dtype)
    state, frozen = init_state(stage, params)
    state, metrics = make_step(model, stage, config)(state, frozen, None, batch, 0, 0, 1.0)
    leaves = jax.tree_util.tree_leaves_with_path(state.optimizer)
    moments = [leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]
    return np.concatenate([np.ravel(leaf) for leaf in moments]), metrics


@pytest.mark.parametrize("accumulate_steps", [1, 3])
def test_scaling_saves_small_gradients_and_changes_nothing_else(half, windows, accumulate_steps):
    model, params = half
    full = dataclasses.replace(model, dtype=jnp.float32)
    config = dataclasses.replace(CONFIG, accumulate_steps=accumulate_steps)
    batch = windows.train[:3]
    expected, _ = first_moments(full, params, batch, config)
    errors = {}
    for scale in (2.0**-10, 2.0**15):
        scaled = dataclasses.replace(config, loss_scale=scale)
        moments, metrics = first_moments(model, params, batch, scaled)
        errors[scale] = np.linalg.norm(moments - expected) / np.linalg.norm(expected)
        assert (metrics["loss_scale"], metrics["overflow"]) == (scale, 0.0)
    assert errors[2.0**15] < 0.005
    assert errors[2.0**-10] > 10 * errors[2.0**15]


def run(half, windows, config, out_dir, stop=None, **options):
    steps = {}

    def on_step(step, metrics):
        steps[step] = metrics
        if step == stop:
            signal.raise_signal(signal.SIGINT)

    return train(*half, windows, config, out_dir, on_step=on_step, **options), steps


@pytest.fixture(scope="module")
def overflown(half, windows, tmp_path_factory):
    config = dataclasses.replace(CONFIG, loss_scale=2.0**20, loss_scale_interval=3)
    out_dir = tmp_path_factory.mktemp("float16")
    return config, *run(half, windows, config, out_dir), out_dir


def test_overflow_costs_steps_and_nothing_else(half, windows, overflown):
    config, result, steps, out_dir = overflown
    skipped = [step for step, metrics in steps.items() if metrics["overflow"]]
    assert 1 in skipped
    assert len(skipped) < 7
    scales = [metrics["loss_scale"] for metrics in steps.values()]
    for i, (before, after) in enumerate(itertools.pairwise(scales), 1):
        assert after == before / 2 if i in skipped else after in (before, 2 * before)
    assert scales[-1] < config.loss_scale
    assert {steps[step]["update_norm"] for step in skipped} == {0.0}
    # Schedules count updates: the first one has the first rate.
    first = min(set(steps) - set(skipped))
    assert steps[first]["learning_rate"] == pytest.approx(config.learning_rate)
    log = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    events = [record for record in log if "event" in record]
    assert {event["event"] for event in events} == {"overflow"}
    assert [event["step"] for event in events] == skipped
    chex.assert_tree_all_finite(result.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {jnp.dtype("float32")}
    model, params = half
    before, after = (
        losses.evaluate_loss(model, p, windows.validation, 4) for p in (params, result.params)
    )
    # Frequencies alone, all there is to learn from this text, are worth 0.2 nats.
    assert after < before - 0.05


def test_a_run_that_ends_with_an_overflow_is_validated(half, windows, tmp_path, capsys):
    config = dataclasses.replace(CONFIG, steps=1, eval_every=100, loss_scale=2.0**60)
    result, steps = run(half, windows, config, tmp_path)
    assert steps[1]["overflow"] == 1.0
    event, record = result.history
    assert (event["event"], record.keys()) == ("overflow", {"step", "validation_loss"})
    model, params = half
    assert record["validation_loss"] == losses.evaluate_loss(model, params, windows.validation, 3)
    assert f"step 1/1  validation {record['validation_loss']:.4f}  " in capsys.readouterr().err


@pytest.mark.parametrize("stop", [1, 8])
def test_resume_is_exact(half, windows, overflown, stop, tmp_path):
    config, expected, expected_steps, _ = overflown
    with pytest.raises(KeyboardInterrupt):
        run(half, windows, config, tmp_path, stop)
    result, steps = run(half, windows, config, tmp_path, resume="must")
    chex.assert_trees_all_equal(result.params, expected.params)
    names = ("loss", "loss_scale", "overflow", "learning_rate")
    for step in range(stop + 1, 13):
        assert [steps[step][n] for n in names] == [expected_steps[step][n] for n in names]


def test_what_overflows_at_the_smallest_scale_has_diverged(half, windows, tmp_path):
    model, params = half
    flat = flatten_dict(params)
    flat[("transformer", "ln_f", "scale")] = jnp.full(32, 1e30)
    config = dataclasses.replace(CONFIG, loss_scale=4.0, guard=GuardConfig(max_restores=0))
    with pytest.raises(DivergenceError, match=r"step 3: .*loss is nan"):
        run((model, unflatten_dict(flat)), windows, config, tmp_path)


# --- what stays in float32 ---------------------------------------------------------------------


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_norms_softmax_and_loss_are_float32(dtype, windows):
    # A dense layer with ReLU: every exponential and root is a softmax's, a norm's or the loss's.
    model, params = make_model((None,), dtype, activation_function="relu")
    batch = jnp.array(windows.train[:2])

    def loss(params):
        return mean_loss(losses.forward(model, params, batch[:, :-1])[0], batch[:, 1:])[0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params)
    delicate = ("exp", "log", "rsqrt", "div", "reduce_sum", "reduce_max", "integer_pow", "square")
    found = {name: set() for name in delicate}
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name in found:
            found[equation.primitive.name] |= {v.aval.dtype for v in equation.outvars}
    for name in ("exp", "log", "rsqrt", "reduce_max"):
        assert found[name] == {jnp.dtype("float32")}, name
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert any(e.invars[0].aval.dtype == dtype for e in products)
    assert jaxpr.out_avals[0].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_products_accumulate_in_float32(dtype):
    # In either half precision a running sum of ones comes to a stop before 4096.
    ones = jnp.ones((2, 4096), dtype)
    np.testing.assert_array_equal(np.asarray(ones @ ones.T, np.float32), 4096.0)
