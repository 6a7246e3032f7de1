"""A run while it trains: its state, what one step does to it, and what it restores and saves."""

import contextlib
import dataclasses
import hashlib
import json
import reprlib
import time
from typing import Any, NoReturn

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from sparseffn_jax.evaluate.losses import make_evaluator
from sparseffn_jax.measure.memory import less_memory, needed_bytes, program_shortage
from sparseffn_jax.nn.lora import LoraAdapter
from sparseffn_jax.progress import say, stage
from sparseffn_jax.train import guard, processes
from sparseffn_jax.train.checkpoints import CheckpointStore, Position, Snapshot
from sparseffn_jax.train.choices import Resume
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import TokenWindows, make_batches
from sparseffn_jax.train.identity import identify
from sparseffn_jax.train.metrics import MetricsLog, Record
from sparseffn_jax.train.recipes import combine, is_ffn, partition
from sparseffn_jax.train.sharding import path_name
from sparseffn_jax.train.step import (
    Batch,
    Stage,
    TrainState,
    adapter_scales,
    add_adapters,
    init_state,
    make_stage,
    make_update,
    merge_adapters,
    stage_rates,
)
from sparseffn_jax.train.strategies import Strategy

Params = dict[str, Any]
# Settings that say what is shown and kept of a run, and not what it computes; only where the guard
# would go back to depends on them.
_FREE = frozenset(("log_every", "eval_every", "save_every", "keep_checkpoints", "report_to"))
# Checkpoints hold hashes of these, which tell a reader nothing.
_HASHED = {
    "training_text": "the training text is another",
    "same.model": "the model's config or the configs of its FFNs are others",
    "same.parameters": "the parameters to start from are others",
    "same.teacher": "the teacher is another",
}


class Run:
    """A run's changing parts, and how one step changes them.

    It begins, or goes on from a checkpoint, when it is constructed; the arguments are those of
    :func:`sparseffn_jax.train.loop.train`, and ``store`` holds the run's checkpoints.

    Attributes:
      position: where the run stands.

    Raises:
      ValueError: on construction, if the checkpoint is of other settings or of another model.
      FileNotFoundError, FileExistsError: if the checkpoints are not as ``resume`` wants them.
    """

    position: Position

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        windows: TokenWindows,
        config: TrainConfig,
        store: CheckpointStore,
        teacher: tuple[nn.Module, Params] | None,
        strategy: Strategy,
        resume: Resume,
        remat: bool | None = None,
    ):
        self._may_remat = remat is None and getattr(model, "remat", True) is False
        if remat is not None:
            model = _with_remat(model, remat)
        self._model, self._config, self._store = model, config, store
        self._strategy, self._windows = strategy, windows
        self._teacher_model, teacher_params = teacher or (None, None)
        self._teacher_params = strategy.place(teacher_params)
        self._evaluate = make_evaluator(model, strategy.place_evaluation)
        # The batches are of row numbers: every process knows them, and reads what it needs.
        rows = np.arange(len(windows.train))
        self._batches = make_batches(rows, config.batch_size, config.seed)
        self._has_evaluated = False
        self._batch_shape = (config.batch_size, windows.train.shape[1])
        same = {"training_text": _text_hash(windows), "same": identify(model, params, teacher)}
        self._settings = _settings(config) | same
        self._stage_ends = config.stage_ends
        self._say, self._doing = say, stage
        if not processes.is_first():
            self._say, self._doing = lambda _: None, contextlib.nullcontext
        self._tokens, self._seconds = 0, 0.0
        params = add_adapters(config, params)
        latest = _step_to_resume(store, resume)
        self._saved_step = latest or 0
        if latest is None:
            self._begin(params)
        else:
            self._restore(latest, params)

    def model_params(self) -> Params:
        """Returns the model's parameters as they are now, with the adapters merged."""
        return merge_adapters(self._config, combine(self._state.trainable, self._frozen))

    def adapter(self) -> LoraAdapter | None:
        """Returns the adapters as they are now, with what trains beside them, if there are any."""
        trained = dict(self._state.trainable)
        if (factors := trained.pop("lora", None)) is None:
            return None
        factors, trained = processes.to_every_process((factors, trained))
        return LoraAdapter(factors, adapter_scales(self._config, factors), trained)

    def start(self, log: MetricsLog) -> None:
        """Shows what a user should know before the first step."""
        self._say, self._doing = log.say, log.doing
        self._log_warnings(log)
        if mixture := self._config.loss_mixture:
            log.say(f"the loss is {mixture}; validation is cross-entropy alone")
        if report := self._strategy.report(combine(self._state.trainable, self._frozen)):
            log.say(report)

    def advance(self, log: MetricsLog) -> Record:
        """Reads one batch, updates, lets the guard judge it, and logs; returns the metrics."""
        if self.position.step == self._stage.end:
            self.position = dataclasses.replace(
                self.position, stage=self.position.stage + 1, updates=0
            )
            self._start_stage(combine(self._state.trainable, self._frozen))
        # The snapshot is taken before the step and kept if the step's loss is good, so that only
        # a state that has been seen to work is gone back to.
        candidate = self._take_snapshot() if self._is_snapshot_due() else None
        before = self.position
        rows, metrics = self._update()
        guard_state, verdict = guard.observe(self._config.guard, before.guard, metrics)
        self.position = self._position_after(rows, metrics, guard_state)
        if verdict in (guard.Verdict.DIVERGED, guard.Verdict.FFN_DIVERGED):
            reason = guard.describe(self._config.guard, before.guard, verdict, metrics)
            self._go_back(log, reason, verdict is guard.Verdict.FFN_DIVERGED)
            self._log_validation(log, metrics)
            return metrics
        if verdict is guard.Verdict.GOOD and candidate is not None:
            self._good = candidate
            if candidate.position.step % self._config.save_every == 0:
                self._save(candidate)
        self._log_warnings(log)
        if metrics.get("overflow"):
            self._log_overflow(log, metrics)
            self._log_validation(log, metrics)
        else:
            self._log(log, metrics)
        return metrics

    def save(self, log: MetricsLog) -> None:
        """Writes a checkpoint of the run as it stands, complete enough to go on exactly."""
        step = self.position.step
        is_over = step == self._config.steps
        with (
            processes.leaving_together("saved"),
            log.doing(f"writing the checkpoint of step {step}"),
        ):
            snapshot = self._take_snapshot()
            self._save(snapshot, None if is_over or snapshot is self._good else self._good)
            self._store.wait()
        self._log_warnings(log)

    def _begin(self, params: Params) -> None:
        self.position = Position(
            step=0,
            stage=0,
            updates=0,
            data=self._batches.get_state(),
            data_hash=hashlib.sha256().hexdigest(),
            guard=guard.GuardState(),
        )
        self._start_stage(params)

    def _update(self) -> tuple[np.ndarray, Record]:
        """Updates the state by the next batch; returns the numbers of its rows, and the metrics."""
        started = time.perf_counter()
        rows = next(self._batches)
        batch = self._strategy.place_batch(self._windows.train, rows)
        if self._windows.train_counted is not None:
            batch = Batch(batch, self._strategy.place_batch(self._windows.train_counted, rows))
        self._state, metrics = self._step(
            self._state,
            self._frozen,
            self._teacher_params,
            batch,
            np.int32(self.position.step),
            np.int32(self.position.updates),
            np.float32(self.position.guard.rate_factor),
        )
        metrics = {name: float(value) for name, value in metrics.items()}
        self._seconds += time.perf_counter() - started
        self._tokens += len(rows) * (self._windows.train.shape[1] - 1)
        return rows, metrics

    def _position_after(
        self, rows: np.ndarray, metrics: Record, guard_state: guard.GuardState
    ) -> Position:
        """Returns the position after the step that has read the batch of these rows."""
        position = self.position
        return Position(
            step=position.step + 1,
            stage=position.stage,
            updates=position.updates + (not metrics.get("overflow")),
            data=self._batches.get_state(),
            data_hash=processes.chain_batch(
                position.data_hash, rows, self._windows.train, self._windows.train_counted
            ),
            guard=guard_state,
        )

    def _start_stage(self, params: Params) -> None:
        self._stage = self._make_stage(params)
        with self._doing("preparing the parameters"):
            self._state, self._frozen = self._strategy.init_state(self._stage, params)
            self._good = Snapshot(self.position, self._strategy.to_host(self._state))
        self._compile()

    def _restore(self, step: int, params: Params) -> None:
        """Takes everything from a checkpoint; ``params`` gives the names and shapes to find."""
        strategy = self._strategy
        with self._doing(f"reading the checkpoint of step {step}"):
            self.position, last_good, settings = self._store.read(step)
            going_on = self._take_over(settings)
            params = self._store.restore_params(step, params, strategy.abstract)
            self._stage = self._make_stage(params)
            like, _ = jax.eval_shape(lambda p: init_state(self._stage, p), params)
            like = strategy.abstract(like)
            trainable, frozen = partition(params, self._stage.labels)
            optimizer = self._store.restore_optimizer(step, like.optimizer)
            self._state = strategy.place_state(TrainState(trainable, optimizer))
            self._frozen = strategy.place(frozen)
            good_position, good_state = self.position, self._state
            if last_good is not None:
                good_position = last_good
                good_state = strategy.place_state(self._store.restore_last_good(step, like))
            self._good = Snapshot(good_position, strategy.to_host(good_state))
            self._batches.set_state(self.position.data)
        self._say(going_on)
        if step < self._config.steps:
            self._compile()

    def _take_over(self, saved: dict[str, Any]) -> str:
        """Checks a checkpoint's settings, and takes over what follows from them.

        Returns:
          What the user should know: from which step the run goes on, and how.
        """
        config, step = self._config, self.position.step
        # A checkpoint that was written before there was a setting has its default.
        before = _settings(TrainConfig()) | saved
        self._check_settings(before)
        if before.get("remat") and self._may_remat:
            # Rounding would differ otherwise.
            self._model, self._may_remat = _with_remat(self._model, True), False
        steps, ends = before["steps"], before.get("stage_ends", config.stage_ends)
        if steps == config.steps:
            self._stage_ends = tuple(ends)
            over = ", which is over" if step == steps else ""
            return f"going on from step {step} of a run of {steps} steps{over}"
        number = self.position.stage
        self._stage_ends = (*ends[:number], *config.stage_ends[number:])
        shorter = dataclasses.replace(config, steps=steps)
        updates = np.arange(self.position.updates)
        as_before = np.array_equal(
            stage_rates(shorter, number, ends)[0](updates),
            stage_rates(config, number, self._stage_ends)[0](updates),
        )
        return (
            f"going on from step {step}, with {config.steps} steps in place of {steps}: from here "
            f"on the learning rates are those of {config.steps} steps"
            + ("" if as_before else f"; so far they were those of {steps}")
        )

    def _check_settings(self, saved: dict[str, Any]) -> None:
        old: dict[str, Any] = flatten_dict(saved, sep=".")
        new: dict[str, Any] = flatten_dict(self._settings, sep=".")
        if self._config.steps > saved["steps"]:
            old["steps"] = new["steps"]
        # A checkpoint from before it was noted what a run is of may be of any.
        unknown = {name for name in new if name.startswith("same.") and name not in old}
        changed = {
            name: (old.get(name), value)
            for name, value in new.items()
            if name not in _FREE | unknown and old.get(name) != value
        }
        if changed:
            values = "; ".join(
                _HASHED.get(name)
                or f"{name.removeprefix('same.')} was {reprlib.repr(before)}, "
                f"now {reprlib.repr(now)}"
                for name, (before, now) in changed.items()
            )
            raise ValueError(
                f"the run in {self._store.path} was started with other settings and cannot go on "
                f"with these: {values}. Give another folder, or what it was started with; steps "
                f"may grow, and {', '.join(sorted(_FREE))} may change"
            )

    def _make_stage(self, params: Params) -> Stage:
        return make_stage(
            self._config, params, self.position.stage, self._model.dtype, self._stage_ends
        )

    def _compile(self) -> None:
        # Compiled ahead of time, so that neither the pace nor the time left counts it.
        shortage = self._compile_step()
        # All processes must run one program.
        if self._may_remat and processes.agree_on_largest(bool(shortage)):
            self._say(
                f"{shortage or 'another process is short of memory'}: going on with remat, which "
                "computes each block again in the backward pass"
            )
            self._model, self._may_remat = _with_remat(self._model, True), False
            shortage = self._compile_step()
        if shortage:
            raise MemoryError(f"{shortage}: {self._less_memory()}")

    def _compile_step(self) -> str | None:
        """Compiles the step, and returns what memory it lacks, if it lacks any."""
        config, (batch_size, width) = self._config, self._batch_shape
        stages = len(self._stage_ends)
        of = f" of stage {self.position.stage + 1} of {stages}" if stages > 1 else ""
        with self._doing(
            f"compiling the training step{of} ({config.recipe}, {batch_size} x {width - 1} tokens)"
        ):
            self._step = self._compiled(self._model, config, self._batch_shape)
        return program_shortage(self._step, "a training step")

    def _compiled(self, model: nn.Module, config: TrainConfig, batch_shape: tuple[int, int]) -> Any:
        update = make_update(
            model,
            self._stage,
            config,
            self._teacher_model,
            gather=self._strategy.gather,
            batch_shards=self._strategy.batch_shards,
        )
        return self._strategy.compile(
            update,
            self._state,
            self._frozen,
            self._teacher_params,
            batch_shape,
            counts=self._windows.train_counted is not None,
        )

    def _less_memory(self) -> str:
        model, config, (batch_size, width) = self._model, self._config, self._batch_shape
        others: dict[str, tuple[nn.Module, TrainConfig, tuple[int, int]]] = {}
        if getattr(model, "remat", True) is False:
            others["remat=True"] = _with_remat(model, True), config, self._batch_shape
        parts = 2 * config.accumulate_steps
        if batch_size % (parts * self._strategy.batch_shards) == 0:
            more = dataclasses.replace(config, accumulate_steps=parts)
            others[f"accumulate_steps={parts}"] = model, more, self._batch_shape
            fewer = dataclasses.replace(config, batch_size=batch_size // 2)
            others[f"batch_size={batch_size // 2}"] = model, fewer, (batch_size // 2, width)
        if tokens := (width - 1) // 2:
            others[f"window={tokens}"] = model, config, (batch_size, tokens + 1)
        with self._doing("finding out what would need less memory"):
            needed = {name: needed_bytes(self._compiled(*other)) for name, other in others.items()}
        return less_memory(needed)

    def _is_snapshot_due(self) -> bool:
        step, config = self.position.step, self._config
        return step % config.guard.snapshot_every == 0 or step % config.save_every == 0

    def _take_snapshot(self) -> Snapshot:
        if self._good.position.step == self.position.step:
            return self._good
        return Snapshot(self.position, self._strategy.to_host(self._state))

    def _save(self, snapshot: Snapshot, last_good: Snapshot | None = None) -> None:
        step = snapshot.position.step
        if step > 0 and step != self._saved_step:
            self._saved_step = step
            follows = {
                "stage_ends": self._stage_ends,
                "remat": getattr(self._model, "remat", False),
            }
            self._store.save(snapshot, self._frozen, self._settings | follows, last_good)

    def _go_back(self, log: MetricsLog, reason: str, ffn_alone: bool) -> None:
        limits, step = self._config.guard, self.position.step
        state = guard.after_restore(limits, self.position.guard)
        if state.restores > limits.max_restores:
            self._give_up(reason)
        good = self._good
        good_state = self._strategy.place_state(good.state)
        if ffn_alone:
            self._state = _with_ffn_of(self._state, good_state)
            self.position = dataclasses.replace(self.position, guard=state)
        else:
            self._state = good_state
            self.position = dataclasses.replace(
                self.position, updates=good.position.updates, guard=state
            )
        part = "feed-forward layers" if ffn_alone else "state"
        log.event(
            {
                "step": step,
                "event": "restore",
                "part": part,
                "reason": reason,
                "restored_step": good.position.step,
                "rate_factor": state.rate_factor,
            },
            f"step {step}: {reason}; restored the {part} of step {good.position.step}, going on "
            f"past this batch with the learning rate times {state.rate_factor:g} "
            f"(restore {state.restores} of {limits.max_restores})",
        )

    def _give_up(self, reason: str) -> NoReturn:
        self._store.wait()
        latest = self._store.sealed_step()
        checkpoint = (
            "no checkpoint had been written yet"
            if latest is None
            else f"the last good checkpoint is {self._store.path / str(latest)}"
        )
        raise guard.DivergenceError(
            f"step {self.position.step}: {reason}; training diverged again after "
            f"{self._config.guard.max_restores} restores, each with a lower rate; {checkpoint}. "
            "Try a lower learning_rate or a longer warm-up"
        )

    def _log_warnings(self, log: MetricsLog) -> None:
        for warning in self._store.take_warnings():
            log.event(
                {"step": self.position.step, "event": "checkpoint", "reason": warning}, warning
            )

    def _log_overflow(self, log: MetricsLog, metrics: Record) -> None:
        step, scale = self.position.step, metrics["loss_scale"]
        log.event(
            {"step": step, "event": "overflow", "scale": scale},
            f"step {step}: the gradient overflowed float16 with the loss times {scale:g}; going "
            "on with half of that",
        )

    def _log(self, log: MetricsLog, metrics: Record) -> None:
        config, step = self._config, self.position.step
        tokens_per_second = self._tokens / self._seconds
        log.advance(step, metrics, tokens_per_second)
        evaluates = self._is_evaluation_due()
        if not (evaluates or step == config.steps or step % config.log_every == 0):
            return
        metrics["tokens_per_second"] = tokens_per_second
        self._tokens, self._seconds = 0, 0.0
        if evaluates:
            metrics["validation_loss"] = self._validate(log)
        mixture = config.loss_mixture
        log.record({"step": step} | metrics | ({"loss_is": mixture} if mixture else {}))

    def _log_validation(self, log: MetricsLog, metrics: Record) -> None:
        """Logs the validation loss alone, if it is due after a step that was not kept."""
        if self._is_evaluation_due():
            metrics["validation_loss"] = self._validate(log)
            log.record({"step": self.position.step, "validation_loss": metrics["validation_loss"]})

    def _is_evaluation_due(self) -> bool:
        config, step = self._config, self.position.step
        if not config.eval_every:
            return False
        return step == config.steps or step % config.eval_every == 0

    def _validate(self, log: MetricsLog) -> float:
        config = self._config
        what = "evaluating" if self._has_evaluated else "compiling the evaluation"
        self._has_evaluated = True
        with log.doing(what) as note, self._strategy.tracing():
            return self._evaluate(
                self.model_params(),
                self._windows.validation,
                config.batch_size // config.accumulate_steps,
                self._windows.validation_counted,
                on_batch=lambda done, total: note(f"evaluating, {done}/{total} windows"),
            )


def _text_hash(windows: TokenWindows) -> str:
    text = hashlib.sha256()
    for array in (windows.train, windows.train_counted):
        if array is not None:
            # hashlib reads flat arrays where they are.
            text.update(np.ascontiguousarray(array).reshape(-1).data)
    return text.hexdigest()


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Returns settings with the defaults of their optimizer, as JSON gives them back."""
    rate, ffn_rate = config.peak_rates
    numbers = {
        "learning_rate": rate,
        "ffn_learning_rate": ffn_rate,
        "weight_decay": config.decay,
    }
    return json.loads(json.dumps(dataclasses.asdict(config) | numbers))


def _with_remat(model: Any, remat: bool) -> Any:
    if not hasattr(model, "remat"):
        raise ValueError(f"remat={remat} is for a Decoder, which a {type(model).__name__} is not")
    return model.clone(remat=remat)


def _step_to_resume(store: CheckpointStore, resume: Resume) -> int | None:
    """Returns the step of the checkpoint to go on from, or ``None`` to begin; checks ``resume``."""
    latest = store.latest_step()
    if resume == "never" and latest is not None:
        raise FileExistsError(
            f"{store.path} already holds the checkpoints of a run, up to step {latest}: resume "
            "it, or give another folder"
        )
    if resume == "must" and latest is None:
        raise FileNotFoundError(f"there is no checkpoint to resume from in {store.path}")
    return latest


def _with_ffn_of(state: TrainState, good: TrainState) -> TrainState:
    """Returns ``state`` with the feed-forward layers of ``good``, and their optimizer's slots."""
    return jax.tree_util.tree_map_with_path(
        lambda path, now, then: then if is_ffn(tuple(path_name(path).split("/"))) else now,
        state,
        good,
    )
