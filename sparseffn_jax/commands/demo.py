"""The command ``sparseffn demo``."""

from rich.console import Console

from sparseffn_jax.commands.arguments.demo import DemoArguments
from sparseffn_jax.demo import run_demo
from sparseffn_jax.measure.records import make_folder


class Demo(DemoArguments):
    """Makes a faster sparse GPT-2 of a dense one."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        make_folder(self.out)
        run_demo(self, console)
