"""What long work shows while it runs: on a terminal something that moves, elsewhere lines."""

import datetime
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Where there is no terminal, work is never silent for longer than this, in seconds.
_PAUSE = 3.0


def messages() -> Console:
    """Returns the console that progress is shown on: standard error, so that results stay pure."""
    return Console(stderr=True, soft_wrap=True, markup=False, highlight=False)


def say(what: str) -> None:
    """Shows a message that the user should notice."""
    messages().print(what, style="yellow")


@contextmanager
def stage(what: str, console: Console | None = None) -> Iterator[None]:
    """Shows what is being done, for work whose end cannot be foreseen.

    Args:
      what: the work, such as ``"loading the model"``.
      console: where to show it; ``None`` takes :func:`messages`.
    """
    console = console or messages()
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(what)
        started = time.perf_counter()
        with heartbeat(console, lambda: f"{what}, {duration(time.perf_counter() - started)}"):
            yield


@contextmanager
def counter(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Shows how much of some work is done, with the time that is left.

    Args:
      what: the work, such as ``"evaluating"``.
      console: where to show it; ``None`` takes :func:`messages`.

    Yields:
      The function to call with the number of parts that are done and that of all.
    """
    console = console or messages()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    if not console.is_terminal:
        console.print(what)
        first = last = None

        def note(done: int, total: int) -> None:
            nonlocal first, last
            last = time.perf_counter(), done, total
            first = first or last

        with heartbeat(console, lambda: what + _gone_and_left(first, last)):
            yield note
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def heartbeat(console: Console, line: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Prints a line whenever nothing has been said for a few seconds, until the block ends.

    Args:
      console: where to print it.
      line: function that returns the line; it is called in a thread of its own.

    Yields:
      The function to call when something else has been said.
    """
    last, ended = time.perf_counter(), threading.Event()

    def said() -> None:
        nonlocal last
        last = time.perf_counter()

    def beat() -> None:
        while not ended.wait(max(0.0, last + _PAUSE - time.perf_counter())):
            if time.perf_counter() - last >= _PAUSE:
                console.print(line())
                said()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield said
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """Returns a duration in the form 1:02:03."""
    return str(datetime.timedelta(seconds=round(seconds)))


def _gone_and_left(
    first: tuple[float, int, int] | None, last: tuple[float, int, int] | None
) -> str:
    """Returns how much is done and, by the pace since the first count, how long the rest takes."""
    if first is None or last is None:
        return ""
    (started, before, _), (now, done, total) = first, last
    text = f" {done}/{total}"
    if done > before:
        text += f", {duration((now - started) / (done - before) * (total - done))} left"
    return text
