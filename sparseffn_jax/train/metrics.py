"""A run's log: metrics.jsonl, what else it is reported to, and progress on the terminal."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from sparseffn_jax.checkpoints.errors import one_line
from sparseffn_jax.progress import duration, heartbeat, messages
from sparseffn_jax.train.reporters import Record, Reporter


class MetricsLog:
    """Writes records, one JSON object a line, and shows how the run gets on.

    A full disk is reported once and does not stop the run: its history is complete in memory, and
    it is complete in the file again once there is room. A reporter that fails otherwise gets no
    more records.

    Args:
      out_dir: the run's folder, which gets ``metrics.jsonl``.
      first_step: the number of steps that the run has behind it when it starts or goes on. Records
        of later steps, which a stopped run wrote after its last checkpoint, are dropped.
      steps: the number of the run's last step.
      reporters: what else gets the records.
      writes: whether to write and show anything; in a run of several processes, one should.
    """

    def __init__(
        self,
        out_dir: Path,
        first_step: int,
        steps: int,
        *,
        reporters: Sequence[Reporter] = (),
        writes: bool = True,
    ):
        self._path, self._writes = out_dir / "metrics.jsonl", writes
        self.history = _read_records(self._path, first_step)
        self._unwritten: list[Record] = []
        self._size: int | None = None
        self._console = messages()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (writes and self._console.is_terminal),
        )
        self._task = self._progress.add_task("", total=steps, completed=first_step, status="")
        self._first_step, self._steps = first_step, steps
        self._step, self._status = first_step, ""
        self._work: tuple[str, float] | None = None
        self._beats, self._said = contextlib.ExitStack(), lambda: None
        self._started = time.perf_counter()
        self._warned = False
        self._reporters = list(reporters)
        self._attempt(self._start_file)
        self._report("start", first_step)

    def __enter__(self) -> Self:
        self._progress.start()
        if self._writes and not self._console.is_terminal:
            self._said = self._beats.enter_context(heartbeat(self._console, self._standing))
            if self._step < self._steps:
                self._console.print(self._standing())
        return self

    def __exit__(self, *_):
        self._progress.stop()
        self._beats.close()

    def advance(self, step: int, metrics: Record, tokens_per_second: float) -> None:
        """Moves the progress bar to a step, and shows its losses in nats a token and the pace."""
        self._step = step
        self._status = f"{_losses(metrics)}  {tokens_per_second:.0f} tokens/s"
        self._progress.update(self._task, completed=step, status=self._status)

    def record(self, record: Record) -> None:
        """Writes one step's numbers; where there is no terminal, also prints them as a line."""
        self._write(record)
        self._report("record", record)
        if self._writes and not self._console.is_terminal:
            self._console.print(self._line(record))
            self._said()

    def event(self, record: Record, message: str) -> None:
        """Writes a record of something that happened, named by its ``"event"``, and shows it."""
        self._write(record)
        self._report("event", record, message)
        self.say(message)

    def say(self, message: str) -> None:
        """Shows a message without writing it."""
        if self._writes:
            self._console.print(message, style="yellow")

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[Callable[[str], None]]:
        """Shows work that is no step, such as an evaluation, while it lasts.

        Args:
          what: the work.

        Yields:
          The function to call with what is being done from then on.
        """

        def note(what: str) -> None:
            self._work = what, time.perf_counter()
            self._progress.update(self._task, status=what)

        note(what)
        if self._writes and not self._console.is_terminal:
            self._console.print(self._standing())
            self._said()
        try:
            yield note
        finally:
            self._work = None
            self._progress.update(self._task, status=self._status)

    def _start_file(self) -> None:
        # Beside the old file and then in its place: a crash between the two must not take the
        # history away.
        partial = self._path.with_suffix(".partial")
        lines = "".join(map(_json_line, self.history)).encode()
        partial.write_bytes(lines)
        os.replace(partial, self._path)
        self._size = len(lines)
        self._unwritten.clear()

    def _write(self, record: Record) -> None:
        self.history.append(record)
        self._unwritten.append(record)
        self._attempt(self._append)

    def _append(self) -> None:
        if self._size is None:
            # The disk was full when the run started.
            self._start_file()
            return
        lines = "".join(map(_json_line, self._unwritten)).encode()
        with self._path.open("r+b") as file:
            # What a full disk has cut short goes, and comes again whole.
            file.truncate(self._size)
            file.seek(self._size)
            file.write(lines)
        self._size += len(lines)
        self._unwritten.clear()

    def _attempt(self, write: Callable[..., Any], *arguments: Any) -> None:
        if not self._writes:
            return
        try:
            write(*arguments)
        except OSError as error:
            if not self._warned:
                self._warned = True
                self.say(f"cannot write the log to {self._path.parent}: {error.strerror}")

    def _report(self, call: str, *arguments: Any) -> None:
        for reporter in tuple(self._reporters):
            try:
                self._attempt(getattr(reporter, call), *arguments)
            # Others' code, with exceptions of its own; none of them is worth a run.
            except Exception as error:
                self._reporters.remove(reporter)
                name = type(reporter).__name__
                self.say(f"nothing more is reported to {name}, which failed: {one_line(error)}")

    def _line(self, record: Record) -> str:
        parts = [f"step {record['step']}/{self._steps}"]
        # A step that was not kept may have a validation loss, and no more.
        if "loss" in record:
            parts.append(_losses(record))
        if "validation_loss" in record:
            # Of cross-entropy alone, whatever the loss is made of.
            name = "validation cross-entropy" if "cross_entropy" in record else "validation"
            parts.append(f"{name} {record['validation_loss']:.4f}")
        if "tokens_per_second" in record:
            parts.append(f"{record['tokens_per_second']:.0f} tokens/s")
        return "  ".join([*parts, f"{self._left(record['step'])} left"])

    def _standing(self) -> str:
        """Returns a line of what is known between two records."""
        if self._work is not None:
            what, since = self._work
            gone = duration(time.perf_counter() - since)
            return f"step {self._step}/{self._steps}  {what}, {gone}"
        if self._step == self._first_step:
            gone = duration(time.perf_counter() - self._started)
            return f"step {self._step + 1}/{self._steps}, {gone}"
        return f"step {self._step}/{self._steps}  {self._status}  {self._left(self._step)} left"

    def _left(self, step: int) -> str:
        pace = (time.perf_counter() - self._started) / (step - self._first_step)
        return duration(pace * (self._steps - step))


def _losses(record: Record) -> str:
    if "cross_entropy" not in record:
        return f"loss {record['loss']:.4f}"
    return f"mixed loss {record['loss']:.4f}  cross-entropy {record['cross_entropy']:.4f}"


def _read_records(path: Path, last_step: int) -> list[Record]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # A crash or a full disk cut it short.
        if record["step"] <= last_step:
            records.append(record)
    return records


def _json_line(record: Record) -> str:
    return json.dumps(record) + "\n"
