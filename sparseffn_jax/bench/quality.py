"""Quality at equal time: what loss each way to thin the FFNs leaves at a measured speed-up."""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sparseffn_jax.bench import pictures
from sparseffn_jax.bench.comparison import (
    EVALUATION_BATCH,
    Comparison,
    load_dense,
)
from sparseffn_jax.bench.fairness import Conditions, check_comparable
from sparseffn_jax.bench.peers import HELPED, PEERS, SPARSE, Method, Searched, WarmStart
from sparseffn_jax.bench.planned import Planned, PlannedMethod, Planning
from sparseffn_jax.bench.settings import QualitySettings, begin_report, check_known
from sparseffn_jax.bench.sizing import Settled, Sizer
from sparseffn_jax.measure import records
from sparseffn_jax.train.run_lock import hold_run_folder

METHODS: Mapping[str, Method | Searched | Planned] = MappingProxyType(
    {
        "SparseFFN-planned": Planned(),
        **SPARSE,
        "narrow-planned": Planned(narrow=True),
        **PEERS,
        **HELPED,
    }
)
# Calibration windows on which a search compares its candidates.
_SEARCH_WINDOWS = 32
# Raised when a method's name comes to stand for something else.
_FORMAT = 2
# What may differ between the beginning of a run and its continuation.
_FREE_SETTINGS = frozenset(("out", "targets", "methods"))


def run_quality(settings: QualitySettings, console: Console) -> dict[str, Any]:
    """Compares all methods at equal measured time.

    Every method is sized until its FFNs run at the target speed-up on this machine, or a little
    above it. It is then started in closed form, distilled layer by layer, fine-tuned on the same
    batches as the dense model, and evaluated on the same held-out text. Losses are in nats a
    token. The report is written after each point, so that the same call goes on where a stopped
    one was.

    Args:
      settings: what is compared, at which speed, and how long it trains.
      console: gets the progress and the table.

    Returns:
      What it writes to ``quality.json``.

    Raises:
      CheckpointError, FileNotFoundError, ValueError: if model, text or settings do not fit, or
        ``out`` holds a report of other settings.
      RunFolderError: if another run is writing to ``out``.
    """
    check_known("methods", settings.methods, METHODS)
    records.make_folder(settings.out)
    with hold_run_folder(settings.out):
        job = _Job(settings, console)
        job.tune_dense()
        for name in settings.methods or METHODS:
            job.compare(name, METHODS[name])
        return job.finish()


class _Job:
    """A comparison of methods, and its report so far."""

    def __init__(self, settings: QualitySettings, console: Console):
        self.settings, self.console = settings, console
        self.path = settings.out / "quality.json"
        self.report = self._start_report()
        dense = load_dense(settings.model)
        self.comparison = Comparison(
            settings, dense, timed_tokens=settings.timed_tokens, timing_seed=settings.seed
        )
        self.model, self.pretrained = self.comparison.model, dense.params
        self.report["text_counts"] = dataclasses.asdict(self.comparison.text_counts)
        for line in self.comparison.text_counts.lines():
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _start_report(self) -> dict[str, Any]:
        fresh = begin_report(self.settings) | {"format": _FORMAT, "points": []}
        # JSON knows no tuples: what is compared has gone through it on both sides.
        fresh = json.loads(json.dumps(fresh))
        if not self.path.exists():
            return fresh
        old = json.loads(self.path.read_text(encoding="utf-8"))
        changed = [
            name
            for part in ("settings", "versions")
            for name, value in fresh[part].items()
            if name not in _FREE_SETTINGS and old[part].get(name) != value
        ]
        if old.get("format") != _FORMAT:
            changed.append("format")
        if changed:
            raise ValueError(
                f"{self.path} was made with other settings ({', '.join(changed)}): give another "
                "folder, or what it was made with"
            )
        return old | {"settings": fresh["settings"]}

    def tune_dense(self) -> None:
        """Fine-tunes the dense model, unless an earlier run has."""
        if "dense" in self.report:
            return
        self.say(f"Fine-tuning the dense model for {self.settings.steps} steps")
        pretrained = self.comparison.loss(self.model, self.pretrained)
        tuned = self.comparison.tune_dense()
        self.report["dense"] = {
            "pretrained_loss": pretrained,
            "loss": tuned.loss,
            "conditions": dataclasses.asdict(tuned.conditions),
        }
        self.save("dense")

    def compare(self, name: str, method: Method | Searched | Planned) -> None:
        """Measures one method at every target that the report lacks."""
        done = {p["target"] for p in self.report["points"] if p["method"] == name}
        sizers: dict[str, Sizer] = {}
        for target in self.settings.targets:
            if target in done:
                continue
            started = time.perf_counter()
            self.say(f"{name} at {target:g}x")
            candidates = self.candidates(name, method, target)
            found = {}
            for candidate, m in candidates.items():
                # A plan for another target is another method.
                if candidate not in sizers or isinstance(method, Planned):
                    sizers[candidate] = self.comparison.sizer(m)
                settled = self.comparison.settle(m, sizers[candidate], target)
                if settled is not None:
                    found[candidate] = settled
            point: dict[str, Any] = {"method": name, "target": target}
            if found:
                candidate = self.best(candidates, found)
                point["candidate"] = candidate
                chosen = candidates[candidate]
                point |= self.measure(_folder(name, target), chosen, *found[candidate])
                self.console.print(
                    f"  measured {point['speedup']:.2f}x at FLOPs {point['flops_ratio']:.3f}, loss "
                    f"{point['converted_loss']:.4f}, tuned {point['loss']:.4f}"
                )
            else:
                self.console.print("  is never that fast here")
            point["seconds"] = round(time.perf_counter() - started, 1)
            self.report["points"].append(point)
            self.save(_folder(name, target))

    def candidates(
        self, name: str, method: Method | Searched | Planned, target: float
    ) -> Mapping[str, Method]:
        """Returns the methods of which the best is taken at a target."""
        if isinstance(method, Searched):
            return method.candidates
        if isinstance(method, Planned):
            args = self.planning, target
            method = PlannedMethod(*args, narrow=method.narrow, console=self.console)
        return {name: method}

    @functools.cached_property
    def planning(self) -> Planning:
        """What plans are made of."""
        return Planning(self.comparison, folder=self.settings.out, console=self.console)

    def best(self, candidates: Mapping[str, Method], found: Mapping[str, Settled]) -> str:
        """Returns the candidate with the lowest loss on calibration text after the closed forms."""
        if len(found) == 1:
            return next(iter(found))
        losses = {}
        for candidate, settled in found.items():
            model, params = candidates[candidate].convert(
                self.model, self.pretrained, settled.config, self.warm_start(distill_steps=0)
            )
            windows = self.comparison.calibration[:_SEARCH_WINDOWS]
            losses[candidate] = self.comparison.loss(model, params, windows)
            self.console.print(f"  candidate {candidate}: {losses[candidate]:.4f}")
        return min(losses, key=losses.__getitem__)

    def measure(
        self, name: str, method: Method, config: Any, times: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Converts, fine-tunes and evaluates one sized configuration."""
        start = self.warm_start(self.settings.distill_steps)
        model, params = method.convert(self.model, self.pretrained, config, start)
        converted = self.comparison.loss(model, params)
        tuned = self.comparison.tune(name, model, params)
        dense = self.report["dense"]
        check_comparable(name, tuned.conditions, "dense", Conditions(**dense["conditions"]))
        return {
            "config": config.to_dict(),
            "flops_ratio": method.flops_ratio(config),
            **times,
            "realised": times["speedup"] * method.flops_ratio(config),
            "converted_loss": converted,
            "loss": tuned.loss,
            "loss_gap": tuned.loss - dense["loss"],
            "conditions": dataclasses.asdict(tuned.conditions),
        }

    def warm_start(self, distill_steps: int) -> WarmStart:
        calibration = self.comparison.calibration[:, :-1]
        return WarmStart(calibration, distill_steps, EVALUATION_BATCH, self.settings.seed)

    def say(self, what: str) -> None:
        self.console.print(f"[bold]> {what}[/bold]")

    def save(self, training: str) -> None:
        """Writes the report, and drops the checkpoints of what it now holds."""
        records.write_json(self.path, self.report)
        shutil.rmtree(self.settings.out / "training" / training, ignore_errors=True)

    def finish(self) -> dict[str, Any]:
        points = [point for point in self.report["points"] if "loss" in point]
        picture = self.settings.out / "quality_at_equal_time.png"
        pictures.plot_methods(picture, points, self.report["dense"]["loss"])
        self.console.print(quality_table(self.report))
        self.console.print(f"The report and the picture are in {self.settings.out}/.")
        return self.report


def quality_table(results: Mapping[str, Any]) -> Table:
    """Returns the report of :func:`run_quality` as a table, by target and then by loss.

    Args:
      results: the report.
    """
    dense = results["dense"]
    table = Table(
        title=f"Loss at equal FFN time, nats a token; dense: {dense['loss']:.4f} fine-tuned",
        **pictures.NARROW_TABLE,
    )
    columns = ("target", "method", "measured", "FLOPs", "realised", "start", "tuned", "gap")
    for name in columns:
        is_name = name == "method"
        table.add_column(name, justify="left" if is_name else "right", no_wrap=is_name)
    points: Sequence[Mapping[str, Any]] = results["points"]
    for target in sorted({point["target"] for point in points}):
        here = [point for point in points if point["target"] == target]
        for point in sorted(here, key=lambda point: point.get("loss", np.inf)):
            cells = ["never"]
            if "loss" in point:
                cells = [
                    f"{point['speedup']:.2f}x",
                    f"{point['flops_ratio']:.3f}",
                    f"{point['realised']:.2f}",
                    f"{point['converted_loss']:.4f}",
                    f"{point['loss']:.4f}",
                    f"{point['loss_gap']:+.4f}",
                ]
            table.add_row(f"{target:g}x", point["method"], *cells)
        table.add_section()
    return table


def _folder(name: str, target: float) -> str:
    return f"{name}-{target:g}x"
