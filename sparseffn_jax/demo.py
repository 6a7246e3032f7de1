"""The main job from end to end: a pretrained GPT-2 goes in, a faster sparse one comes out."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from sparseffn_jax.bench import pictures
from sparseffn_jax.bench.ablation import select_layer
from sparseffn_jax.bench.comparison import (
    EVALUATION_BATCH,
    Comparison,
    load_dense,
)
from sparseffn_jax.bench.fairness import check_comparable
from sparseffn_jax.bench.planned import PlannedMethod, Planning
from sparseffn_jax.bench.settings import DemoSettings, begin_report
from sparseffn_jax.checkpoints.cards import model_card, origin_of
from sparseffn_jax.checkpoints.cards import table as markdown_table
from sparseffn_jax.checkpoints.folders import check_replaceable
from sparseffn_jax.checkpoints.pretrained import save_pretrained
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.evaluate import losses
from sparseffn_jax.evaluate.fused_loss import mean_loss
from sparseffn_jax.measure import records
from sparseffn_jax.measure.costs import dense_flops, flops_ratio, mean_flops_ratio
from sparseffn_jax.measure.timing import time_pair
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.models.generation import generate
from sparseffn_jax.sparsify.convert import Fit, sparsify
from sparseffn_jax.sparsify.fit import fit_layer
from sparseffn_jax.sparsify.planning import size_of
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.train.run_lock import hold_run_folder
from sparseffn_jax.train.step import compiler_options

Configs = tuple[SparseFFNConfig | None, ...]
_TIMED_TOKENS = 4096


def run_demo(settings: DemoSettings, console: Console) -> dict[str, Any]:
    """Runs the main job, from a pretrained model to a report, pictures and a sparse model.

    It loads and evaluates the dense model, plans what each FFN becomes, replaces the FFNs in three
    stages, fine-tunes the sparse and the dense model on the same batches, evaluates both, times
    them in turn, and lets both write. Losses are in nats a token on held-out text.

    Args:
      settings: what the job runs on, and for how long.
      console: gets the progress and the tables.

    Returns:
      What it writes to ``report.json``.

    Raises:
      CheckpointError, FileNotFoundError, ValueError: if model, text or settings do not fit.
      RunFolderError: if another run is writing to ``out``.
    """
    started = time.perf_counter()
    check_replaceable(settings.out / "model", True, [settings.model])
    with hold_run_folder(settings.out):
        job = _Job(settings, console)
        # The runs of an earlier demo, of another sweep perhaps, would be taken for this one's.
        shutil.rmtree(settings.out / "training", ignore_errors=True)
        job.evaluate_dense()
        job.plan()
        job.sparsify()
        job.fine_tune()
        job.sweep()
        job.time_models()
        job.write_samples()
        job.report["seconds"] = round(time.perf_counter() - started, 1)
        job.finish()
        return job.report


_COLUMNS = ("", "dense", "sparse", "ratio")


class _Job:
    """The main job so far, to whose report every method adds its part."""

    def __init__(self, settings: DemoSettings, console: Console):
        self.settings, self.console = settings, console
        self.say("Loading the model and the text")
        dense = load_dense(settings.model)
        self.configs: Configs = ()
        if settings.flops is not None:
            # Before the text is read, because it refuses a ratio that the model is too small for.
            self.configs = (size_model(dense.spec, settings.flops),) * dense.spec.n_layer
        self.comparison = Comparison(settings, dense, timed_tokens=_TIMED_TOKENS, timing_seed=0)
        for line in self.comparison.text_counts.lines():
            self.console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        self.model, self.pretrained = self.comparison.model, dense.params
        self.prompt: list[int] = self.comparison.tokenizer.encode(settings.prompt)
        if not 1 <= len(self.prompt) < dense.spec.n_positions:
            raise ValueError(
                f"prompt has {len(self.prompt)} tokens: give at least 1, and fewer than the "
                f"model's n_positions={dense.spec.n_positions}"
            )
        self.report: dict[str, Any] = {
            "model": settings.model,
            "text": settings.text,
            "text_counts": dataclasses.asdict(self.comparison.text_counts),
            **begin_report(settings),
            "parameters": {"dense": _count(dense.params)},
            "dense": {},
            "sparse": {},
        }

    def say(self, what: str) -> None:
        self.console.print(f"[bold]> {what}[/bold]")

    def evaluate_dense(self) -> None:
        held_out = self.comparison.windows.validation
        self.say(f"Evaluating the dense model on {held_out[:, 1:].size:,} tokens")
        loss = self.comparison.loss(self.model, self.pretrained)
        self.report["dense"]["pretrained_val_loss"] = loss

    def plan(self) -> None:
        """Plans what each layer becomes, unless all are to be alike."""
        if self.configs:
            return
        target = self.settings.ffn_speedup
        self.say(f"Planning FFNs that are {target:g} times as fast")
        planning = Planning(self.comparison, folder=self.settings.out, console=self.console)
        method = PlannedMethod(planning, target, narrow=False, console=self.console)
        settled = self.comparison.settle(method, self.comparison.sizer(method), target)
        if settled is None:
            raise ValueError(
                f"ffn_speedup={target:g} is out of reach: no FFNs of this model are that fast here"
            )
        self.configs = settled.config.layers
        for i, config in enumerate(self.configs):
            units, rank = size_of(config, self.model.spec)
            kept = "dense" if config is None else f"{units} units" + (rank > 0) * f", rank {rank}"
            self.console.print(f"  layer {i}: {kept}")

    def sparsify(self) -> None:
        """Converts in three stages, each of which must be better than the one before."""
        ratio, spec = mean_flops_ratio(self.configs), self.model.spec
        self.say(f"Replacing the FFNs: FLOPs {ratio:.3f} of dense")
        losses = {}
        for stage, fit, steps in (
            ("selection", select_layer, 0),
            ("closed_form", fit_layer, 0),
            ("layer_distillation", fit_layer, self.settings.distill_steps),
        ):
            self.sparse_model, self.sparse_params = self.convert(self.configs, fit, steps)
            losses[stage] = self.comparison.loss(self.sparse_model, self.sparse_params)
            self.console.print(f"  after {stage.replace('_', ' ')}: {losses[stage]:.4f}")
        self.report["warm_start"] = losses
        self.report["parameters"]["sparse"] = _count(self.sparse_params)
        self.report["ffn_flops_ratio"] = ratio
        dense = spec.n_layer * dense_flops(spec.d_model, spec.d_ff, spec.gated)
        self.report["ffn_flops_per_token"] = {"dense": dense, "sparse": round(ratio * dense)}
        self.report["ffn_configs"] = [
            None if config is None else config.to_dict() for config in self.configs
        ]

    def convert(self, configs: Configs, fit: Fit, distill_steps: int) -> tuple[Decoder, Any]:
        return sparsify(
            self.model,
            self.pretrained,
            configs,
            self.comparison.calibration[:, :-1],
            fit=fit,
            distill_steps=distill_steps,
            batch_size=EVALUATION_BATCH,
            seed=self.settings.seed,
        )

    def fine_tune(self) -> None:
        """Trains both on the same batches, the sparse model with the tuned dense one as teacher."""
        steps = self.settings.steps
        self.say(f"Fine-tuning the dense model for {steps} steps")
        dense = self.comparison.tune_dense()
        self.say(f"Fine-tuning the sparse model for {steps} steps")
        sparse = self.comparison.tune(
            "sparse", self.sparse_model, self.sparse_params, teacher=dense.params
        )
        check_comparable("sparse", sparse.conditions, "dense", dense.conditions)
        self.dense_params, self.sparse_params = dense.params, sparse.params
        self.curves = {"dense": dense.curve, "sparse": sparse.curve}
        self.report["dense"]["val_loss"] = dense.loss
        self.report["sparse"]["val_loss"] = sparse.loss
        self.report["data_hash"] = dense.conditions.data_hash
        self.report["loss_gap"] = sparse.loss - dense.loss

    def sweep(self) -> None:
        """Converts at several budgets, to show what quality each amount of time buys."""
        self.points: list[dict[str, float]] = []
        steps = self.settings.sweep_steps
        for ratio in self.settings.sweep:
            self.say(f"Quality and time at FFN FLOPs {ratio:g}")
            config = size_model(self.model.spec, ratio)
            distill_steps = self.settings.distill_steps if steps else 0
            every = (config,) * self.model.spec.n_layer
            model, params = self.convert(every, fit_layer, distill_steps)
            point = {
                "flops_ratio": flops_ratio(config),
                "val_loss": self.comparison.loss(model, params),
            }
            if steps:
                tuned = self.comparison.tune(f"sweep_{ratio:g}", model, params, steps=steps)
                params = tuned.params
                point |= {"converted_val_loss": point["val_loss"], "val_loss": tuned.loss}
            times = self.comparison.time_ffns(model, params)
            point |= {"ffn_speedup": times.speedup, "time_ratio": 1.0 / times.speedup}
            self.points.append(point)
            self.console.print(f"  loss {point['val_loss']:.4f}, FFN {times.speedup:.2f}x")
        self.report["sweep"] = self.points

    def time_models(self) -> None:
        self.say("Timing both, in turn, on identical inputs")
        batch = jnp.asarray(self.comparison.windows.train[: self.settings.batch_size])
        sparse = (self.sparse_model, self.sparse_params)
        sides = ((self.model, self.dense_params), sparse)
        forward = [_forward(model, params) for model, params in sides]
        gradient = [_gradient(model, params) for model, params in sides]
        times = {
            "ffn": self.comparison.time_ffns(*sparse),
            "ffn_training": self.comparison.time_ffns(*sparse, train=True),
            "model": time_pair(lambda: forward[0](batch), lambda: forward[1](batch)),
            "model_training": time_pair(
                lambda: gradient[0](batch), lambda: gradient[1](batch), repeats=7
            ),
        }
        self.report |= {f"{name}_speedup": pair.speedup for name, pair in times.items()}
        self.report["times"] = {name: pair.summary() for name, pair in times.items()}
        self.report["times"]["tokens"] = {"ffn": _TIMED_TOKENS, "model": batch[:, 1:].size}

    def write_samples(self) -> None:
        self.say("Letting both write")
        tokenizer, ids = self.comparison.tokenizer, jnp.asarray([self.prompt], jnp.int32)
        new = min(120, self.model.spec.n_positions - ids.shape[1])
        for name, model, params in (
            ("dense", self.model, self.dense_params),
            ("sparse", self.sparse_model, self.sparse_params),
        ):
            key = jax.random.key(self.settings.seed)
            out = generate(model, params, ids, new, temperature=0.6, top_k=40, key=key)
            self.report[name]["sample"] = tokenizer.decode(np.asarray(out[0]).tolist())

    def finish(self) -> None:
        out, rep = self.settings.out, self.report
        save_pretrained(
            out / "model",
            self.sparse_model,
            self.sparse_params,
            tokenizer=self.comparison.dense.folder or self.comparison.tokenizer,
            overwrite=True,
            card=model_card(
                out.name,
                self.sparse_model,
                self.sparse_params,
                origin_of(self.settings.model, self.comparison.dense.folder),
                _card_section(rep),
            ),
        )
        validation = {
            "dense": (rep["dense"]["pretrained_val_loss"], rep["dense"]["val_loss"]),
            "sparse": (rep["warm_start"]["layer_distillation"], rep["sparse"]["val_loss"]),
        }
        pictures.plot_training(out / "training.png", self.curves, validation)
        sizes = [size_of(config, self.model.spec) for config in self.configs]
        layers = [{"width": width, "rank": rank} for width, rank in sizes]
        pictures.plot_layers(out / "layers.png", layers, "What each layer keeps")
        tuned = {
            "flops_ratio": rep["ffn_flops_ratio"],
            "time_ratio": 1.0 / rep["ffn_speedup"],
            "val_loss": rep["sparse"]["val_loss"],
        }
        pictures.plot_quality(out / "quality.png", self.points, rep["dense"]["val_loss"], tuned)
        records.write_json(out / "report.json", rep)
        self.console.print(_summary(rep))
        for name in ("dense", "sparse"):
            self.console.rule(f"the {name} model writes")
            self.console.print(rep[name]["sample"], markup=False, highlight=False, soft_wrap=True)
        self.console.rule()
        self.console.print(
            f"Report, pictures and the sparse model are in {out}/ ({rep['seconds']:.0f} s in all)."
        )


def _summary(rep: dict[str, Any]) -> Table:
    table = Table(title="Dense and sparse, fine-tuned on the same batches")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if not name else "right")
    for row in _rows(rep):
        table.add_row(*row)
    return table


def _card_section(rep: dict[str, Any]) -> str:
    tokens, versions = rep["times"]["tokens"], rep["versions"]
    return (
        f"## Converted and fine-tuned\n\n{markdown_table(_COLUMNS, _rows(rep))}\n\n"
        "Both were fine-tuned on the same batches. Losses are in nats a token on held-out text. "
        f"Times are medians of pairs in turn, FFNs on {tokens['ffn']:,} and models on "
        f"{tokens['model']:,} tokens, on {versions['device']} with {versions['cpu_count']} CPUs."
    )


def _rows(rep: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    flops, warm = rep["ffn_flops_per_token"], rep["warm_start"]
    parameters = rep["parameters"]

    def row(label: str, dense: str, sparse: str, ratio: str) -> None:
        rows.append((label, dense, sparse, ratio))

    pretrained = rep["dense"]["pretrained_val_loss"]
    row("val. loss, before", f"{pretrained:.4f}", f"{warm['layer_distillation']:.4f}", "")
    row(
        "val. loss, fine-tuned",
        f"{rep['dense']['val_loss']:.4f}",
        f"{rep['sparse']['val_loss']:.4f}",
        f"{rep['loss_gap']:+.4f}",
    )
    row(
        "FFN FLOPs a token",
        f"{flops['dense']:,}",
        f"{flops['sparse']:,}",
        f"{rep['ffn_flops_ratio']:.3f}",
    )
    row(
        "parameters",
        f"{parameters['dense']:,}",
        f"{parameters['sparse']:,}",
        f"{parameters['sparse'] / parameters['dense']:.3f}",
    )
    for label, name in (
        ("FFN forward", "ffn"),
        ("FFN training", "ffn_training"),
        ("model forward", "model"),
        ("model training", "model_training"),
    ):
        times = rep["times"][name]
        tokens = rep["times"]["tokens"][name.removesuffix("_training")]
        row(
            f"{label}, {tokens:,} tokens",
            f"{1e3 * times['baseline_seconds']:.1f} ms",
            f"{1e3 * times['candidate_seconds']:.1f} ms",
            f"{times['speedup']:.2f}x",
        )
    return rows


def _forward(model: Decoder, params: Any) -> Callable[[Any], Any]:
    run, params = jax.jit(model.apply), jax.device_put(params)
    return lambda batch: run({"params": params}, batch[:, :-1])


def _gradient(model: Decoder, params: Any) -> Callable[[Any], Any]:
    def loss(params: Any, batch: Any) -> Any:
        outputs, _ = losses.forward(model, params, batch[:, :-1])
        return mean_loss(outputs, batch[:, 1:])[0]

    # Compiled as a training step is.
    run = jax.jit(jax.grad(loss), compiler_options=compiler_options())
    params = jax.device_put(params)
    return lambda batch: run(params, batch)


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
