"""The main job from end to end: a pretrained GPT-2 goes in, a faster sparse one comes out."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from sparseffn_jax.bench import pictures
from sparseffn_jax.bench.stacks import ffn_stack, time_stacks
from sparseffn_jax.checkpoints.pretrained import (
    EMBEDDED_MODEL,
    Pretrained,
    load_pretrained,
    save_pretrained,
)
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer, load_tokenizer
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.evaluate.losses import cross_entropy, make_evaluator
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.measure import records
from sparseffn_jax.measure.costs import dense_flops, flops_per_token, flops_ratio
from sparseffn_jax.measure.timing import PairedTimes, time_pair
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.models.generation import generate
from sparseffn_jax.sparsify import closed_form
from sparseffn_jax.sparsify.convert import Fit, sparsify
from sparseffn_jax.sparsify.dense import DenseFFN
from sparseffn_jax.sparsify.fit import fit_layer
from sparseffn_jax.sparsify.selection import choose_units, score_units
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import STDLIB, TokenWindows, load_windows
from sparseffn_jax.train.loop import TrainResult, train
from sparseffn_jax.train.step import compiler_options

_EVALUATION_BATCH = 16
_TIMED_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What the main job runs on, and for how long.

    Attributes:
      model: Folder or hub name of a dense model.
      text: "stdlib" (the source of Python's standard library), a text file, a folder of text
        files, or a Hugging Face dataset with a "text" column.
      out: Folder for report.json, the pictures and the sparse model; an earlier report there is
        replaced.
      flops: FFN FLOPs of the sparse model over the dense one's.
      steps: Fine-tuning steps, for both models. The sparse one learns from the dense one's
        predictions, the dense one from the text.
      batch_size: Windows in a step.
      window: Tokens in a window; at most the model's n_positions, which is the default.
      learning_rate: Peak rate of the sparse model.
      dense_learning_rate: Peak rate of the dense model, which has less far to go.
      calibration_windows: For the warm start.
      distill_steps: Of layer-wise distillation.
      evaluation_windows: Held-out windows behind every loss.
      sweep: FFN FLOPs ratios of the picture of quality against time.
      sweep_steps: Fine-tuning steps for each of them, after layer-wise distillation; 0 shows the
        loss right after the closed forms.
      prompt: What both models continue.
      seed: Of the data order and of sampling.

    Raises:
      ValueError: on construction, if a value is out of its range.
    """

    model: str = str(EMBEDDED_MODEL)
    text: str = STDLIB
    out: Path = Path("runs/demo")
    flops: float = 0.4
    steps: int = 300
    batch_size: int = 8
    window: int | None = None
    learning_rate: float = 1e-3
    dense_learning_rate: float = 3e-4
    calibration_windows: int = 96
    distill_steps: int = 100
    evaluation_windows: int = 128
    sweep: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    sweep_steps: int = 0
    prompt: str = "def read_config(path):\n"
    seed: int = 0

    def __post_init__(self):
        for ratio in (self.flops, *self.sweep):
            if not 0.0 < ratio <= 1.0:
                raise ValueError(f"a FLOPs ratio of {ratio} must lie above 0 and not above 1")
        for name in ("steps", "batch_size", "calibration_windows", "evaluation_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("distill_steps", "sweep_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


def run_demo(settings: DemoSettings, console: Console) -> dict[str, Any]:
    """Runs the main job and returns what it writes to ``report.json``.

    Load, evaluate, sparsify in three stages, fine-tune sparse and dense on the same batches,
    evaluate, time both in turn, let both write; losses are in nats a token on held-out text.

    Raises:
      CheckpointError, FileNotFoundError, ValueError: if model, text or settings do not fit.
    """
    started = time.perf_counter()
    job = _Job(settings, console)
    # An earlier demo's training must not be resumed: its curves would be missing here.
    shutil.rmtree(settings.out / "training", ignore_errors=True)
    job.evaluate_dense()
    job.sparsify()
    job.fine_tune()
    job.sweep()
    job.time_models()
    job.write_samples()
    job.report["seconds"] = round(time.perf_counter() - started, 1)
    job.finish()
    return job.report


class _Job:
    """What is known so far; every method adds its part of the report."""

    def __init__(self, settings: DemoSettings, console: Console):
        self.settings, self.console = settings, console
        self.say("Loading the model and the text")
        self.dense: Pretrained = load_pretrained(settings.model)
        if self.dense.ffns:
            raise ValueError(f"{settings.model} is sparse already: give a dense model")
        self.model = self.dense.model()
        config = self.dense.config
        window = check_window(settings.window, self.dense.spec.n_positions)
        self.tokenizer = load_tokenizer(settings.model)
        check_tokenizer(self.tokenizer, config)
        self.config = size_model(self.dense.spec, settings.flops)
        windows = load_windows(settings.text, self.tokenizer, window)
        rng = np.random.default_rng(settings.seed)
        held_out = rng.permutation(len(windows.validation))[: settings.evaluation_windows]
        self.windows = TokenWindows(windows.train, windows.validation[held_out])
        chosen = rng.permutation(len(windows.train))[: settings.calibration_windows]
        self.calibration: Int[np.ndarray, "n t"] = windows.train[chosen, :-1]
        self.report: dict[str, Any] = {
            "model": settings.model,
            "text": settings.text,
            "settings": dataclasses.asdict(settings) | {"out": str(settings.out)},
            "versions": records.versions(),
            "parameters": {"dense": _count(self.dense.params)},
            "dense": {},
            "sparse": {},
        }

    def say(self, what: str) -> None:
        self.console.print(f"[bold]> {what}[/bold]")

    def loss(self, model: Decoder, params: Any) -> float:
        return make_evaluator(model)(params, self.windows.validation, _EVALUATION_BATCH)

    def evaluate_dense(self) -> None:
        self.say(f"Evaluating the dense model on {self.windows.validation[:, 1:].size:,} tokens")
        self.report["dense"]["pretrained_val_loss"] = self.loss(self.model, self.dense.params)

    def sparsify(self) -> None:
        """Converts in three stages, each of which must be better than the one before."""
        self.say(f"Replacing every FFN: FLOPs {flops_ratio(self.config):.3f} of dense")
        losses = {}
        for stage, fit, steps in (
            ("selection", select_layer, 0),
            ("closed_form", fit_layer, 0),
            ("layer_distillation", fit_layer, self.settings.distill_steps),
        ):
            self.sparse_model, self.sparse_params = self.convert(self.config, fit, steps)
            losses[stage] = self.loss(self.sparse_model, self.sparse_params)
            self.console.print(f"  after {stage.replace('_', ' ')}: {losses[stage]:.4f}")
        self.report["warm_start"] = losses
        self.report["parameters"]["sparse"] = _count(self.sparse_params)
        self.report["ffn_flops_ratio"] = flops_ratio(self.config)
        self.report["ffn_flops_per_token"] = flops_per_token(self.config) | {
            "dense": dense_flops(self.config.d_model, self.config.d_ff, self.config.gated)
        }
        self.report["ffn_config"] = self.config.to_dict()

    def convert(self, config: SparseFFNConfig, fit: Fit, distill_steps: int):
        return sparsify(
            self.model,
            self.dense.params,
            config,
            self.calibration,
            fit=fit,
            distill_steps=distill_steps,
            batch_size=_EVALUATION_BATCH,
            seed=self.settings.seed,
        )

    def fine_tune(self) -> None:
        """Trains both on the same batches, the sparse model with the dense one as its teacher."""
        self.curves, hashes = {}, {}
        teacher = (self.model, self.dense.params)
        for name, model, params, taught in (
            ("dense", self.model, self.dense.params, None),
            ("sparse", self.sparse_model, self.sparse_params, teacher),
        ):
            self.say(f"Fine-tuning the {name} model for {self.settings.steps} steps")
            result, points = self.train(name, model, params, self.settings.steps, taught)
            self.curves[name], hashes[name] = points, result.data_hash
            self.report[name]["val_loss"] = self.loss(model, result.params)
            if name == "sparse":
                self.sparse_params = result.params
            else:
                self.dense = dataclasses.replace(self.dense, params=result.params)
        if hashes["dense"] != hashes["sparse"]:
            raise AssertionError("dense and sparse training read different batches")
        self.report["data_hash"] = hashes["dense"]
        self.report["loss_gap"] = (
            self.report["sparse"]["val_loss"] - self.report["dense"]["val_loss"]
        )

    def train(
        self, name: str, model: Decoder, params: Any, steps: int, teacher: Any
    ) -> tuple[TrainResult, list[tuple[int, float]]]:
        settings = self.settings
        rate = settings.dense_learning_rate if teacher is None else settings.learning_rate
        config = TrainConfig(
            steps=steps,
            batch_size=settings.batch_size,
            recipe="full",
            learning_rate=rate,
            ffn_learning_rate=rate,
            distill_weight=0.0 if teacher is None else 1.0,
            temperature=1.0,
            seed=settings.seed,
            log_every=max(1, steps // 10),
            eval_every=0,
            save_every=max(1, steps),
        )
        points: list[tuple[int, float]] = []

        def remember(step: int, metrics: dict[str, float]) -> None:
            points.append((step, metrics.get("cross_entropy", metrics["loss"])))

        folder = settings.out / "training" / name
        result = train(
            model, params, self.windows, config, folder, teacher=teacher, on_step=remember
        )
        return result, points

    def sweep(self) -> None:
        """Converts at several budgets, to show what quality each amount of time buys."""
        self.points: list[dict[str, float]] = []
        original = load_pretrained(self.settings.model).params
        teacher = (self.model, original)
        dense_tuned, self.dense = self.dense, dataclasses.replace(self.dense, params=original)
        for ratio in self.settings.sweep:
            self.say(f"Quality and time at FFN FLOPs {ratio:g}")
            config = size_model(self.model.spec, ratio)
            distill_steps = self.settings.distill_steps if self.settings.sweep_steps else 0
            model, params = self.convert(config, fit_layer, distill_steps)
            point = {"flops_ratio": flops_ratio(config), "val_loss": self.loss(model, params)}
            if self.settings.sweep_steps:
                name, steps = f"sweep_{ratio:g}", self.settings.sweep_steps
                point["converted_val_loss"] = point["val_loss"]
                result, _ = self.train(name, model, params, steps, teacher)
                params = result.params
                point["val_loss"] = self.loss(model, params)
            times = self.time_ffns(model, params)
            point |= {"ffn_speedup": times.speedup, "time_ratio": 1.0 / times.speedup}
            self.points.append(point)
            self.console.print(f"  loss {point['val_loss']:.4f}, FFN {times.speedup:.2f}x")
        self.dense = dense_tuned
        self.report["sweep"] = self.points

    def time_ffns(self, model: Decoder, params: Any, train: bool = False) -> PairedTimes:
        """Times the FFNs of all layers, one after the other, on activations of one batch."""
        x = jax.random.normal(jax.random.key(0), (_TIMED_TOKENS, self.config.d_model))
        dense = ffn_stack(self.model, self.dense.params, train=train)
        return time_stacks(dense, ffn_stack(model, params, train=train), x)

    def time_models(self) -> None:
        self.say("Timing both, in turn, on identical inputs")
        batch = jnp.asarray(self.windows.train[: self.settings.batch_size])
        sides = ((self.model, self.dense.params), (self.sparse_model, self.sparse_params))
        forward = [_forward(model, params) for model, params in sides]
        gradient = [_gradient(model, params) for model, params in sides]
        times = {
            "ffn": self.time_ffns(self.sparse_model, self.sparse_params),
            "ffn_training": self.time_ffns(self.sparse_model, self.sparse_params, train=True),
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
        ids = jnp.asarray([self.tokenizer.encode(self.settings.prompt)], jnp.int32)
        new = min(120, self.model.spec.n_positions - ids.shape[1])
        for name, model, params in (
            ("dense", self.model, self.dense.params),
            ("sparse", self.sparse_model, self.sparse_params),
        ):
            key = jax.random.key(self.settings.seed)
            out = generate(model, params, ids, new, temperature=0.6, top_k=40, key=key)
            self.report[name]["sample"] = self.tokenizer.decode(np.asarray(out[0]).tolist())

    def finish(self) -> None:
        out, rep = self.settings.out, self.report
        save_pretrained(
            out / "model",
            self.sparse_model,
            self.sparse_params,
            tokenizer=self.dense.folder or self.tokenizer,
            overwrite=True,
        )
        starts = {
            "dense": rep["dense"]["pretrained_val_loss"],
            "sparse": rep["warm_start"]["layer_distillation"],
        }
        pictures.plot_training(out / "training.png", self.curves, starts)
        pictures.plot_masks(out / "masks.png", [self.config] * self.model.spec.n_layer)
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


def select_layer(
    dense: DenseFFN, config: SparseFFNConfig, x: np.ndarray
) -> tuple[SparseFFNConfig, dict[str, Any]]:
    """Starts a layer plainly, to show what the closed forms are worth: nothing is refitted.

    The most important units stay as they are, the others' weights are cut to their largest singular
    values, and the polynomial is the activation's own.

    Args:
      dense: the FFN to stand in for.
      config: a layer with a dense core, a low-rank branch and a polynomial, with biases.
      x: (n, d_model) calibration activations.

    Returns:
      The config with the polynomial's fitted radius, and float32 parameters.
    """
    branch, core = config.spectral, config.micro and config.micro.core
    if branch is None or core is None or config.polynomial is None:
        raise ValueError("plain selection is for layers with all three parts")
    hidden, slopes = dense.hidden([up(x) for up in dense.up_maps])
    scores = score_units(dense, hidden, slopes, centred=config.bias)
    units = choose_units(scores, core.width, branch.width, None)
    leaves: dict[str, Any] = {"core": {}, "spectral": {}, "bias": dense.down.bias}
    us = []
    for name, full in zip(config.up_maps, dense.up_maps, strict=True):
        kept, thinned = full.outputs(units.core), full.outputs(units.spectral)
        leaves["core"][name] = {"kernel": kept.weight, "bias": kept.bias}
        axes, filter = closed_form.truncated_svd(thinned.weight, branch.rank)
        leaves["spectral"][name] = {"axes": axes, "filter": filter, "bias": thinned.bias}
        us.append(dataclasses.replace(thinned, weight=axes @ filter)(x))
    weights = np.linalg.norm(dense.down.weight[units.spectral], axis=1) ** 2
    fitted, coefficients = closed_form.fit_polynomial(
        config.polynomial, us, dense.hidden(us)[0], weights
    )
    leaves["spectral"]["polynomial"] = coefficients
    axes, filter = closed_form.truncated_svd(
        dense.down.weight[units.spectral], branch.down_rank or branch.rank
    )
    leaves["spectral"]["down"] = {"axes": axes, "filter": filter}
    leaves["core"]["down"] = {"kernel": dense.down.weight[units.core]}
    config = dataclasses.replace(config, polynomial=fitted)
    return config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), leaves)


def _summary(rep: dict[str, Any]) -> Table:
    table = Table(title="Dense and sparse, fine-tuned on the same batches")
    for name in ("", "dense", "sparse", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    flops, warm = rep["ffn_flops_per_token"], rep["warm_start"]
    sparse_flops = sum(count for part, count in flops.items() if part != "dense")
    parameters = rep["parameters"]

    def row(label: str, dense: str, sparse: str, ratio: str) -> None:
        table.add_row(label, dense, sparse, ratio)

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
        f"{sparse_flops:,}",
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
        ("FFN forward + backward", "ffn_training"),
        ("model forward", "model"),
        ("model forward + backward", "model_training"),
    ):
        times = rep["times"][name]
        row(
            label,
            f"{1e3 * times['baseline_seconds']:.1f} ms",
            f"{1e3 * times['candidate_seconds']:.1f} ms",
            f"{times['speedup']:.2f}x",
        )
    return table


def _forward(model: Decoder, params: Any) -> Callable[[Any], Any]:
    run, params = jax.jit(model.apply), jax.device_put(params)
    return lambda batch: run({"params": params}, batch[:, :-1])


def _gradient(model: Decoder, params: Any) -> Callable[[Any], Any]:
    def loss(params: Any, batch: Any) -> Any:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return cross_entropy(logits, batch[:, 1:])

    # As a training step is compiled.
    run = jax.jit(jax.grad(loss), compiler_options=compiler_options())
    params = jax.device_put(params)
    return lambda batch: run(params, batch)


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
