"""What long work shows while it runs: on a terminal something that moves, elsewhere lines."""

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

# Where there is no terminal, a counter writes a line no more often than this, in seconds.
_PAUSE = 5.0


def messages() -> Console:
    """Returns the console that progress is shown on: standard error, so that results stay pure."""
    return Console(stderr=True, soft_wrap=True, markup=False, highlight=False)


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
    is_terminal = console.is_terminal
    last = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not is_terminal) as progress:
        task = progress.add_task(what, total=None)
        if not is_terminal:
            console.print(what)

        def count(done: int, total: int) -> None:
            nonlocal last
            progress.update(task, completed=done, total=total)
            if not is_terminal and time.perf_counter() - last > _PAUSE:
                console.print(f"{what} {done}/{total}")
                last = time.perf_counter()

        yield count
