"""Where a run's numbers go beside ``metrics.jsonl``: TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar, text

from sparseffn_jax.checkpoints.errors import one_line
from sparseffn_jax.progress import say, stage
from sparseffn_jax.train.choices import ReporterName

Record = dict[str, Any]
_FLUSH_SECONDS = 30.0


class Reporter(Protocol):
    """Takes a run's records as they come."""

    def start(self, first_step: int) -> None:
        """Called before the first record, with the number of steps that the run has behind it."""
        ...

    def record(self, record: Record) -> None:
        """Takes one step's numbers; strings among them say what they are."""
        ...

    def event(self, record: Record, message: str) -> None:
        """Takes a record of something that happened, and how it is told to the user."""
        ...

    def close(self) -> None:
        """Called once, at the end."""
        ...


def check_installed(names: Sequence[ReporterName]) -> None:
    """Checks, before a run begins, that what it reports to is installed.

    Raises:
      ImportError: if it is not; the message names the extra to install.
    """
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ImportError(
            "report_to names wandb, which is not installed: pip install 'sparseffn_jax[wandb]'"
        )


@contextlib.contextmanager
def open_reporters(
    names: Sequence[ReporterName], out_dir: Path, settings: Record
) -> Iterator[list[Reporter]]:
    """Yields the reporters of a run, and closes them at the end.

    Args:
      names: the reporters.
      out_dir: the run's folder.
      settings: the run's settings, which are shown beside its numbers.

    Raises:
      ImportError: if a reporter is not installed.
      ValueError: if Weights & Biases refuses the run, for one because nobody has logged in.
    """
    with contextlib.ExitStack() as stack:
        reporters: list[Reporter] = []
        for name in names:
            reporter = TensorBoard(out_dir) if name == "tensorboard" else Wandb(out_dir, settings)
            stack.callback(_close, reporter)
            reporters.append(reporter)
        yield reporters


def _close(reporter: Reporter) -> None:
    try:
        reporter.close()
    # A full disk, or what others' code raises, does not take away the result of a run.
    except Exception as error:
        say(f"the report to {type(reporter).__name__} may lack its end: {one_line(error)}")


class TensorBoard:
    """Writes TensorBoard's event files, into ``tensorboard/`` in the run's folder."""

    def __init__(self, out_dir: Path):
        self._folder = out_dir / "tensorboard"
        self._events: EventsWriter | None = None
        self._flushed = time.perf_counter()

    def start(self, first_step: int) -> None:
        self._folder.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies of a full disk, and then its queue blocks the run.
        self._events = EventsWriter(str(self._folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=first_step + 1, session_log=start))

    def record(self, record: Record) -> None:
        numbers = {name: x for name, x in record.items() if not isinstance(x, str)}
        step = numbers.pop("step")
        self._add(step, [scalar(name, x) for name, x in numbers.items()])

    def event(self, record: Record, message: str) -> None:
        self._add(record["step"], [text(record["event"], message)])

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _add(self, step: int, summaries: list[Any]) -> None:
        if self._events is None:
            return  # The disk was full when it started.
        for summary in summaries:
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.perf_counter() - self._flushed > _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.perf_counter()


class Wandb:
    """Sends records to Weights & Biases; a resumed run goes on in the same run there.

    Project, entity and mode are those of ``WANDB_PROJECT``, ``WANDB_ENTITY`` and ``WANDB_MODE``.
    """

    def __init__(self, out_dir: Path, settings: Record):
        check_installed(["wandb"])
        import wandb  # pyright: ignore[reportMissingImports]

        file = out_dir / "wandb_id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        try:
            with stage("starting wandb"):
                self._run = wandb.init(
                    id=file.read_text(encoding="utf-8"),
                    name=out_dir.resolve().name,
                    dir=str(out_dir),
                    config=settings,
                    # The settings that may change when a run goes on.
                    allow_val_change=True,
                    resume="allow",
                )
        except wandb.Error as error:
            raise ValueError(
                f"wandb did not start ({error}): call wandb login, set WANDB_MODE=offline, or "
                "leave wandb out of report_to"
            ) from error
        # wandb's own step only rises, but a resumed run repeats those behind its last checkpoint.
        self._run.define_metric("*", step_metric="step")

    def start(self, first_step: int) -> None:
        del first_step

    def record(self, record: Record) -> None:
        self._run.log(record)

    def event(self, record: Record, message: str) -> None:
        self._run.log({"step": record["step"], record["event"]: message})

    def close(self) -> None:
        with stage("finishing the report to wandb"):
            self._run.finish()
