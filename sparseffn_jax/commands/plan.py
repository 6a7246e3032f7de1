"""The command ``sparseffn plan``."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from sparseffn_jax.bench.clock import FFNClock, ModelClock
from sparseffn_jax.bench.estimated import EstimatedFFNClock, known_gpu
from sparseffn_jax.bench.estimated_model import EstimatedModelClock
from sparseffn_jax.bench.pictures import plot_layers
from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.pretrained import Pretrained, load_pretrained
from sparseffn_jax.checkpoints.untrusted import read_json
from sparseffn_jax.commands.arguments.plan import PlanArguments
from sparseffn_jax.commands.common import DTYPES, matching_tokenizer, read_windows
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.measure.costs import flops_ratio, parameters_ratio
from sparseffn_jax.measure.records import make_folder, versions, write_json
from sparseffn_jax.models.families import gguf_layout
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.progress import counter, stage
from sparseffn_jax.sparsify.calibration import check_calibration
from sparseffn_jax.sparsify.estimates import kept_estimates
from sparseffn_jax.sparsify.fisher import fisher_windows, output_fisher
from sparseffn_jax.sparsify.planning import Plan as ModelPlan
from sparseffn_jax.sparsify.planning import (
    Planner,
    Size,
    as_served,
    candidates,
    config_of,
    size_grid,
    size_of,
)
from sparseffn_jax.sparsify.trials import try_out_best
from sparseffn_jax.train.data import TextCounts

# A plan whose measured speed-up falls short of the one asked for by more than the first share, or
# exceeds it by more than the second, is made again.
_SHORT, _BEYOND = 0.02, 0.05
_MOST_TURNS = 4
# Whether even the smallest layers are fast enough is measured where, by their prices, they take
# more than this share of the time that the FFNs may take. What is left for FFNs is a difference of
# two large times: for SmolLM2 at 1.6x their share was below 0.8, and plans had 1.47x at most.
_CLOSE = 0.5


class Plan(PlanArguments):
    """Makes a plan of what each layer's FFN becomes."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        if self.budget.device is not None:
            # Without the compiler it is refused here, before anything is read.
            known_gpu(self.budget.device).devices()
        make_folder(self.out)
        with stage("loading the model", console):
            dense = load_pretrained(self.model)
            tokenizer = matching_tokenizer(self.model, dense)
        if any(dense.ffns):
            raise ValueError(f"{self.model} is sparse already: plan from the dense checkpoint")
        read, counts = read_windows(self, tokenizer, dense.spec.n_positions, console)
        windows, window = read.train, read.train.shape[1] - 1
        order = np.random.default_rng(self.seed).permutation(len(windows))
        chosen = windows[order[: max(1, self.calibration_tokens // window)]]
        model, tokens = dense.model(), chosen[:, :-1]
        grid = size_grid(dense.spec)
        if self.narrow:
            grid = grid._replace(ranks=(0,))
        smallest = config_of(dense.spec, (grid.widths[-1], 0))
        check_calibration(model, [smallest], tokens)
        sizes = candidates(dense.spec, grid, servable=self.servable)
        prices = self._prices(sizes, dense, chosen, console)
        with stage("measuring what the loss feels", console):
            fisher = output_fisher(model, dense.params, fisher_windows(chosen, dense.spec.d_model))
        with counter("estimating layer", console) as count:
            damages = kept_estimates(
                self.out / "estimates.json",
                model,
                dense.params,
                tokens,
                fisher,
                grid,
                batch_size=self.batch_size,
                on_layer=count,
            )
        damages = [{size: layer[size] for size in sizes} for layer in damages]
        planner = Planner(model, dense.params, tokens, fisher, damages, batch_size=self.batch_size)
        layout, most_shapes = gguf_layout(type(model)), self.most_shapes
        if self.servable and (layout is None or layout.per_layer is None):
            most_shapes = 1

        _, target = self.budget.speedup_wanted or ("", 1.0)

        def plan_by(planner: Planner, aim: float = target) -> ModelPlan:
            limits = prices.limits(aim)
            return planner.plan(prices.cost, most_shapes=most_shapes, **limits)

        if self.trials and self.repair:
            planners = [planner] if self.narrow else [planner, planner.without_bypasses()]
            how = {"trials": self.trials, "repair": self.repair}
            with counter("trying out layer", console) as count:
                planner = try_out_best(planners, plan_by, **how, on_layer=count)

        make = functools.partial(plan_by, planner)
        if prices.measure is None:
            plan, measured = make(target), {}
        else:
            plan, measured = self._met(make, prices.measure, console)
        self._write(plan, measured, dense.spec, counts, console)

    @property
    def plan_file(self) -> Path:
        """The file that the plan is written to: what each layer becomes."""
        return self.out / "plan.json"

    @property
    def is_made(self) -> bool:
        """Whether the folder holds a plan with these settings."""
        try:
            made = read_json(self.out / "report.json").get("settings")
        except CheckpointError:
            return False
        return made == self.settings and self.plan_file.exists()

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, in a form fit for JSON."""
        return dataclasses.asdict(self) | {"out": str(self.out)}

    def card_rows(self) -> list[tuple[str, str]]:
        """Returns what a model's card says of the plan that was made, as pairs of text."""
        report = read_json(self.out / "report.json")
        totals, budget = report["totals"], self.budget
        rows = [
            ("planned for", ", ".join(f"{name}={limit:g}" for name, limit in budget.given.items())),
            ("predicted loss of the plan", f"{totals['predicted_damage']:+.4f} nats a token"),
        ]
        if (wanted := budget.speedup_wanted) is not None:
            how = f"estimated for {budget.device}, not measured"
            if budget.device is None:
                versions = report["versions"]
                how = f"measured on {versions['device']}, {versions['cpu_count']} CPUs"
            rows.append(
                (
                    f"{wanted[0].replace('_', ' ')} of the plan, dense = 1",
                    f"{totals[wanted[0]]:.2f}x, {budget.timed_pass} of {budget.timed_tokens} "
                    f"tokens in {budget.timed_dtype}, {how}",
                )
            )
        return rows

    def _prices(
        self, sizes: Sequence[Size], dense: Pretrained, windows: np.ndarray, console: Console
    ) -> "_Prices":
        ((name, limit),) = self.budget.given.items()
        spec, run_as = dense.spec, self._run_as(dense.spec)
        configs = [run_as(config_of(spec, size)) for size in sizes]
        if name == "max_loss":
            return _Prices(lambda config: _flops(run_as(config)), lambda _: {"most_damage": limit})
        if self.budget.speedup_wanted is None:
            share = _flops if name == "flops" else _parameters
            if limit < (least := min(map(share, configs))):
                raise ValueError(
                    f"{name}={limit:g} is out of reach: the smallest layers have {least:.3g}"
                )
            total = limit * spec.n_layer
            return _Prices(lambda config: share(run_as(config)), lambda _: {"budget": total})
        model = dense.model(DTYPES[self.budget.timed_dtype])
        length, train = windows.shape[1] - 1, self.budget.timed_pass == "training"
        batch = windows[: max(1, self.budget.timed_tokens // length)]
        tokens = len(batch) * length
        if self.budget.device is None:
            clock, timing = FFNClock(model, tokens, train=train), "timing"
            args = model, dense.params, batch, clock
            time_model = functools.partial(ModelClock, *args, train=train)
        else:
            gpu = known_gpu(self.budget.device)
            clock, timing = EstimatedFFNClock(model, tokens, gpu, train=train), "compiling"
            args = model, len(batch), length, clock, gpu
            time_model = functools.partial(EstimatedModelClock, *args, train=train)
        with counter(f"{timing} size", console) as count:
            prices = clock.prices(configs, count)
        smallest = (min(configs, key=prices.__getitem__),) * spec.n_layer
        least = spec.n_layer * prices[smallest[0]]
        if name == "ffn_speedup":
            speedup, budget = clock.speedup, lambda aim: spec.n_layer / aim
        else:
            with stage(f"{timing} the model", console):
                whole = time_model()
            speedup, budget = whole.speedup, whole.ffn_budget
        if least > _CLOSE * budget(limit):
            with stage(f"{timing} the smallest layers", console):
                most = speedup(smallest)
            if limit * (1.0 - _SHORT) > most:
                raise ValueError(
                    f"{name}={limit:g} is out of reach: with the smallest layers it is {most:.2f}"
                )
        return _Prices(
            lambda config: prices[run_as(config)],
            lambda aim: {"budget": max(budget(aim), least)},
            lambda plan: {name: speedup(tuple(map(run_as, plan.configs)))},
        )

    def _run_as(self, spec: DecoderSpec) -> Callable[[Any], SparseFFNConfig | None]:
        """Returns the function from a layer's configuration to that of what is to run."""
        return functools.partial(as_served, spec=spec) if self.servable else lambda config: config

    def _met(
        self,
        make: Callable[[float], ModelPlan],
        measure: Callable[[ModelPlan], dict[str, float]],
        console: Console,
    ) -> tuple[ModelPlan, dict[str, float]]:
        """Makes plans until one is about as fast as is wanted, and takes the best fast one."""
        assert self.budget.speedup_wanted is not None
        name, target = self.budget.speedup_wanted
        aim, best, last = target, None, None
        for _ in range(_MOST_TURNS):
            plan = make(aim)
            if plan == last:
                break
            with stage("checking the plan", console):
                measured = measure(plan)
            reached, last = measured[name], plan
            how = "measured" if self.budget.device is None else "estimated"
            console.print(f"{how} {reached:.2f}x of {target:.2f}x")
            if reached >= target * (1.0 - _SHORT):
                if best is None or plan.damage < best[0].damage:
                    best = plan, measured
                if reached <= target * (1.0 + _BEYOND):
                    break
            aim = max(1.0, aim * target / reached)
        if best is None:
            raise ValueError(
                f"{name}={target:g} was not reached by any plan: the clock is unsteady, or the "
                "target is at the edge of what is possible"
            )
        return best

    def _write(
        self,
        plan: ModelPlan,
        measured: dict[str, float],
        spec: DecoderSpec,
        counts: TextCounts,
        console: Console,
    ) -> None:
        # The report says that there is a whole plan with its settings: the old one goes first, and
        # the new one comes last.
        report_file = self.out / "report.json"
        report_file.unlink(missing_ok=True)
        layers = [None if config is None else config.to_dict() for config in plan.configs]
        write_json(self.plan_file, layers)
        run_as = self._run_as(spec)
        rows = [
            {
                "layer": i,
                "width": size[0],
                "rank": size[1],
                "flops": _flops(run_as(candidate.config)),
                "damage": candidate.damage,
            }
            for i, candidate in enumerate(plan.layers)
            for size in [size_of(candidate.config, spec)]
        ]
        flops = float(np.mean([row["flops"] for row in rows]))
        totals = {"flops": flops, "predicted_damage": plan.damage, **measured}
        report = {
            "settings": self.settings,
            "versions": versions(),
            "text_counts": dataclasses.asdict(counts),
            "totals": totals,
            "layers": rows,
        }
        title = "What the plan keeps of each layer, and what that costs"
        plot_layers(self.out / "plan.png", rows, title)
        write_json(report_file, report)
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
        console.print(f"wrote {self.out}; convert by it: --config {self.plan_file}")


class _Prices(NamedTuple):
    """What plans are made and measured with.

    Attributes:
      cost: what a layer costs.
      limits: limits of a plan that aims at a speed-up; the argument is unused where none is wanted.
      measure: measures speed-ups of a plan, by name; ``None`` if nothing is timed.
    """

    cost: Callable[[SparseFFNConfig | None], float]
    limits: Callable[[float], dict[str, float]]
    measure: Callable[[ModelPlan], dict[str, float]] | None = None


def _parameters(config: SparseFFNConfig | None) -> float:
    return 1.0 if config is None else parameters_ratio(config)


def _flops(config: SparseFFNConfig | None) -> float:
    return 1.0 if config is None else flops_ratio(config)
