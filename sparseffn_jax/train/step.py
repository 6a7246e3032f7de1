"""One optimizer update, compiled: loss, gradients of what trains, update."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from sparseffn_jax.evaluate import losses
from sparseffn_jax.models.paths import is_attention_kernel
from sparseffn_jax.nn.lora import init_lora, merge_lora
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.loss_scale import dynamic_loss_scale, has_overflowed, scale_of
from sparseffn_jax.train.recipes import (
    RECIPES,
    Labels,
    combine,
    partition,
    split_ffn,
    warmup_cosine,
)

Params = dict[str, Any]


class TrainState(NamedTuple):
    """What an update changes: float32 master weights, and the optimizer's state for them."""

    trainable: Params
    optimizer: optax.OptState


class Stage(NamedTuple):
    """One stage of a recipe: its transform, labels, and rates by number of updates."""

    optimizer: optax.GradientTransformation
    labels: Labels
    learning_rate: optax.Schedule
    ffn_learning_rate: optax.Schedule
    end: int


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """What one compiled step needs, in bytes.

    Attributes:
      temporary: activations, gradients and other buffers that live inside the step.
      optimizer: the optimizer's slots.
      trainable: the parameters that train.
    """

    temporary: int
    optimizer: int
    trainable: int


def make_stage(config: TrainConfig, params: Params, index: int, dtype: Any = jnp.float32) -> Stage:
    """Builds stage ``index`` of the config's recipe for ``params`` (or their shapes).

    ``dtype`` is that of the computation: in float16 the loss is scaled.
    """
    ends = (0, *config.stage_ends)
    steps = ends[index + 1] - ends[index]
    warmup = steps // 10 if config.warmup_steps is None else config.warmup_steps
    ffn_peak = config.ffn_learning_rate or config.learning_rate / 2
    rates = [warmup_cosine(peak, warmup, steps) for peak in (config.learning_rate, ffn_peak)]
    optimizer, labels = RECIPES[config.recipe][index](
        params, *rates, weight_decay=config.weight_decay, clip_norm=config.clip_norm
    )
    if jnp.dtype(dtype) == jnp.float16:
        optimizer = dynamic_loss_scale(optimizer, config.loss_scale, config.loss_scale_interval)
    return Stage(optimizer, labels, *rates, end=ends[index + 1])


def add_adapters(config: TrainConfig, params: Params) -> Params:
    """Returns ``params``, for the lora recipe with new adapters on attention under ``"lora"``."""
    if config.recipe != "lora":
        return params
    key = jax.random.key(config.seed)
    return {**params, "lora": init_lora(key, params, config.lora_rank, is_attention_kernel)}


def merge_adapters(params: Params) -> Params:
    """Returns the model's own parameters: those without adapters as they are."""
    if "lora" not in params:
        return params
    params = dict(params)
    adapters = params.pop("lora")
    # alpha = rank: with Adam, tuning alpha is tuning the learning rate (Hu et al. 2021, 4.1).
    flat: dict[tuple[str, ...], Any] = flatten_dict(adapters)
    rank = next(a for path, a in flat.items() if path[-1] == "a").shape[1]
    return merge_lora(params, adapters, alpha=rank)


def init_state(
    stage: Stage, params: Params, run: Callable[[Callable, Params], Any] | None = None
) -> tuple[TrainState, Params]:
    """Splits ``params`` into a fresh train state, its leaves copied in float32, and the frozen.

    Args:
      stage: whose labels say what trains.
      params: all parameters.
      run: applies the optimizer's ``init`` to what trains; ``None`` compiles it for one device.
    """
    trainable, frozen = partition(params, stage.labels)
    # The step donates its state: without the copy it would take the caller's arrays away.
    trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trainable)
    frozen = jax.tree.map(jnp.asarray, frozen)
    optimizer = (
        run(stage.optimizer.init, trainable) if run else jax.jit(stage.optimizer.init)(trainable)
    )
    return TrainState(trainable, optimizer), frozen


def make_step(
    model: nn.Module, stage: Stage, config: TrainConfig, teacher_model: nn.Module | None = None
):
    """Returns :func:`make_update`'s update jitted; its first argument, the state, is donated."""
    update = make_update(model, stage, config, teacher_model)
    return jax.jit(update, donate_argnums=0, compiler_options=compiler_options())


def compiler_options() -> dict[str, str]:
    """Returns what XLA must be told to compile an update well on this backend."""
    if jax.default_backend() != "cpu":
        return {}
    # It would remove optimization barriers before fusion, which they are there to bound.
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def make_update(
    model: nn.Module,
    stage: Stage,
    config: TrainConfig,
    teacher_model: nn.Module | None = None,
    *,
    axis_name: str | None = None,
    gather: Callable[[Params], Params] = lambda params: params,
):
    """Returns one update of a stage, to be compiled.

    It maps ``(state, frozen, teacher_params, batch, index, updates, rate_factor)`` to ``(state,
    metrics)``: ``batch`` holds ``(batch_size, window + 1)`` token ids; ``index`` is the step's
    number, from which dropout's keys come; ``updates`` counts the stage's updates so far; and
    ``rate_factor`` multiplies the learning rates. The metrics are the float32 scalars ``loss``,
    ``grad_norm`` (before clipping), ``update_norm``, ``learning_rate`` and ``ffn_learning_rate``,
    with a teacher ``cross_entropy``, and where more than the feed-forward layers trains, the
    norms of both parts: ``ffn_grad_norm``, ``rest_grad_norm``, ``ffn_update_norm`` and
    ``rest_update_norm``. In float16 also ``loss_scale`` and ``overflow``: 1 if the gradient
    overflowed, so that nothing was updated and the scale is going to be smaller.

    Args:
      model: a decoder.
      stage: what trains, and by which transform.
      config: the settings.
      teacher_model: to distil from.
      axis_name: under ``jax.pmap``, the axis over which batches are dealt out: gradients and
        metrics are its means, so that replicas stay equal.
      gather: brings parameters that are stored in pieces to where the computation needs them.
    """

    def loss_and_metrics(trainable, frozen, teacher_params, windows, key):
        params = merge_adapters(gather(combine(trainable, frozen)))
        inputs, targets = windows[:, :-1], windows[:, 1:]
        logits, states = losses.forward(
            model,
            params,
            inputs,
            dropout_key=key if config.dropout else None,
            with_hidden_states=config.hidden_weight > 0,
        )
        loss = cross_entropy = losses.cross_entropy(logits, targets)
        if teacher_model is None:
            return loss, {"loss": loss}
        teacher_logits, teacher_states = losses.forward(
            teacher_model,
            gather(teacher_params),
            inputs,
            with_hidden_states=config.hidden_weight > 0,
        )
        if config.distill_weight > 0:
            soft = losses.distillation_loss(logits, teacher_logits, config.temperature)
            loss = (1.0 - config.distill_weight) * loss + config.distill_weight * soft
        if config.hidden_weight > 0:
            loss = loss + config.hidden_weight * losses.hidden_state_mse(states, teacher_states)
        return loss, {"loss": loss, "cross_entropy": cross_entropy}

    ffn, rest = split_ffn(stage.labels)
    splits = all(set(jax.tree.leaves(part)) - {"frozen"} for part in (ffn, rest))

    def step(state, frozen, teacher_params, batch, index, updates, rate_factor):
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        scale = scale_of(state.optimizer)

        def scaled_loss(*args):
            loss, metrics = loss_and_metrics(*args)
            return loss if scale is None else scale * loss, metrics

        gradient = jax.grad(scaled_loss, has_aux=True)

        def microbatch_gradient(windows, number):
            key_here = jax.random.fold_in(key, number)
            return gradient(state.trainable, frozen, teacher_params, windows, key_here)

        count = config.accumulate_steps
        if count == 1:
            grads, metrics = microbatch_gradient(batch, 0)
        else:
            # A scan, not optax.MultiSteps: that keeps its accumulator between updates, in memory
            # and in checkpoints, and updates at some steps only.
            microbatches = batch.reshape(count, -1, batch.shape[-1])

            def add(total, numbered):
                return jax.tree.map(jnp.add, total, microbatch_gradient(*numbered)), None

            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                jax.eval_shape(microbatch_gradient, microbatches[0], 0),
            )
            total, _ = jax.lax.scan(add, zeros, (microbatches, jnp.arange(count)))
            grads, metrics = jax.tree.map(lambda x: x / count, total)
        if scale is not None:
            grads = jax.tree.map(lambda x: x / scale, grads)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        metrics["grad_norm"] = optax.tree.norm(grads)
        if splits:
            metrics |= _norms_by_part("grad_norm", grads)
        if scale is not None:
            overflow = has_overflowed(scale, metrics["grad_norm"])
            metrics |= {"loss_scale": scale, "overflow": overflow.astype(jnp.float32)}
        elif splits:
            grads = _contain_ffn(grads, metrics)

        deltas, optimizer = stage.optimizer.update(grads, state.optimizer, state.trainable)
        deltas = jax.tree.map(lambda delta: rate_factor * delta, deltas)
        metrics["update_norm"] = optax.tree.norm(deltas)
        if splits:
            metrics |= _norms_by_part("update_norm", deltas)
        metrics["learning_rate"] = rate_factor * stage.learning_rate(updates)
        metrics["ffn_learning_rate"] = rate_factor * stage.ffn_learning_rate(updates)
        trainable: Any = optax.apply_updates(state.trainable, deltas)
        return TrainState(trainable, optimizer), metrics

    return step


def _norms_by_part(name: str, tree: Params) -> dict[str, Any]:
    ffn, rest = split_ffn(tree)
    return {f"ffn_{name}": optax.tree.norm(ffn), f"rest_{name}": optax.tree.norm(rest)}


def _contain_ffn(grads: Params, metrics: dict[str, Any]) -> Params:
    """Drops a feed-forward gradient that alone is not finite: clipping would spread it to all."""
    ffn, rest = split_ffn(grads)
    sound = jnp.isfinite(metrics["ffn_grad_norm"]) | ~jnp.isfinite(metrics["rest_grad_norm"])
    return combine(jax.tree.map(lambda x: jnp.where(sound, x, 0.0), ffn), rest)


def step_memory(model: nn.Module, config: TrainConfig, window: int, stage: int = 0) -> StepMemory:
    """Compiles a recipe's update without running it, and returns the memory that it needs.

    Args:
      model: a decoder; nothing of it is allocated.
      config: recipe, batch size and microbatches.
      window: tokens a window predicts.
      stage: of the recipe.
    """
    ids = jax.ShapeDtypeStruct((1, window), jnp.int32)
    params = jax.eval_shape(lambda i: model.init(jax.random.key(0), i)["params"], ids)
    params = jax.eval_shape(lambda p: add_adapters(config, p), params)
    this = make_stage(config, params, stage, model.dtype)
    state, frozen = jax.eval_shape(lambda p: init_state(this, p), params)
    batch = jax.ShapeDtypeStruct((config.batch_size, window + 1), jnp.int32)
    step = make_step(model, this, config)
    scalars = np.int32(0), np.int32(0), np.float32(1.0)
    analysis: Any = step.lower(state, frozen, None, batch, *scalars).compile().memory_analysis()
    return StepMemory(
        temporary=analysis.temp_size_in_bytes,
        optimizer=_bytes(state.optimizer),
        trainable=_bytes(state.trainable),
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
