"""The fine-tuning loop: batches in, updates, guard, log, checkpoints; resumable bit for bit."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import flax.linen as nn
import numpy as np
from jaxtyping import Int

from sparseffn_jax.evaluate.losses import check_token_ids
from sparseffn_jax.evaluate.windows import check_window, cut_windows
from sparseffn_jax.measure.records import write_json
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.nn.lora import LoraAdapter
from sparseffn_jax.progress import stage
from sparseffn_jax.train import processes
from sparseffn_jax.train.checkpoints import CheckpointStore
from sparseffn_jax.train.choices import Resume, parse_reporters
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import TokenWindows
from sparseffn_jax.train.metrics import MetricsLog, Record
from sparseffn_jax.train.reporters import check_installed, open_reporters
from sparseffn_jax.train.run import Run
from sparseffn_jax.train.run_lock import hold_run_folder
from sparseffn_jax.train.strategies import SingleDevice, Strategy, StrategyName, make_strategy

Params = dict[str, Any]
# Of an array that stands for windows, the share that is for validation.
_HELD_OUT = 0.05


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind.

    Attributes:
      params: the model's parameters after the last step, with the adapters merged; those that
        trained are float32. They lie where the strategy has them; in a run of several processes,
        each has all of them in host memory.
      history: the records of ``metrics.jsonl``, from the run's first step on.
      data_hash: the SHA-256 chained over the batches read, in hexadecimal; it is equal for two
        runs that read the same batches.
      adapter: of the lora recipe, what trained, apart from the model: the adapters, and the leaves
        of feed-forward layers that trained in full. ``None`` in other recipes.

    Example:
      >>> import tempfile
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import sparseffn_jax as sf
      >>> from transformers import GPT2Config
      >>> config = GPT2Config(
      ...     vocab_size=97, n_positions=16, n_embd=32, n_layer=1, n_head=2,
      ...     bos_token_id=0, eos_token_id=0,
      ... )
      >>> model = sf.GPT2LMHeadModel(config)
      >>> ids = jnp.zeros((2, 8), int)
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> tokens = np.random.default_rng(0).integers(97, size=(10, 17), dtype=np.int32)
      >>> windows = sf.TokenWindows(train=tokens[2:], validation=tokens[:2])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     result = sf.train(model, params, windows, sf.TrainConfig(1, batch_size=4), folder)
      >>> result.history[-1]["step"], len(result.data_hash)
      (1, 64)
      >>> model.apply({"params": result.params}, ids).shape
      (2, 8, 97)
    """

    params: Params
    history: list[Record]
    data_hash: str
    adapter: LoraAdapter | None = None


class Terminated(SystemExit):
    """A run was told to end (SIGTERM), saved and stopped; the process's status is 143.

    Clusters send SIGTERM before they take a machine away. 143 is what a shell reports for a
    process that SIGTERM has ended: schedulers take it for a preemption, not for a failure.

    Example:
      >>> import sparseffn_jax as sf
      >>> error = sf.Terminated("stopped after step 3 of 10")
      >>> isinstance(error, SystemExit), error.code
      (True, 143)
    """

    def __init__(self, message: str):
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


def train(
    model: nn.Module,
    params: Params,
    windows: TokenWindows | Int[np.ndarray, "..."],
    config: TrainConfig,
    out_dir: str | Path,
    *,
    teacher: tuple[nn.Module, Params] | None = None,
    strategy: Strategy | StrategyName | None = None,
    resume: Resume = "auto",
    remat: bool | None = None,
    on_step: Callable[[int, Record], None] | None = None,
) -> TrainResult:
    """Fine-tunes ``params`` on ``windows.train``.

    A stopped run goes on from its newest checkpoint and ends, on the same machine, with the same
    bits as one that was never stopped. A checkpoint that cannot be written costs a warning and not
    the run. Of several processes (see :mod:`.processes`) all call it alike, with one ``out_dir``.

    Args:
      model: a decoder, ``apply({"params": p}, input_ids, deterministic=..., rngs=...)`` giving
        logits; its ``dtype`` is the precision of the computation, the weights are float32. In
        float16 the loss is scaled (see :mod:`.loss_scale`).
      params: where to start; not changed. A resumed run takes its own from the checkpoint, and must
        be given those that it started from.
      windows: training and validation text. Of an array of token ids the last twentieth is for
        validation: an array (n, window + 1) holds windows, as :class:`TokenWindows` has them, and
        an array (n,) one text, which is cut into windows of the default length, the smaller of
        n_positions and 1024.
      config: the settings. A resumed run must have those it started with, but what is logged, where
        to and how often, and how often it evaluates and saves may change, and ``steps`` may grow:
        the learning rates of the remaining steps are then those of the longer run.
      out_dir: gets ``checkpoints/``, ``metrics.jsonl``, ``run.lock``, what ``report_to`` writes
        and, if the windows know it, how much text there is in ``text.json``.
      teacher: model and parameters to distil from; needs a weight in ``config``.
      strategy: how devices share the work, as :func:`make_strategy` returns it, or its name;
        ``None`` takes one device. A resumed run may have another strategy, or another number of
        devices.
      resume: ``"auto"`` goes on where there is a whole checkpoint; ``"must"`` raises where there
        is none, ``"never"`` where there is one.
      remat: whether the backward pass computes each block again, which takes a third more time and
        far less memory. ``None`` leaves it as ``model`` has it, but where a step would need more
        memory than there is, it does so, and says it.
      on_step: called after every step with its number, from 1, and its metrics.

    Raises:
      ValueError: if the settings, the text, the teacher or the checkpoint do not fit together.
      FileNotFoundError, FileExistsError: if the checkpoints are not as ``resume`` wants them.
      RunFolderError: if another run is writing to ``out_dir``; the message names its process.
      MemoryError: if a step needs more memory than there is; the message says what lowers it.
      ImportError: if ``report_to`` names what is not installed.
      DivergenceError: if the guard gives up.
      KeyboardInterrupt, Terminated: after Ctrl-C and SIGTERM, which let the step end and save the
        run; a second one stops it at once.

    Example:
      >>> import tempfile
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import sparseffn_jax as sf
      >>> from transformers import GPT2Config
      >>> config = GPT2Config(
      ...     vocab_size=97, n_positions=16, n_embd=32, n_layer=1, n_head=2,
      ...     bos_token_id=0, eos_token_id=0,
      ... )
      >>> model = sf.GPT2LMHeadModel(config)
      >>> ids = jnp.zeros((2, 8), int)
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> tokens = np.random.default_rng(0).integers(97, size=(10, 17), dtype=np.int32)
      >>> windows = sf.TokenWindows(train=tokens[2:], validation=tokens[:2])
      >>> settings = sf.TrainConfig(steps=2, batch_size=4, recipe="full", log_every=1)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     result = sf.train(model, params, windows, settings, folder)
      >>> [record["step"] for record in result.history]
      [1, 2]
      >>> round(result.history[-1]["loss"], 1)
      4.6
    """
    if resume not in get_args(Resume):
        expected = ", ".join(get_args(Resume))
        raise ValueError(f"unknown resume={resume!r}: expected one of {expected}")
    if isinstance(strategy, str):
        strategy = make_strategy(strategy)
    strategy = strategy or SingleDevice()
    strategy.check(config)
    windows = _as_windows(windows, model)
    reporters = parse_reporters(config.report_to)
    check_installed(reporters)
    _check_teacher(config, model, teacher)
    out_dir, writes = Path(out_dir), processes.is_first()
    with stage("checking the text") if writes else contextlib.nullcontext():
        check_token_ids(model, params, windows.train)
        check_token_ids(model, params, windows.validation)
    # The folder is held first: the store removes what looks like an earlier run's remains.
    with (
        hold_run_folder(out_dir),
        CheckpointStore(out_dir, config.keep_checkpoints) as store,
        open_reporters(reporters if writes else (), out_dir, dataclasses.asdict(config)) as opened,
    ):
        run = Run(model, params, windows, config, store, teacher, strategy, resume, remat)
        first_step = run.position.step
        if writes and windows.counts is not None and first_step == 0:
            write_json(out_dir / "text.json", dataclasses.asdict(windows.counts))
        with MetricsLog(out_dir, first_step, config.steps, reporters=opened, writes=writes) as log:
            stopped_by = _run_and_save(run, log, config.steps, on_step)
    if run.position.step < config.steps:
        raise _stopped(stopped_by, run.position.step, config.steps, store)
    params = processes.to_every_process(run.model_params())
    return TrainResult(params, log.history, run.position.data_hash, run.adapter())


def _run_and_save(
    run: Run, log: MetricsLog, steps: int, on_step: Callable[[int, Record], None] | None
) -> int:
    """Runs to the last step or the first signal, and saves; returns the signal's number, or 0."""
    run.start(log)
    stopped_by = 0
    with _deferred_signals() as signals:
        while run.position.step < steps and not stopped_by:
            metrics = run.advance(log)
            if on_step is not None:
                on_step(run.position.step, metrics)
            # A signal may reach one process only; they must all stop after the same step.
            stopped_by = processes.agree_on_largest(max(signals, default=0))
        run.save(log)
    return stopped_by


def _stopped(stopped_by: int, step: int, steps: int, store: CheckpointStore) -> BaseException:
    """Returns the exception that says where a run was stopped and how it goes on."""
    kept = store.sealed_step()
    where = "no checkpoint could be written"
    if kept is not None:
        where = f"the checkpoint is in {store.path / str(kept)}, and the same call goes on from it"
    message = f"stopped after step {step} of {steps}; {where}"
    return Terminated(message) if stopped_by == signal.SIGTERM else KeyboardInterrupt(message)


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


def _as_windows(windows: Any, model: nn.Module) -> TokenWindows:
    """Returns windows as they are; cuts an array of token ids and splits it."""
    if isinstance(windows, TokenWindows):
        return windows
    ids = np.asarray(windows)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise ValueError(
            f"windows is {ids.dtype.name} of shape {ids.shape}: expected TokenWindows, as "
            "load_windows returns them, or token ids (n, window + 1) or (n,)"
        )
    if ids.ndim == 1:
        if not isinstance(model, Decoder):
            raise ValueError(
                "windows is one row of token ids, and the model does not say how long windows may "
                "be: cut it into rows (n, window + 1)"
            )
        window = check_window(None, model.spec.n_positions)
        ids = cut_windows(ids, window)
        if len(ids) < 2:
            raise ValueError(
                f"{np.size(windows)} token ids are too few for two windows of {window + 1}, one to "
                "train on and one for validation: give more text, or rows (n, window + 1)"
            )
    held_out = max(1, round(_HELD_OUT * len(ids)))
    ids = ids.astype(np.int32)
    return TokenWindows(train=ids[:-held_out], validation=ids[-held_out:])


def _check_teacher(config: TrainConfig, model: Any, teacher: Any) -> None:
    wants_teacher = config.distill_weight > 0 or config.hidden_weight > 0
    if wants_teacher and teacher is None:
        raise ValueError("distill_weight and hidden_weight need a teacher to distil from")
    if teacher is not None and not wants_teacher:
        raise ValueError("a teacher is given, but distill_weight and hidden_weight are both 0")
    # Hidden states alone may come from a model with another vocabulary.
    if teacher is not None and config.distill_weight > 0:
        theirs, ours = (
            getattr(getattr(each, "config", None), "vocab_size", None)
            for each in (teacher[0], model)
        )
        if None not in (theirs, ours) and theirs != ours:
            raise ValueError(
                f"the teacher has a vocabulary of {theirs} tokens, the model one of {ours}: "
                "distillation needs models of one vocabulary"
            )
