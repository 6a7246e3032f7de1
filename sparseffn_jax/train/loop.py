"""The fine-tuning loop: batches in, updates, guard, log, checkpoints; resumable bit for bit."""

import contextlib
import dataclasses
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from sparseffn_jax.train import guard, processes
from sparseffn_jax.train.checkpoints import CheckpointStore, Position, Snapshot
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import TokenWindows, make_batches
from sparseffn_jax.train.losses import check_token_ids, make_evaluator
from sparseffn_jax.train.metrics import MetricsLog, Record
from sparseffn_jax.train.recipes import combine, is_ffn, partition
from sparseffn_jax.train.run_lock import hold_run_folder
from sparseffn_jax.train.sharding import path_name
from sparseffn_jax.train.step import (
    TrainState,
    add_adapters,
    init_state,
    make_stage,
    make_update,
    merge_adapters,
)
from sparseffn_jax.train.strategies import SingleDevice, Strategy

Params = dict[str, Any]
Resume = Literal["auto", "never", "must"]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind.

    Attributes:
      params: the model's parameters after the last step, adapters merged; what trained is
        float32. They lie where the strategy has them; of several processes, each has all of
        them in host memory.
      history: the records of ``metrics.jsonl``, from the run's first step on.
      data_hash: SHA-256 chained over the batches read: equal for two runs that saw the same.
    """

    params: Params
    history: list[Record]
    data_hash: str


class Terminated(SystemExit):
    """A run was told to end (SIGTERM), saved and stopped; the process's status is 143.

    Clusters send SIGTERM before they take a machine away. 143 is what a shell reports for a
    process that SIGTERM has ended: schedulers take it for a preemption, not for a failure.
    """

    def __init__(self, message: str):
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


def train(
    model: nn.Module,
    params: Params,
    windows: TokenWindows,
    config: TrainConfig,
    out_dir: str | Path,
    *,
    teacher: tuple[nn.Module, Params] | None = None,
    strategy: Strategy | None = None,
    resume: Resume = "auto",
    on_step: Callable[[int, Record], None] | None = None,
) -> TrainResult:
    """Fine-tunes ``params`` on ``windows.train``.

    A stopped run goes on from its newest checkpoint and ends, on the same machine, with the same
    bits as one that was never stopped. Ctrl-C finishes the step, saves and raises; pressed again,
    it stops at once. SIGTERM does the same. A checkpoint that cannot be written, because the disk
    is full or refuses, costs a warning and not the run.

    Several processes (see :mod:`sparseffn_jax.train.processes`) call it alike, with one ``out_dir``
    that all of them reach. While it runs it holds ``out_dir`` (see
    :mod:`sparseffn_jax.train.run_lock`): a second run there is refused before it changes anything.

    Args:
      model: a decoder, ``apply({"params": p}, input_ids, deterministic=..., rngs=...)`` giving
        logits; its ``dtype`` is the precision of the computation, the weights are float32. In
        float16 the loss is scaled (see :mod:`sparseffn_jax.train.loss_scale`).
      params: where to start; not changed. A resumed run takes its own from the checkpoint.
      windows: training and validation text.
      config: the settings; a resumed run must have those it started with.
      out_dir: gets ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/`` and ``run.lock``.
      teacher: model and parameters to distil from; needs a weight in ``config``.
      strategy: how devices share the work; ``None`` takes one device. A run may go on with
        another strategy, or another number of devices, than it was started with.
      resume: ``"auto"`` goes on where there is a whole checkpoint; ``"must"`` raises where there
        is none, ``"never"`` where there is one.
      on_step: called after every step with its number, from 1, and its metrics.

    Raises:
      ValueError: if the settings, the text, the teacher or the checkpoint do not fit together.
      FileNotFoundError, FileExistsError: see ``resume``.
      RunFolderError: if another run is writing to ``out_dir``; the message names its process.
      DivergenceError: if the guard gives up.
      KeyboardInterrupt: after Ctrl-C; its message says where the run can be resumed.
      Terminated: the same after SIGTERM.
    """
    strategy = strategy or SingleDevice()
    strategy.check(config)
    _check_teacher(config, teacher)
    for split in (windows.train, windows.validation):
        check_token_ids(model, params, split)
    out_dir = Path(out_dir)
    with contextlib.ExitStack() as stack:
        # Before the store is opened, which removes what looks like an earlier run's remains.
        stack.enter_context(hold_run_folder(out_dir))
        store = stack.enter_context(CheckpointStore(out_dir, config.keep_checkpoints))
        run = _Run(model, params, windows, config, store, teacher, strategy, resume)
        log = stack.enter_context(
            MetricsLog(out_dir, run.position.step, config.steps, writes=processes.is_first())
        )
        run.start(log)
        signals = stack.enter_context(_deferred_signals())
        stopped_by = 0
        while run.position.step < config.steps and not stopped_by:
            metrics = run.advance(log)
            if on_step is not None:
                on_step(run.position.step, metrics)
            # A signal may reach one process only; they must all stop after the same step.
            stopped_by = processes.agree_on_largest(max(signals, default=0))
        run.save(log)
    if run.position.step < config.steps:
        kept = store.sealed_step()
        where = "no checkpoint could be written"
        if kept is not None:
            where = (
                f"the checkpoint is in {store.path / str(kept)}, and the same call goes on from it"
            )
        message = f"stopped after step {run.position.step} of {config.steps}; {where}"
        raise Terminated(message) if stopped_by == signal.SIGTERM else KeyboardInterrupt(message)
    params = processes.to_every_process(run.model_params())
    return TrainResult(params, log.history, run.position.data_hash)


class _Run:
    """A run's changing parts, and how one step changes them."""

    def __init__(self, model, params, windows, config, store, teacher, strategy, resume):
        self._model, self._config, self._store = model, config, store
        self._strategy = strategy
        self._teacher_model, teacher_params = teacher or (None, None)
        self._teacher_params = strategy.place(teacher_params)
        self._evaluate = make_evaluator(model, strategy.place_evaluation)
        self._windows = windows
        # Of row numbers: which windows a batch has is known everywhere, and read where needed.
        rows = np.arange(len(windows.train))
        self._batches = make_batches(rows, config.batch_size, config.seed)
        self._batch_shape = (config.batch_size, windows.train.shape[1])
        # What a resumed run must have in common with its beginning, or its steps would differ.
        self._settings = dataclasses.asdict(config) | {
            "training_text": hashlib.sha256(windows.train.tobytes()).hexdigest()
        }
        self._tokens, self._seconds = 0, 0.0
        self._saved_step = 0
        params = add_adapters(config, params)
        latest = store.latest_step()
        if resume == "never" and latest is not None:
            raise FileExistsError(
                f"{store.path} already holds the checkpoints of a run, up to step {latest}: resume "
                "it, or give another folder"
            )
        if resume == "must" and latest is None:
            raise FileNotFoundError(f"there is no checkpoint to resume from in {store.path}")
        if latest is not None:
            self._saved_step = latest
            self._restore(latest, params)
        else:
            self.position = Position(
                step=0,
                stage=0,
                updates=0,
                data=self._batches.get_state(),
                data_hash=hashlib.sha256().hexdigest(),
                guard=guard.GuardState(),
            )
            self._start_stage(params)

    def model_params(self) -> Params:
        return merge_adapters(combine(self._state.trainable, self._frozen))

    def start(self, log: MetricsLog) -> None:
        """Says what a user should know before the first step."""
        self._log_warnings(log)
        if report := self._strategy.report(combine(self._state.trainable, self._frozen)):
            log.say(report)

    def advance(self, log: MetricsLog) -> Record:
        """Reads one batch, updates, lets the guard judge it, and logs; returns the metrics."""
        config, position = self._config, self.position
        if position.step == self._stage.end:
            self.position = position = dataclasses.replace(
                position, stage=position.stage + 1, updates=0
            )
            self._start_stage(combine(self._state.trainable, self._frozen))
        # Taken before the step and kept if its loss is good: so a snapshot has been seen to work.
        candidate = self._take_snapshot() if self._is_snapshot_due() else None
        started = time.perf_counter()
        rows = next(self._batches)
        batch = self._strategy.place_batch(self._windows.train, rows)
        self._state, metrics = self._step(
            self._state,
            self._frozen,
            self._teacher_params,
            batch,
            np.int32(position.step),
            np.int32(position.updates),
            np.float32(position.guard.rate_factor),
        )
        metrics = {name: float(value) for name, value in metrics.items()}
        self._seconds += time.perf_counter() - started
        self._tokens += len(rows) * (self._windows.train.shape[1] - 1)

        guard_state, verdict = guard.observe(config.guard, position.guard, metrics)
        self.position = Position(
            step=position.step + 1,
            stage=position.stage,
            updates=position.updates + (not metrics.get("overflow")),
            data=self._batches.get_state(),
            data_hash=processes.chain_batch(position.data_hash, self._windows.train, rows),
            guard=guard_state,
        )
        if verdict in (guard.Verdict.DIVERGED, guard.Verdict.FFN_DIVERGED):
            reason = guard.describe(config.guard, position.guard, verdict, metrics)
            self._go_back(log, reason, verdict is guard.Verdict.FFN_DIVERGED)
            return metrics
        if verdict is guard.Verdict.GOOD and candidate is not None:
            self._good = candidate
            if candidate.position.step % config.save_every == 0:
                self._save(candidate)
        self._log_warnings(log)
        if metrics.get("overflow"):
            log.event(
                {"step": self.position.step, "event": "overflow", "scale": metrics["loss_scale"]},
                f"step {self.position.step}: the gradient overflowed float16 with the loss times "
                f"{metrics['loss_scale']:g}; going on with half of that",
            )
            return metrics
        self._log(log, metrics)
        return metrics

    def save(self, log: MetricsLog) -> None:
        """Writes a checkpoint of the run as it stands, complete enough to go on exactly."""
        is_over = self.position.step == self._config.steps
        snapshot = self._take_snapshot()
        self._save(snapshot, None if is_over or snapshot is self._good else self._good)
        self._store.wait()
        self._log_warnings(log)

    def _start_stage(self, params: Params) -> None:
        self._stage = make_stage(self._config, params, self.position.stage, self._model.dtype)
        self._state, self._frozen = self._strategy.init_state(self._stage, params)
        self._good = Snapshot(self.position, self._strategy.to_host(self._state))
        self._compile()

    def _restore(self, step: int, params: Params) -> None:
        self.position, last_good, settings = self._store.read(step)
        changed = [name for name in self._settings if settings.get(name) != self._settings[name]]
        if changed:
            raise ValueError(
                f"the run in {self._store.path} was started with other settings "
                f"({', '.join(changed)}) and cannot go on with these: give another folder, or "
                "what it was started with"
            )
        strategy = self._strategy
        params = self._store.restore_params(step, params, strategy.abstract)
        self._stage = make_stage(self._config, params, self.position.stage, self._model.dtype)
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
        self._compile()

    def _compile(self) -> None:
        # Ahead of time, so that neither the clock nor the time left counts it.
        update = make_update(
            self._model,
            self._stage,
            self._config,
            self._teacher_model,
            gather=self._strategy.gather,
        )
        self._step = self._strategy.compile(
            update, self._state, self._frozen, self._teacher_params, self._batch_shape
        )

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
            self._store.save(snapshot, self._frozen, self._settings, last_good)

    def _go_back(self, log: MetricsLog, reason: str, ffn_alone: bool) -> None:
        limits, step = self._config.guard, self.position.step
        state = guard.after_restore(limits, self.position.guard)
        if state.restores > limits.max_restores:
            self._store.wait()
            latest = self._store.sealed_step()
            checkpoint = (
                "no checkpoint had been written yet"
                if latest is None
                else f"the last good checkpoint is {self._store.path / str(latest)}"
            )
            raise guard.DivergenceError(
                f"step {step}: {reason}; training diverged again after {limits.max_restores} "
                f"restores, each with a lower rate; {checkpoint}. Try a lower learning_rate or a "
                "longer warm-up"
            )
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

    def _log_warnings(self, log: MetricsLog) -> None:
        for warning in self._store.take_warnings():
            log.event(
                {"step": self.position.step, "event": "checkpoint", "reason": warning}, warning
            )

    def _log(self, log: MetricsLog, metrics: Record) -> None:
        config, step = self._config, self.position.step
        tokens_per_second = self._tokens / self._seconds
        log.advance(step, metrics["loss"], tokens_per_second)
        is_last = step == config.steps
        evaluates = config.eval_every and (is_last or step % config.eval_every == 0)
        if not (evaluates or is_last or step % config.log_every == 0):
            return
        metrics["tokens_per_second"] = tokens_per_second
        self._tokens, self._seconds = 0, 0.0
        if evaluates:
            microbatch = config.batch_size // config.accumulate_steps
            metrics["validation_loss"] = self._evaluate(
                self.model_params(), self._windows.validation, microbatch
            )
        log.record({"step": step} | metrics)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Yields a list that gets the first SIGINT or SIGTERM; the next one acts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Only the main thread may handle signals.
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, _) -> None:
        received.append(number)
        restore()

    for number in usual:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def _check_teacher(config: TrainConfig, teacher: Any) -> None:
    wants_teacher = config.distill_weight > 0 or config.hidden_weight > 0
    if wants_teacher and teacher is None:
        raise ValueError("distill_weight and hidden_weight need a teacher to distil from")
    if teacher is not None and not wants_teacher:
        raise ValueError("a teacher is given, but distill_weight and hidden_weight are both 0")


def _with_ffn_of(state: TrainState, good: TrainState) -> TrainState:
    """Returns ``state`` with the feed-forward layers of ``good``, and their optimizer's slots."""
    return jax.tree_util.tree_map_with_path(
        lambda path, now, then: then if is_ffn(tuple(path_name(path).split("/"))) else now,
        state,
        good,
    )
