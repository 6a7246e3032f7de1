"""The command ``sparseffn plan``."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from sparseffn_jax.bench.clock import FFNClock, ModelClock
from sparseffn_jax.bench.pictures import plot_plan
from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.pretrained import Pretrained, load_pretrained
from sparseffn_jax.checkpoints.untrusted import read_json
from sparseffn_jax.commands.common import DTYPES, check_at_least, matching_tokenizer
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.measure.records import make_folder, versions, write_json
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.progress import counter, stage
from sparseffn_jax.sparsify.calibration import check_calibration
from sparseffn_jax.sparsify.fisher import output_fisher
from sparseffn_jax.sparsify.planning import (
    Grid,
    Planner,
    Size,
    config_of,
    estimate_layers,
    size_grid,
    size_of,
)
from sparseffn_jax.sparsify.planning import Plan as ModelPlan
from sparseffn_jax.train.data import STDLIB, load_windows

# A plan whose measured speed-up falls short of the one asked for by more than this is made again.
_TOLERANCE = 0.02
_MOST_TURNS = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """Choose what each layer's FFN becomes, so that a budget costs as little loss as possible.

    Give one of --flops, --ffn-speedup, --speedup and --max-loss. --out gets plan.json, which
    "convert --config" reads, and report.json and plan.png, which show what was chosen and why.

    Attributes:
      model: Folder, GGUF file or hub name of a dense model.
      out: Folder to write. It keeps the estimates too: the same command goes on where it
        stopped, and one with another budget starts from them.
      flops: FFN FLOPs of all layers over the dense ones.
      ffn_speedup: Speed-up of the FFNs, measured here.
      speedup: Speed-up of the whole model, measured here.
      max_loss: Predicted rise of the loss, in nats a token, at as few FLOPs as it allows.
      most_shapes: Number of different layers, dense ones included; default any number.
      narrow: Plan with narrower FFNs alone, without bypasses, to compare.
      trials: Conversions that show how much of a loss later layers repair.
      tokens: Tokens in the passes that are timed, rounded to whole windows.
      train: Time the FFNs' forward and backward pass together; only with --ffn-speedup.
      dtype: Of the computation that is timed.
      text: Calibration text; see "demo".
      calibration_tokens: Tokens of it to use.
      window: Tokens in a window; default the smaller of n_positions and 1024.
      batch_size: Windows computed at once.
      seed: Of the choice of windows.
    """

    model: str
    out: Path
    flops: float | None = None
    ffn_speedup: float | None = None
    speedup: float | None = None
    max_loss: float | None = None
    most_shapes: int | None = None
    narrow: bool = False
    trials: int = 1
    tokens: int = 1024
    train: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    text: str = STDLIB
    calibration_tokens: int = 32768
    window: int | None = None
    batch_size: int = 4
    seed: int = 0

    def run(self, console: Console) -> None:
        """Runs the command."""
        self._check()
        make_folder(self.out)
        with stage("loading the model", console):
            dense = load_pretrained(self.model)
            tokenizer = matching_tokenizer(self.model, dense)
        if any(dense.ffns):
            raise ValueError(f"{self.model} is sparse already: plan from the dense checkpoint")
        with stage("reading the text", console):
            window = check_window(self.window, dense.spec.n_positions)
            windows = load_windows(self.text, tokenizer, window).train
        order = np.random.default_rng(self.seed).permutation(len(windows))
        chosen = windows[order[: max(1, self.calibration_tokens // window)]]
        model, tokens = dense.model(), chosen[:, :-1]
        grid = size_grid(dense.spec)
        if self.narrow:
            grid = grid._replace(ranks=(0,))
        smallest = config_of(dense.spec, (grid.widths[-1], 0))
        check_calibration(model, [smallest], tokens)
        if self.flops is not None and self.flops < (least := _flops(smallest)):
            raise ValueError(
                f"flops={self.flops:g} is out of reach: the smallest layers have {least:.3g}"
            )
        with stage("measuring what the loss feels", console):
            fisher = output_fisher(model, dense.params, chosen)
        known = _Estimates(self.out / "estimates.json", fisher, grid)
        with counter("estimating layer", console) as count:
            rest = estimate_layers(
                model,
                dense.params,
                tokens,
                fisher,
                grid,
                batch_size=self.batch_size,
                first=len(known.damages),
            )
            for damages in rest:
                known.add(damages)
                count(len(known.damages), dense.spec.n_layer)
        planner = Planner(
            model, dense.params, tokens, fisher, known.damages, batch_size=self.batch_size
        )
        make, measure = self._budget(planner, dense, chosen, console)
        for _ in range(self.trials):
            with counter("trying out layer", console) as count:
                planner.try_out(make(1.0).configs, on_layer=count)
        plan, measured = self._met(make, measure, console)
        self._write(plan, measured, dense.spec, console)

    def _check(self) -> None:
        limits = ("flops", "ffn_speedup", "speedup", "max_loss")
        given = [name for name in limits if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join("--" + name.replace("_", "-") for name in limits)
            raise ValueError(f"give one of {names}: {len(given)} are given")
        if not (value := getattr(self, given[0])) > 0.0:
            raise ValueError(f"{given[0]}={value} must be above 0")
        for name in ("ffn_speedup", "speedup"):
            if (value := getattr(self, name)) is not None and value < 1.0:
                raise ValueError(f"{name}={value} must be 1 or more")
        if self.train and self.ffn_speedup is None:
            raise ValueError("--train says which passes are timed: it needs --ffn-speedup")
        for name in ("calibration_tokens", "batch_size", "tokens"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("trials", self.trials, 0)
        if self.most_shapes is not None:
            check_at_least("most_shapes", self.most_shapes, 1)

    def _budget(
        self, planner: Planner, dense: Pretrained, windows: np.ndarray, console: Console
    ) -> tuple[Callable[[float], ModelPlan], Callable[[ModelPlan], dict[str, float]] | None]:
        """Returns what makes a plan, given how far to aim, and what measures it, if it is timed."""
        n_layer = dense.spec.n_layer
        choose = functools.partial(planner.plan, most_shapes=self.most_shapes)
        if self.max_loss is not None:
            return lambda _: choose(_flops, most_damage=self.max_loss), None
        if (flops := self.flops) is not None:
            return lambda _: choose(_flops, budget=flops * n_layer), None
        model = dense.model(DTYPES[self.dtype])
        count = max(1, self.tokens // (windows.shape[1] - 1))
        clock = FFNClock(model, count * (windows.shape[1] - 1), train=self.train)
        with counter("timing size", console) as counted:
            for i, config in enumerate(planner.configs):
                clock.ratio(config)
                counted(i + 1, len(planner.configs))
        if (target := self.ffn_speedup) is not None:
            return (
                lambda aim: choose(clock.ratio, budget=n_layer / (aim * target)),
                lambda plan: {"ffn_speedup": clock.speedup(plan.configs)},
            )
        whole, speedup = ModelClock(model, dense.params, windows[:count], clock), self.speedup
        assert speedup is not None
        return (
            lambda aim: choose(clock.ratio, budget=whole.ffn_budget(aim * speedup)),
            lambda plan: {
                "speedup": whole.speedup(plan.configs),
                "ffn_speedup": clock.speedup(plan.configs),
            },
        )

    def _met(
        self,
        make: Callable[[float], ModelPlan],
        measure: Callable[[ModelPlan], dict[str, float]] | None,
        console: Console,
    ) -> tuple[ModelPlan, dict[str, float]]:
        """Makes the plan, and makes it again for more as long as the clock shows too little."""
        target = self.speedup or self.ffn_speedup
        if measure is None or target is None:
            return make(1.0), {}
        aim, name = 1.0, "ffn_speedup" if self.speedup is None else "speedup"
        for _ in range(_MOST_TURNS):
            plan = make(aim)
            with stage("measuring the plan", console):
                measured = measure(plan)
            if measured[name] >= target * (1.0 - _TOLERANCE):
                return plan, measured
            console.print(f"measured {measured[name]:.2f}x of {target:.2f}x: planning for more")
            aim *= target / measured[name]
        raise ValueError(
            f"{name}={target:g} was not reached in {_MOST_TURNS} plans: the clock is unsteady, or "
            "the target is out of reach"
        )

    def _write(
        self, plan: ModelPlan, measured: dict[str, float], spec: DecoderSpec, console: Console
    ) -> None:
        layers = [None if config is None else config.to_dict() for config in plan.configs]
        (self.out / "plan.json").write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
        rows = [
            {
                "layer": i,
                "width": size[0],
                "rank": size[1],
                "flops": _flops(candidate.config),
                "damage": candidate.damage,
            }
            for i, candidate in enumerate(plan.layers)
            for size in [size_of(candidate.config, spec)]
        ]
        settings = {
            field.name: value if isinstance(value, int | float | None) else str(value)
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }
        flops = float(np.mean([row["flops"] for row in rows]))
        totals = {"flops": flops, "predicted_damage": plan.damage, **measured}
        report = {"settings": settings, "versions": versions(), "totals": totals, "layers": rows}
        write_json(self.out / "report.json", report)
        plot_plan(self.out / "plan.png", rows)
        table = Table(title=f"{self.model}: FFN FLOPs {flops:.3f} of the dense ones")
        for name in ("layer", "units", "bypass rank", "FLOPs", "predicted loss"):
            table.add_column(name, justify="right")
        for row in rows:
            units = "dense" if row["flops"] == 1.0 else str(row["width"])
            table.add_row(
                str(row["layer"]),
                units,
                str(row["rank"] or ""),
                f"{row['flops']:.3f}",
                f"{row['damage']:+.4f}",
            )
        table.caption = ", ".join(f"{name.replace('_', ' ')} {x:.3f}" for name, x in totals.items())
        console.print(table)
        console.print(f"wrote {self.out}; convert by it: --config {self.out / 'plan.json'}")


class _Estimates:
    """The damages of the layers so far, in a file that belongs to one model, text and grid."""

    def __init__(self, path: Path, fisher: Sequence[np.ndarray], grid: Grid):
        self._path = path
        digest = hashlib.sha256(b"".join(matrix.tobytes() for matrix in fisher)).hexdigest()
        self._of = {"fisher": digest, "grid": [list(sizes) for sizes in grid]}
        self.damages: list[dict[Size, float]] = []
        try:
            stored = read_json(path)
            if stored["of"] == self._of:
                self.damages = [{(w, r): x for w, r, x in layer} for layer in stored["damages"]]
        except (FileNotFoundError, CheckpointError, KeyError, TypeError, ValueError):
            # Nothing is lost but the time to estimate again.
            self.damages = []

    def add(self, damages: dict[Size, float]) -> None:
        """Adds the next layer's damages, to the file too."""
        self.damages.append(damages)
        rows = [[[*size, x] for size, x in layer.items()] for layer in self.damages]
        write_json(self._path, {"of": self._of, "damages": rows})


def _flops(config: SparseFFNConfig | None) -> float:
    return 1.0 if config is None else flops_ratio(config)
