"""What campaigns share: a tiny run, a model with its text, a table, a JSON file."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config

import sparseffn_jax as sf
from sparseffn_jax.measure.records import versions, write_json

WINDOW, VOCAB_SIZE, WIDTH = 16, 97, 32


def tiny_model() -> tuple[sf.GPT2LMHeadModel, dict[str, Any]]:
    """Returns a GPT-2 of one sparse layer with all three parts, and parameters for it."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=WINDOW, n_embd=WIDTH, n_layer=1, n_head=2
    )
    ffn = sf.SparseFFNConfig(
        WIDTH,
        4 * WIDTH,
        spectral=sf.SpectralConfig("low_rank", width=2 * WIDTH, rank=4),
        polynomial=sf.PolynomialConfig(degree=4),
        micro=sf.MicroRefinementConfig(sf.CoreConfig(WIDTH)),
    )
    model = sf.GPT2LMHeadModel(config, (ffn,))
    ids = jnp.zeros((1, WINDOW), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(0), ids)["params"]


def tiny_windows() -> sf.TokenWindows:
    """Returns 64 windows of text in which small token ids are frequent."""
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 64, WINDOW + 1)).min(axis=0)
    return sf.TokenWindows(tokens[8:].astype(np.int32), tokens[:8].astype(np.int32))


def tiny_config(**changes: Any) -> sf.TrainConfig:
    """Returns settings of a run without evaluations or logs in between."""
    config = sf.TrainConfig(batch_size=4, recipe="full", eval_every=0, log_every=1000)
    return dataclasses.replace(config, **changes)


class Subject(NamedTuple):
    """What a campaign on quality converts, and on which text.

    Attributes:
      dense: the dense model.
      chosen: windows of calibration text, each with one token more as a target.
      held_out: windows that the loss is measured on.
    """

    dense: Any
    chosen: np.ndarray
    held_out: np.ndarray

    def loss(self, model: Any, params: Any) -> float:
        """Returns the loss on the windows that are held out, in nats a token."""
        return sf.evaluate_loss(model, params, self.held_out, batch_size=2)


def add_subject(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Adds the arguments that :func:`load_subject` reads."""
    parser.add_argument("model", help="folder, GGUF file or hub name of a dense model")
    parser.add_argument("text", help="a text file; its validation part is kept for the loss")
    for name in ("calibration_tokens", "window", "validation_windows"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=defaults[name])


def load_subject(arguments: argparse.Namespace) -> Subject:
    """Loads a dense model and draws calibration text."""
    dense = sf.load_pretrained(arguments.model)
    windows = sf.load_windows(arguments.text, sf.load_tokenizer(arguments.model), arguments.window)
    order = np.random.default_rng(0).permutation(len(windows.train))
    chosen = windows.train[order[: arguments.calibration_tokens // arguments.window]]
    return Subject(dense, chosen, windows.validation[: arguments.validation_windows])


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Returns a tree's leaves by path."""
    return {"/".join(path): np.asarray(x) for path, x in flatten_dict(tree).items()}


def same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Whether two dicts hold the same arrays, bit for bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


def finish(
    title: str, rows: Mapping[str, Any], failures: list[str], out: Path, settings: dict[str, Any]
) -> None:
    """Prints the table, writes the JSON file, and exits with 1 if something failed."""
    console = Console(soft_wrap=True)
    table = Table(title=title)
    table.add_column("what")
    table.add_column("result", justify="right")
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
    for failure in failures[:20]:
        console.print(failure, markup=False, style="red")
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(x) if isinstance(x, Path) else x for name, x in settings.items()}
    report = {"settings": settings, "results": dict(rows), "failures": failures}
    write_json(out, report | {"versions": versions()})
    console.print(f"wrote {out}")
    sys.exit(1 if failures else 0)
