"""What several commands of the CLI share."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from sparseffn_jax.checkpoints.pretrained import Pretrained
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer, load_tokenizer
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.progress import stage
from sparseffn_jax.train.choices import LossOn
from sparseffn_jax.train.data import TextCounts, TokenWindows, load_windows
from sparseffn_jax.train.processes import is_first

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def matching_tokenizer(source: str, pretrained: Pretrained) -> Any:
    """Loads a model's tokenizer and checks that the model knows all its tokens."""
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, pretrained.config)
    return tokenizer


def read_windows(
    arguments: Any, tokenizer: Any, n_positions: int, console: Console, loss_on: LossOn = "all"
) -> tuple[TokenWindows, TextCounts]:
    """Reads the text of a command, and shows how much it is and what was left out.

    Args:
      arguments: the command's arguments, with ``text``, ``validation_text``, ``text_tokens`` and
        ``window``.
      tokenizer: the model's tokenizer.
      n_positions: the largest number of tokens that the model takes.
      console: where the counts are shown.
      loss_on: whether all tokens count, or those of completions.
    """
    with stage("reading the text"):
        windows = load_windows(
            arguments.text,
            tokenizer,
            check_window(arguments.window, n_positions),
            validation_source=arguments.validation_text,
            most_tokens=arguments.text_tokens,
            loss_on=loss_on,
        )
    assert windows.counts is not None
    if is_first():
        for line in windows.counts.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return windows, windows.counts


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, for the next process.

    A folder that the user has chosen for JAX stays in force. Programs for CPUs hold instructions
    that another CPU may lack, so that each kind of CPU has a folder of its own.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "sparseffn_jax" / f"compiled-{_cpu()}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)


def _cpu() -> str:
    description = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        description += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        description += platform.processor()
    return hashlib.sha256(description.encode()).hexdigest()[:12]
