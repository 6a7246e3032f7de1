"""The command line, ``sparseffn``: which commands there are, and what becomes of their errors.

What a command needs to do its work is imported when its arguments are known to be right.
"""

import contextlib
import dataclasses
import difflib
import errno
import importlib
import os
import signal
import sys
import threading
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from sparseffn_jax import __version__
from sparseffn_jax.checkpoints.errors import one_line
from sparseffn_jax.commands.parser import Arguments, UsageError, options, parse, spoken
from sparseffn_jax.progress import heartbeat, messages
from sparseffn_jax.train.guard import DivergenceError


class _Command(NamedTuple):
    """A command.

    Attributes:
      module: the module of its arguments below ``commands.arguments``, and of its work below
        ``commands``.
      name: the name of the class in the latter; the former's has ``Arguments`` behind it.
      summary: what it does.
    """

    module: str
    name: str
    summary: str

    def arguments(self) -> type[Arguments]:
        module = importlib.import_module(f"sparseffn_jax.commands.arguments.{self.module}")
        return getattr(module, f"{self.name}Arguments")

    def work(self) -> Any:
        return getattr(importlib.import_module(f"sparseffn_jax.commands.{self.module}"), self.name)


COMMANDS: Mapping[str, _Command] = {
    "demo": _Command("demo", "Demo", "Make a faster sparse GPT-2 of a dense one, with a report."),
    "plan": _Command("plan", "Plan", "Choose what each layer's FFN becomes, for a budget."),
    "convert": _Command("convert", "Convert", "Replace a dense model's FFNs by sparse ones."),
    "finetune": _Command("finetune", "Finetune", "Fine-tune a dense or sparse model."),
    "evaluate": _Command("evaluate", "Evaluate", "Measure a model's loss on a text."),
    "generate": _Command("generate", "Generate", "Continue a prompt, or many; or chat."),
    "export": _Command("export", "Export", "Write a model for llama.cpp and other programs."),
    "inspect": _Command("inspect", "Inspect", "Show what a model's FFNs are made of and cost."),
    "bench ffn": _Command("bench", "BenchFFN", "Measure one layer beside the dense one."),
    "bench model": _Command("bench", "BenchModel", "Measure a whole model beside the dense one."),
    "bench quality": _Command("bench", "BenchQuality", "Compare losses at equal measured time."),
    "bench all": _Command("bench", "BenchAll", "Measure all of that for a short time."),
}

_HELP = ("-h", "--help", "--help-all")
# What lowers the memory of a program, by the option that a command may have.
_LESS_MEMORY: Mapping[str, str] = {
    "batch_size": "a smaller --batch-size",
    "window": "a shorter --window",
    "accumulate_steps": "more --accumulate-steps",
    "remat": "--remat",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``sparseffn``.

    It exits with 2 after one line about bad input, 130 after Ctrl-C, and 143 when SIGTERM has ended
    a training run, which has saved then.

    Args:
      argv: the arguments; ``None`` takes those of the process, which then also keeps what it
        compiles in the user's cache folder.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cls: type[Arguments] | None = None
    try:
        if words == ["--version"]:
            print(f"sparseffn_jax {__version__}")
            return
        if not words or (words[-1] in _HELP and words[:-1] in ([], ["bench"])):
            print(_overview())
            # Without a command there is nothing to run.
            sys.exit(0 if words else 2)
        name, rest = _split(words)
        command = COMMANDS[name]
        with _ctrl_c_ends_the_process():
            cls = command.arguments()
            arguments = parse(cls, f"sparseffn {name}", rest)
            arguments.check()
            # What a command works with takes seconds to import, on a busy machine many.
            with heartbeat(messages(), lambda: "starting"):
                work = command.work()
        _run(work, arguments, keeps_programs=argv is None)
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "stopped")
        sys.exit(130)
    except SystemExit as stop:
        # A training run that was told to end says what is kept.
        if str(stop) != str(stop.code):
            _say(str(stop))
        raise
    except (ValueError, OSError, ImportError, MemoryError, DivergenceError) as error:
        if os.environ.get("SPARSEFFN_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            where = f" that has {error.filename}" if error.filename else ""
            _say(f"error: the disk{where} is full: free some space and give the same command again")
            sys.exit(2)
        _say(f"error: {error if cls is None else spoken(str(error), cls)}")
        sys.exit(2)


def _run(work: Any, arguments: Arguments, *, keeps_programs: bool) -> None:
    import jax

    from sparseffn_jax.commands.common import keep_compiled_programs
    from sparseffn_jax.ops.plans.choice import using

    if keeps_programs:
        keep_compiled_programs()
    fields = dataclasses.fields(typing.cast(Any, arguments))
    command = work(**{field.name: getattr(arguments, field.name) for field in fields})
    # Inspect shows what a table changes, and writes it first if it is asked to.
    plans = None if work.__name__ == "Inspect" else getattr(arguments, "plans", None)
    try:
        with using(plans):
            command.run(Console())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        names = {option.name for option in options(type(arguments), described=False)}
        remedies = [remedy for name, remedy in _LESS_MEMORY.items() if name in names]
        give = f": give {', or '.join(remedies)}" if remedies else ""
        raise MemoryError(f"the device has no more memory{give} ({one_line(error)})") from error


def _split(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Returns the name of the command, and the words behind it.

    Raises:
      UsageError: if there is no such command.
    """
    for length in (1, 2):
        if (name := " ".join(words[:length])) in COMMANDS:
            return name, words[length:]
    given = " ".join(words[:2]) if words[0] == "bench" else words[0]
    near = difflib.get_close_matches(given, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "see sparseffn --help"
    raise UsageError(f"there is no command {given!r}: {hint}")


def _overview() -> str:
    lines = [f"  {name:<15}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sparseffn COMMAND [options]",
            "",
            "Replace the feed-forward networks of pretrained transformers by sparse ones that are",
            "faster on the clock.",
            "",
            "commands:",
            *lines,
            "",
            "Every command explains itself: sparseffn COMMAND --help.",
            "",
            "example:",
            "  sparseffn convert --model gpt2 --text corpus/ --out sparse --flops 0.4",
        ]
    )


def _say(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(message, markup=False, highlight=False)


@contextlib.contextmanager
def _ctrl_c_ends_the_process() -> Iterator[None]:
    # What libraries import at will they import in a try block, and some catch Ctrl-C there too.
    is_usual = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
