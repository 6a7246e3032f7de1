"""The command line, ``sparseffn``: demo, convert, finetune, evaluate, generate, inspect, bench."""

import dataclasses
import itertools
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from sparseffn_jax.bench.commands import BenchAll, BenchFFN, BenchModel, BenchQuality
from sparseffn_jax.checkpoints.folders import check_replaceable
from sparseffn_jax.checkpoints.pretrained import (
    EMBEDDED_MODEL,
    Pretrained,
    load_pretrained,
    save_pretrained,
)
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer, load_tokenizer
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.demo import DemoSettings, run_demo
from sparseffn_jax.evaluate.losses import evaluate_tokens
from sparseffn_jax.evaluate.perplexity import strided_loss
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.measure.autotune import autotune
from sparseffn_jax.measure.layers import describe_layer
from sparseffn_jax.measure.records import make_folder, write_json
from sparseffn_jax.models.generation import Sampling
from sparseffn_jax.models.text_generation import stream_text
from sparseffn_jax.ops.plans.choice import PlanTable, using
from sparseffn_jax.sparsify.convert import sparsify
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import STDLIB, load_windows, read_text, read_whole
from sparseffn_jax.train.guard import DivergenceError
from sparseffn_jax.train.loop import Resume, Terminated, train
from sparseffn_jax.train.processes import DistributedConfig, is_first
from sparseffn_jax.train.strategies import StrategyName, make_strategy

_EMBEDDED = str(EMBEDDED_MODEL)
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
Precision = Literal["float32", "bfloat16", "float16"]


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
class Convert:
    """Replace a dense checkpoint's FFNs by SparseFFNs that start near them.

    Closed-form warm start, then layer-wise distillation; no end-to-end training (that is
    "finetune"). The result is a folder in Hugging Face format.

    Attributes:
      model: Folder, GGUF file or hub name of a dense model.
      out: Folder to write.
      config: JSON file of one SparseFFNConfig for every layer, or a list with one (or null, to
        keep the layer dense) for each; see "inspect". Without it --flops decides.
      flops: FFN FLOPs over the dense ones, where no --config is given.
      text: Calibration text; see "demo".
      calibration_windows: Windows of it to use.
      distill_steps: Of layer-wise distillation; 0 for none.
      seed: Of the choice of windows.
      plans: Table of measured plans to choose by, as "inspect --autotune" writes it.
      overwrite: Replace an existing model in --out.
    """

    model: str
    out: Path
    config: Path | None = None
    flops: float = 0.4
    text: str = STDLIB
    calibration_windows: int = 128
    distill_steps: int = 300
    seed: int = 0
    plans: Path | None = None
    overwrite: bool = False

    def run(self, console: Console) -> None:
        """Runs the command."""
        _check_at_least("calibration_windows", self.calibration_windows, 1)
        _check_at_least("distill_steps", self.distill_steps, 0)
        check_replaceable(self.out, self.overwrite)
        dense = load_pretrained(self.model)
        configs = self._configs(dense)
        tokenizer = _tokenizer(self.model, dense)
        windows = load_windows(self.text, tokenizer, dense.spec.n_positions).train
        order = np.random.default_rng(self.seed).permutation(len(windows))
        calibration = windows[order[: self.calibration_windows], :-1]
        with console.status(f"fitting {dense.spec.n_layer} layers"):
            model, params = sparsify(
                dense.model(),
                dense.params,
                configs,
                calibration,
                distill_steps=self.distill_steps,
                seed=self.seed,
            )
        save_pretrained(self.out, model, params, tokenizer=tokenizer, overwrite=self.overwrite)
        console.print(f"wrote {self.out}; recover its quality with: sparseffn finetune")

    def _configs(self, dense: Pretrained) -> Any:
        if self.config is None:
            return size_model(dense.spec, self.flops)
        return SparseFFNConfig.layers_from_json(read_text(self.config))


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Fine-tune a dense or sparse model; stop and resume at will.

    --out gets checkpoints, metrics.jsonl, TensorBoard events and, at the end, the model in
    Hugging Face format in --out/model. The same command goes on where it stopped. After SIGTERM it
    saves and exits with status 143, after Ctrl-C with 130.

    Attributes:
      model: Folder, GGUF file or hub name.
      out: Folder of the run.
      train: How to train.
      text: What to train on; see "demo".
      window: Tokens in a window; default n_positions.
      teacher: Folder, GGUF file or hub name of a dense model to distil from; needs
        --distill-weight.
      dtype: Of the computation; weights stay float32. In float16 the loss is scaled.
      resume: "auto" goes on from the newest whole checkpoint if there is one, "must" demands one,
        "never" refuses one.
      strategy: "single" device; "pmap", every device with all parameters and a part of the batch;
        or "mesh", parameters and batch laid out over --mesh. A run may be resumed with another.
      mesh: Sizes of the mesh's axes, such as data=2,fsdp=2,tensor=2: data counts replicas, fsdp
        and tensor share one copy of the parameters, tensor also each layer's work.
      plans: Table of measured plans to choose by, as "inspect --autotune" writes it.
      cluster: How several processes meet; see --distributed.
    """

    model: str
    out: Path
    train: tyro.conf.OmitArgPrefixes[TrainConfig]
    text: str = STDLIB
    window: int | None = None
    teacher: str | None = None
    dtype: Precision = "float32"
    resume: Resume = "auto"
    strategy: StrategyName = "single"
    mesh: str | None = None
    plans: Path | None = None
    cluster: tyro.conf.OmitArgPrefixes[DistributedConfig] = dataclasses.field(
        default_factory=DistributedConfig
    )

    def run(self, console: Console) -> None:
        """Runs the command."""
        # Before anything else: it decides which devices there are.
        self.cluster.start()
        strategy = make_strategy(self.strategy, self.mesh)
        strategy.check(self.train)
        make_folder(self.out)
        pretrained = load_pretrained(self.model)
        tokenizer = _tokenizer(self.model, pretrained)
        windows = load_windows(
            self.text, tokenizer, check_window(self.window, pretrained.spec.n_positions)
        )
        model = pretrained.model(_DTYPES[self.dtype])
        teacher = None
        if self.teacher is not None:
            loaded = load_pretrained(self.teacher)
            teacher = (loaded.model(_DTYPES[self.dtype]), loaded.params)
        result = train(
            model,
            pretrained.params,
            windows,
            self.train,
            self.out,
            teacher=teacher,
            strategy=strategy,
            resume=self.resume,
        )
        if not is_first():
            return
        folder = self.out / "model"
        save_pretrained(folder, model, result.params, tokenizer=tokenizer, overwrite=True)
        console.print(f"wrote {folder} (batches {result.data_hash[:12]})")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a model's loss on a text: nats a token over the whole file.

    The text is cut into non-overlapping windows; every token but the text's first is predicted
    once, from what stands before it in its window. With --stride the windows overlap, so that
    every token is predicted from at least window - stride others: slower and lower, the
    perplexity that Hugging Face documents for models of fixed length.

    Attributes:
      model: Folder, GGUF file or hub name, dense or sparse.
      text: UTF-8 text file; or a folder of text files or a Hugging Face dataset, whose documents
        are joined by blank lines.
      window: Tokens in a window; default n_positions.
      stride: Tokens between the beginnings of two windows.
      batch_size: Windows computed at once; changes the time, not the result.
      plans: Table of measured plans to choose by, as "inspect --autotune" writes it.
      json: File to write loss, tokens and perplexity to.
    """

    model: str
    text: str
    window: int | None = None
    stride: int | None = None
    batch_size: int = 8
    plans: Path | None = None
    json: Path | None = None

    def run(self, console: Console) -> None:
        """Runs the command."""
        _check_at_least("batch_size", self.batch_size, 1)
        if self.json is not None:
            make_folder(self.json.parent)
        text = read_whole(self.text)
        pretrained = load_pretrained(self.model)
        tokenizer = _tokenizer(self.model, pretrained)
        tokens = np.array(tokenizer.backend_tokenizer.encode(text).ids, np.int32)
        if len(tokens) < 2:
            raise ValueError(f"{self.text} has {len(tokens)} tokens: at least 2 are needed")
        window = check_window(self.window, pretrained.spec.n_positions)
        model = pretrained.model()
        arguments = (model, pretrained.params, tokens, window)
        if self.stride is None:
            loss = evaluate_tokens(*arguments, self.batch_size)
        else:
            loss = strided_loss(*arguments, self.stride, self.batch_size)
        result = {
            "loss": loss,
            "tokens": len(tokens) - 1,
            "perplexity": math.exp(loss),
            "window": window,
            "stride": self.stride,
            "model": self.model,
            "text": self.text,
        }
        if self.json is not None:
            write_json(self.json, result)
        console.print(
            f"loss {loss:.4f} nats a token, perplexity {result['perplexity']:.3f}, "
            f"{result['tokens']:,} tokens"
        )


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt; the text appears as it is written.

    Attributes:
      model: Folder, GGUF file or hub name, dense or sparse.
      prompt: The beginning.
      max_new_tokens: Tokens to add at most; an end-of-text token ends the text before.
      temperature: 0 takes the likeliest token; higher is bolder.
      top_k: Sample from the k likeliest tokens only.
      top_p: Sample from the likeliest tokens only, as few as have this probability together.
      repetition_penalty: Above 1 makes tokens that are there already less likely.
      stop: Strings that end the text; they are not printed.
      plans: Table of measured plans to choose by, as "inspect --autotune" writes it.
      seed: Of sampling.
    """

    model: str = _EMBEDDED
    prompt: str = "def read_config(path):\n"
    max_new_tokens: int = 120
    temperature: float = 0.6
    top_k: int | None = 40
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    plans: Path | None = None
    seed: int = 0

    def run(self, console: Console) -> None:
        """Runs the command."""
        sampling = Sampling(self.repetition_penalty, self.temperature, self.top_k, self.top_p)
        pretrained = load_pretrained(self.model)
        pieces = stream_text(
            pretrained.model(),
            pretrained.params,
            _tokenizer(self.model, pretrained),
            [self.prompt],
            self.max_new_tokens,
            sampling,
            stop=self.stop,
            key=jax.random.key(self.seed),
        )
        first = next(pieces)
        for (piece,) in itertools.chain([(self.prompt,), first], pieces):
            console.out(piece, end="", highlight=False)
            console.file.flush()
        console.out()


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what a model's FFNs are made of: parts, parameters, FLOPs and plans, layer by layer.

    Attributes:
      model: Folder, GGUF file or hub name, dense or sparse.
      tokens: Rows for which the execution plans are chosen (1: decoding).
      plans: Table of measured plans to choose by; see --autotune.
      autotune: Measure the plans of the model's layers here and write the table to --plans.
      json: Also print the layers' SparseFFNConfigs, in the form that "convert --config" reads.
    """

    model: str = _EMBEDDED
    tokens: int = 2048
    plans: Path | None = None
    autotune: bool = False
    json: bool = False

    def run(self, console: Console) -> None:
        """Runs the command."""
        _check_at_least("tokens", self.tokens, 1)
        if self.autotune and self.plans is None:
            raise ValueError("--autotune needs --plans, the file to write the table to")
        pretrained = load_pretrained(self.model)
        if self.autotune:
            self._autotune(pretrained, console)
        with using(self.plans):
            self._show(pretrained, console)

    def _autotune(self, pretrained: Pretrained, console: Console) -> None:
        assert self.plans is not None
        make_folder(self.plans.parent)
        table = PlanTable(jax.devices()[0].device_kind)
        for config in dict.fromkeys(filter(None, pretrained.ffns)):
            with console.status("measuring plans"):
                measured = autotune(config, [self.tokens])
            table = dataclasses.replace(table, plans={**table.plans, **measured.plans})
        table.save(self.plans)
        console.print(f"wrote {len(table.plans)} plans to {self.plans}")

    def _show(self, pretrained: Pretrained, console: Console) -> None:
        spec = pretrained.spec
        table = Table(title=f"{self.model}: d_model={spec.d_model}, d_ff={spec.d_ff}")
        for name in ("layer", "parts", "parameters", "FLOPs a token", "of dense", "plans"):
            table.add_column(name, justify="left" if name in ("parts", "plans") else "right")
        for i in range(spec.n_layer):
            layer = describe_layer(pretrained.model(), i, self.tokens)
            table.add_row(
                str(i),
                "\n".join(layer.parts),
                f"{layer.parameters:,}",
                f"{layer.flops:,}",
                f"{layer.flops_ratio:.3f}",
                "\n".join(f"{operator}: {plan}" for operator, plan in layer.plans),
            )
        console.print(table)
        if self.json:
            ffns = pretrained.ffns or (None,) * spec.n_layer
            layers = [None if ffn is None else ffn.to_dict() for ffn in ffns]
            console.print_json(data=layers)


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
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main(argv: list[str] | None = None) -> None:
    """Runs ``sparseffn``.

    It exits with 2 after one line about bad input, 130 after Ctrl-C, and 143 when SIGTERM has ended
    a training run, which has saved then.
    """
    errors = Console(stderr=True, soft_wrap=True)
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
    except (ValueError, OSError, DivergenceError) as error:
        if os.environ.get("SPARSEFFN_TRACEBACK"):
            raise
        errors.print(f"error: {error}", markup=False, highlight=False)
        sys.exit(2)


def _tokenizer(source: str, pretrained: Pretrained) -> Any:
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, pretrained.config)
    return tokenizer


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
