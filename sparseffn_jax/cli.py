"""The command line, ``sparseffn``: one class a command, each of which says what it does."""

import dataclasses
import os
import sys
from typing import Annotated

import jax
import tyro
from rich.console import Console

from sparseffn_jax import __version__
from sparseffn_jax.bench.commands import BenchAll, BenchFFN, BenchModel, BenchQuality
from sparseffn_jax.commands.common import keep_compiled_programs
from sparseffn_jax.commands.convert import Convert
from sparseffn_jax.commands.evaluate import Evaluate
from sparseffn_jax.commands.export import Export
from sparseffn_jax.commands.finetune import Finetune
from sparseffn_jax.commands.generate import Generate
from sparseffn_jax.commands.inspect import Inspect
from sparseffn_jax.commands.plan import Plan
from sparseffn_jax.demo import DemoSettings, run_demo
from sparseffn_jax.measure.records import make_folder
from sparseffn_jax.ops.plans.choice import using
from sparseffn_jax.train.guard import DivergenceError
from sparseffn_jax.train.loop import Terminated


@dataclasses.dataclass(frozen=True)
class Demo(DemoSettings):
    """The main job: a dense GPT-2 in, a faster sparse GPT-2 out, with a report and pictures.

    Without arguments it takes the small model that comes with the package and needs no network:
    load, evaluate, sparsify, distil, fine-tune sparse and dense on the same batches, evaluate,
    time both, let both write. Everything lands in the folder given by --out.
    """

    def run(self, console: Console) -> None:
        """Runs the command."""
        make_folder(self.out)
        run_demo(self, console)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure sparse FFNs: one layer, a whole model, quality at equal time, or all in short."""

    what: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[BenchFFN, tyro.conf.subcommand("ffn")]
            | Annotated[BenchModel, tyro.conf.subcommand("model")]
            | Annotated[BenchQuality, tyro.conf.subcommand("quality")]
            | Annotated[BenchAll, tyro.conf.subcommand("all")]
        ]
    ]

    def run(self, console: Console) -> None:
        """Runs the command."""
        self.what.run(console)


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


_OUT_OF_MEMORY = (
    "the device has no more memory: give a smaller --batch-size or a shorter --window, or --remat "
    "where the command has it"
)


def main(argv: list[str] | None = None) -> None:
    """Runs ``sparseffn``.

    It exits with 2 after one line about bad input, 130 after Ctrl-C, and 143 when SIGTERM has ended
    a training run, which has saved then.

    Args:
      argv: the arguments; ``None`` takes those of the process, which then also keeps what it
        compiles in the user's cache folder.
    """
    errors = Console(stderr=True, soft_wrap=True)
    if (sys.argv[1:] if argv is None else argv) == ["--version"]:
        print(f"sparseffn_jax {__version__}")
        return
    if argv is None:
        keep_compiled_programs()
    try:
        command = tyro.cli(
            Command,  # pyright: ignore[reportArgumentType]
            prog="sparseffn",
            description="Sparse feed-forward layers for pretrained transformers.",
            args=argv,
        )
        # Inspect shows what a table changes, and writes it first if it is asked to.
        plans = None if isinstance(command, Inspect) else getattr(command, "plans", None)
        with using(plans):
            command.run(Console())
    except KeyboardInterrupt as interrupt:
        errors.print(str(interrupt) or "stopped", markup=False, highlight=False)
        sys.exit(130)
    except Terminated as terminated:
        errors.print(str(terminated), markup=False, highlight=False)
        raise
    except jax.errors.JaxRuntimeError as error:
        if os.environ.get("SPARSEFFN_TRACEBACK") or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        errors.print(f"error: {_OUT_OF_MEMORY}: {error}", markup=False, highlight=False)
        sys.exit(2)
    except (ValueError, OSError, ImportError, MemoryError, DivergenceError) as error:
        if os.environ.get("SPARSEFFN_TRACEBACK"):
            raise
        errors.print(f"error: {error}", markup=False, highlight=False)
        sys.exit(2)
