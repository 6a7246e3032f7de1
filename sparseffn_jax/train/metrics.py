"""A run's log: metrics.jsonl, TensorBoard events, and progress on the terminal."""

import datetime
import json
import time
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

Record = dict[str, Any]


class MetricsLog:
    """Writes records, one JSON object a line, and shows how the run gets on.

    Args:
      out_dir: the run's folder, which gets ``metrics.jsonl`` and ``tensorboard/``.
      first_step: where the run goes on; records of later steps, which a stopped run wrote after
        its last checkpoint, are dropped.
      steps: where the run will end.
    """

    def __init__(self, out_dir: Path, first_step: int, steps: int):
        path = out_dir / "metrics.jsonl"
        self.history = _read_records(path, first_step)
        self._file = path.open("w", encoding="utf-8", buffering=1)
        for record in self.history:
            self._write(record)
        self._events = SummaryWriter(str(out_dir / "tensorboard"), purge_step=first_step + 1)
        self._console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=first_step, status="")
        self._first_step, self._steps = first_step, steps
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()
        self._events.close()
        self._file.close()

    def advance(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Moves the progress bar."""
        status = f"loss {loss:.4f}  {tokens_per_second:.0f} tokens/s"
        self._progress.update(self._task, completed=step, status=status)

    def record(self, record: Record) -> None:
        """Writes one step's numbers; away from a terminal, also a line of text."""
        self.history.append(record)
        self._write(record)
        for name, value in record.items():
            if name != "step":
                self._events.add_scalar(name, value, record["step"])
        if not self._console.is_terminal:
            self._console.print(self._line(record))

    def event(self, record: Record, text: str) -> None:
        """Writes something that happened, with an ``"event"`` key, and says it."""
        self.history.append(record)
        self._write(record)
        self._events.add_text(record["event"], text, record["step"])
        self._console.print(text, style="yellow")

    def _write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")

    def _line(self, record: Record) -> str:
        step = record["step"]
        pace = (time.perf_counter() - self._started) / (step - self._first_step)
        left = datetime.timedelta(seconds=round(pace * (self._steps - step)))
        line = f"step {step}/{self._steps}  loss {record['loss']:.4f}"
        if "validation_loss" in record:
            line += f"  validation {record['validation_loss']:.4f}"
        return f"{line}  {record['tokens_per_second']:.0f} tokens/s  {left} left"


def _read_records(path: Path, last_step: int) -> list[Record]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # The line that a crash cut short is the last one.
        if record["step"] <= last_step:
            records.append(record)
    return records
