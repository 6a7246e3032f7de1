"""What one training step computes: the loss, the gradient of what trains, and the update."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Int

from sparseffn_jax.evaluate import losses
from sparseffn_jax.evaluate.fused_loss import Mixture, mean_loss
from sparseffn_jax.models.paths import is_out_in, lora_targets
from sparseffn_jax.nn.lora import init_lora, merge_lora
from sparseffn_jax.ops.plans.choice import platform_of
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.loss_scale import dynamic_loss_scale, has_overflowed, scale_of
from sparseffn_jax.train.recipes import (
    RECIPES,
    Labels,
    combine,
    partition,
    split_ffn,
)
from sparseffn_jax.train.schedules import make_schedule

Params = dict[str, Any]


class TrainState(NamedTuple):
    """What an update changes.

    Attributes:
      trainable: the parameters that train, as float32 master weights.
      optimizer: the state of the stage's transform for them.
    """

    trainable: Params
    optimizer: optax.OptState


class Stage(NamedTuple):
    """One stage of a recipe.

    Attributes:
      optimizer: the transform for the parameters that train.
      labels: a tree like the parameters that says which of them train, see :mod:`.recipes`.
      learning_rate: maps the number of updates in this stage to the rate of ``"rest"``.
      ffn_learning_rate: maps the number of updates in this stage to the rate of ``"ffn"``.
      end: the step after which the stage is over.
    """

    optimizer: optax.GradientTransformation
    labels: Labels
    learning_rate: optax.Schedule
    ffn_learning_rate: optax.Schedule
    end: int


class Batch(NamedTuple):
    """Windows of which some targets do not count.

    Attributes:
      tokens: int32 token ids, ``(batch_size, window + 1)``.
      counted: which targets the loss is a mean over, ``(batch_size, window)``.
    """

    tokens: Int[Array, "b w"]
    counted: Bool[Array, "b t"]


class Update(Protocol):
    """One optimizer update, as :func:`make_update` returns it and JAX compiles it.

    Args:
      state: the train state; the update returns the next one.
      frozen: the parameters that do not train.
      teacher_params: the teacher's parameters, or ``None`` without a teacher.
      batch: int32 token ids, ``(batch_size, window + 1)``; or a :class:`Batch`, of whose targets
        some do not count.
      index: the step's number, from which dropout's keys come.
      updates: the number of updates of the stage so far, by which the rates are scheduled.
      rate_factor: the factor by which both learning rates are multiplied.

    Returns:
      The next state, and as metrics the float32 scalars ``loss`` (nats a token), ``grad_norm``
      (before clipping), ``update_norm``, ``learning_rate`` and ``ffn_learning_rate``. With a
      teacher there is ``cross_entropy`` (nats a token) as well, and where more than the
      feed-forward layers trains, the norms of both parts: ``ffn_grad_norm``, ``rest_grad_norm``,
      ``ffn_update_norm`` and ``rest_update_norm``. In float16 there are ``loss_scale`` and
      ``overflow``, which is 1 if the gradient overflowed, so that nothing but the scale has
      changed, and 0 otherwise.
    """

    def __call__(
        self,
        state: TrainState,
        frozen: Params,
        teacher_params: Params | None,
        batch: Any,
        index: Any,
        updates: Any,
        rate_factor: Any,
    ) -> tuple[TrainState, dict[str, Any]]: ...


def make_stage(
    config: TrainConfig,
    params: Params,
    index: int,
    dtype: Any = jnp.float32,
    ends: Sequence[int] | None = None,
) -> Stage:
    """Builds a stage of the config's recipe.

    Args:
      config: the settings.
      params: all parameters, or their shapes.
      index: the number of the stage, from 0.
      dtype: the precision of the computation; in float16 the loss is scaled.
      ends: the steps after which the stages are over; ``None`` takes the config's.
    """
    ends = ends or config.stage_ends
    rates = stage_rates(config, index, ends)
    recipe = RECIPES[config.recipe][index]
    if config.recipe == "lora":
        recipe = partial(recipe, train_ffns=config.lora_ffns)
    optimizer, labels = recipe(
        params,
        *rates,
        weight_decay=config.decay,
        clip_norm=config.clip_norm,
        optimizer=config.optimizer,
    )
    if jnp.dtype(dtype) == jnp.float16:
        optimizer = dynamic_loss_scale(optimizer, config.loss_scale, config.loss_scale_interval)
    return Stage(optimizer, labels, *rates, end=ends[index])


def stage_rates(
    config: TrainConfig, index: int, ends: Sequence[int]
) -> tuple[optax.Schedule, optax.Schedule]:
    """Returns the learning rates of ``"rest"`` and ``"ffn"`` in a stage, see :class:`Stage`.

    Args:
      config: the settings.
      index: the number of the stage, from 0.
      ends: the steps after which the stages are over.
    """
    steps = ends[index] - (ends[index - 1] if index else 0)
    warmup = steps // 10 if config.warmup_steps is None else config.warmup_steps
    rest, ffn = (make_schedule(config.schedule, peak, warmup, steps) for peak in config.peak_rates)
    return rest, ffn


def add_adapters(config: TrainConfig, params: Params) -> Params:
    """Returns ``params``; the lora recipe adds new adapters under ``"lora"``.

    Raises:
      ValueError: if a name of the config's targets or ranks matches none of the model's linear
        maps, or a rank does not fit one.
    """
    if config.recipe != "lora":
        return params
    paths = flatten_dict(params).keys()
    targets = set().union(*lora_targets(paths, config.lora_target_names).values())
    ranks = dict.fromkeys(targets, config.lora_rank)
    given = config.lora_ranks_by_name
    for name, kernels in lora_targets(paths, list(given)).items():
        if not kernels & targets:
            raise ValueError(
                f"lora_ranks={config.lora_ranks!r} gives {name} a rank, but lora_targets="
                f"{config.lora_targets!r} gives it no adapter: name it there too"
            )
        ranks |= dict.fromkeys(kernels & targets, given[name])
    key = jax.random.key(config.seed)
    adapters = init_lora(key, params, ranks.__getitem__, ranks.__contains__, is_out_in)
    return {**params, "lora": adapters}


def merge_adapters(config: TrainConfig, params: Params) -> Params:
    """Returns the model's own parameters, with the adapters, if there are any, merged in."""
    if "lora" not in params:
        return params
    params = dict(params)
    adapters = params.pop("lora")
    return merge_lora(params, adapters, adapter_scales(config, adapters))


def adapter_scales(config: TrainConfig, adapters: Params) -> dict[tuple[str, ...], float]:
    """Returns what each product of factors is multiplied with, by its kernel's path."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(adapters)
    return {
        path[:-1]: config.lora_scale(leaf.shape[1])
        for path, leaf in flat.items()
        if path[-1] == "a"
    }


def init_state(
    stage: Stage, params: Params, run: Callable[[Callable, Params], Any] | None = None
) -> tuple[TrainState, Params]:
    """Returns a fresh train state, with float32 copies of what trains, and the frozen parameters.

    Args:
      stage: the stage that begins; its labels say what trains.
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
    """Returns :func:`make_update`'s update under ``jax.jit``, which may overwrite its state."""
    update = make_update(model, stage, config, teacher_model)
    return jax.jit(update, donate_argnums=0, compiler_options=compiler_options())


def compiler_options(arguments: Any = None) -> dict[str, str]:
    """Returns what XLA must be told to compile an update well for where its arguments lie.

    Args:
      arguments: arrays, or shapes with shardings; ``None`` stands for JAX's first device.
    """
    if platform_of(arguments) != "cpu":
        return {}
    # That pass removes optimization barriers before fusion, which they are there to bound.
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def make_update(
    model: nn.Module,
    stage: Stage,
    config: TrainConfig,
    teacher_model: nn.Module | None = None,
    *,
    axis_name: str | None = None,
    gather: Callable[[Params], Params] = lambda params: params,
    batch_shards: int = 1,
) -> Update:
    """Returns one update of a stage, to be compiled.

    Args:
      model: the decoder that trains.
      stage: what trains, and by which transform.
      config: the settings.
      teacher_model: the decoder to distil from, if any.
      axis_name: under ``jax.pmap``, the axis over which batches are dealt out: gradients and
        metrics are its means, so that replicas stay equal.
      gather: brings parameters that are stored in pieces to where the computation needs them.
      batch_shards: the number of parts in which a mesh deals out the batch; 1 under ``jax.pmap``,
        where the update sees one part only.
    """
    loss_and_metrics = _make_loss(model, config, teacher_model, gather, batch_shards)
    ffn, rest = split_ffn(stage.labels)
    by_part = all(set(jax.tree.leaves(part)) - {"frozen"} for part in (ffn, rest))

    def update(state, frozen, teacher_params, batch, index, updates, rate_factor):
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        scale = scale_of(state.optimizer)

        def scaled_loss(*args):
            loss, metrics = loss_and_metrics(*args)
            return loss if scale is None else scale * loss, metrics

        gradient = partial(
            jax.grad(scaled_loss, has_aux=True), state.trainable, frozen, teacher_params
        )
        tokens, weights = batch, None
        if isinstance(batch, Batch):
            tokens, weights = batch.tokens, _weights(batch.counted, config, axis_name)
        microbatches = (tokens, weights)
        grads, metrics = _mean_of_microbatches(gradient, microbatches, key, config.accumulate_steps)
        if scale is not None:
            grads = jax.tree.map(lambda x: x / scale, grads)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        metrics |= _norms("grad_norm", grads, by_part)
        if scale is not None:
            overflow = has_overflowed(scale, metrics["grad_norm"])
            metrics |= {"loss_scale": scale, "overflow": overflow.astype(jnp.float32)}
        elif by_part:
            grads = _contain_ffn(grads, metrics)
        state, deltas = _apply(stage, state, grads, rate_factor)
        metrics |= _norms("update_norm", deltas, by_part)
        metrics["learning_rate"] = rate_factor * stage.learning_rate(updates)
        metrics["ffn_learning_rate"] = rate_factor * stage.ffn_learning_rate(updates)
        return state, metrics

    return update


def _make_loss(
    model: nn.Module,
    config: TrainConfig,
    teacher_model: nn.Module | None,
    gather: Callable[[Params], Params],
    batch_shards: int,
) -> Callable:
    """Returns what maps ``(trainable, frozen, teacher_params, batch, key)`` to loss and metrics.

    ``batch`` holds the token ids of a microbatch and the weights of its targets, or ``None`` where
    all weigh the same; ``key`` is for dropout.
    """
    with_states = config.hidden_weight > 0
    mixture = Mixture(config.distill_weight, config.temperature, batch_shards)

    def loss_and_metrics(trainable, frozen, teacher_params, batch, key):
        params = merge_adapters(config, gather(combine(trainable, frozen)))
        windows, weights = batch
        inputs, targets = windows[:, :-1], windows[:, 1:]
        outputs, states = losses.forward(
            model,
            params,
            inputs,
            dropout_key=key if config.dropout else None,
            with_hidden_states=with_states,
        )
        if teacher_model is None:
            loss, _ = mean_loss(outputs, targets, None, mixture, weights)
            return loss, {"loss": loss}
        teacher, teacher_states = losses.forward(
            teacher_model, gather(teacher_params), inputs, with_hidden_states=with_states
        )
        soft = teacher if config.distill_weight > 0 else None
        loss, cross_entropy = mean_loss(outputs, targets, soft, mixture, weights)
        if config.hidden_weight > 0:
            loss = loss + config.hidden_weight * losses.hidden_state_mse(states, teacher_states)
        return loss, {"loss": loss, "cross_entropy": cross_entropy}

    return loss_and_metrics


def _weights(
    counted: Bool[Array, "b t"], config: TrainConfig, axis_name: str | None
) -> Float[Array, "b t"]:
    """Returns the weights by which the mean over microbatches is that over all counted targets.

    Microbatches and devices hold unequal numbers of them: a mean of their means would weigh a
    target by its neighbours. A batch without any has the weights 0, and so the loss 0.
    """
    count = counted.sum(dtype=jnp.float32)
    if axis_name is not None:
        count = jax.lax.pmean(count, axis_name)
    return counted * (config.accumulate_steps / jnp.where(count > 0.0, count, 1.0))


def _mean_of_microbatches(gradient: Callable, batch: Any, key: Any, count: int) -> Any:
    """Returns the mean of ``gradient(batch, key)`` over ``count`` equal parts of a batch."""

    def of_microbatch(part, number):
        return gradient(part, jax.random.fold_in(key, number))

    if count == 1:
        return of_microbatch(batch, 0)
    # A scan, not optax.MultiSteps: that keeps its accumulator between updates, in memory and in
    # checkpoints, and updates at some steps only.
    microbatches = jax.tree.map(lambda x: x.reshape(count, -1, x.shape[-1]), batch)

    def add(total, numbered):
        return jax.tree.map(jnp.add, total, of_microbatch(*numbered)), None

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(of_microbatch, jax.tree.map(lambda x: x[0], microbatches), 0),
    )
    total, _ = jax.lax.scan(add, zeros, (microbatches, jnp.arange(count)))
    return jax.tree.map(lambda x: x / count, total)


def _apply(stage: Stage, state: TrainState, grads: Params, rate_factor: Any) -> Any:
    """Returns the state after one update by ``grads``, and how the parameters have changed."""
    deltas, optimizer = stage.optimizer.update(grads, state.optimizer, state.trainable)
    deltas: Any = jax.tree.map(lambda delta: rate_factor * delta, deltas)
    trainable: Any = optax.apply_updates(state.trainable, deltas)
    return TrainState(trainable, optimizer), deltas


def _norms(name: str, tree: Params, by_part: bool) -> dict[str, Any]:
    """Returns a tree's norm and, on request, those of its feed-forward layers and its rest."""
    if not by_part:
        return {name: optax.tree.norm(tree)}
    # Every leaf is read once: for a large model that takes a part of the step.
    ffn, rest = (optax.tree.norm(part, squared=True) for part in split_ffn(tree))
    squared = {name: ffn + rest, f"ffn_{name}": ffn, f"rest_{name}": rest}
    return {key: jnp.sqrt(value) for key, value in squared.items()}


def _contain_ffn(grads: Params, metrics: dict[str, Any]) -> Params:
    """Drops a feed-forward gradient that alone is not finite: clipping would spread it to all."""
    ffn, rest = split_ffn(grads)
    sound = jnp.isfinite(metrics["ffn_grad_norm"]) | ~jnp.isfinite(metrics["rest_grad_norm"])
    # XLA would compute it, and compile it, once for every leaf.
    sound = jax.lax.optimization_barrier(sound)
    return combine(jax.tree.map(lambda x: jnp.where(sound, x, 0.0), ffn), rest)
