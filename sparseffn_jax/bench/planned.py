"""A plan as one of the methods that are compared: each layer has its own size."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from sparseffn_jax.bench.clock import FFNClock
from sparseffn_jax.bench.comparison import EVALUATION_BATCH, Comparison
from sparseffn_jax.bench.peers import Params, WarmStart
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.measure import costs
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.progress import counter, stage
from sparseffn_jax.sparsify.estimates import kept_estimates
from sparseffn_jax.sparsify.fisher import fisher_windows, output_fisher
from sparseffn_jax.sparsify.planning import (
    Plan,
    Planner,
    candidates,
    config_of,
    size_grid,
)
from sparseffn_jax.sparsify.trials import try_out_best


@dataclasses.dataclass(frozen=True)
class Planned:
    """Layers of different sizes, by a plan with prices of this machine's clock.

    Attributes:
      narrow: whether the plan may choose widths alone, without bypasses.
    """

    narrow: bool = False


class PlannedConfigs(NamedTuple):
    """What each layer becomes.

    Attributes:
      layers: the configuration of each layer; ``None`` keeps it dense.
    """

    layers: tuple[SparseFFNConfig | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``convert --config`` reads, under ``layers``."""
        return {"layers": [None if x is None else x.to_dict() for x in self.layers]}


class Planning:
    """What all plans for one model have in common: prices and damages, measured when first needed.

    Args:
      comparison: the dense model, its calibration text, and the tokens that FFNs are timed on.
      folder: where the estimates are kept.
      console: shows progress.
    """

    def __init__(self, comparison: Comparison, *, folder: Path, console: Console):
        self._model, self._params = comparison.model, comparison.dense.params
        self._windows, self._timed_tokens = comparison.calibration, comparison.timed_tokens
        self._folder, self._console = folder, console
        self._grid = size_grid(self._model.spec)

    @functools.cached_property
    def prices(self) -> dict[SparseFFNConfig | None, float]:
        """The time of each layer over that of the dense FFN."""
        spec = self._model.spec
        configs = [config_of(spec, size) for size in candidates(spec, self._grid)]
        with counter("timing size", self._console) as count:
            return FFNClock(self._model, self._timed_tokens).prices(configs, count)

    def planner(self) -> Planner:
        """Returns a planner that has not tried anything out."""
        args = self._model, self._params, self._windows[:, :-1], self._fisher, self._damages
        return Planner(*args, batch_size=EVALUATION_BATCH)

    @functools.cached_property
    def _fisher(self) -> list[np.ndarray]:
        with stage("measuring what the loss feels", self._console):
            windows = fisher_windows(self._windows, self._model.spec.d_model)
            return output_fisher(self._model, self._params, windows)

    @functools.cached_property
    def _damages(self) -> list[dict[tuple[int, int], float]]:
        with counter("estimating layer", self._console) as count:
            return kept_estimates(
                self._folder / "estimates.json",
                self._model,
                self._params,
                self._windows[:, :-1],
                self._fisher,
                self._grid,
                batch_size=EVALUATION_BATCH,
                on_layer=count,
            )


class PlannedMethod:
    """Plans as a :class:`~sparseffn_jax.bench.peers.Method`, whose budget is the clock's time.

    Args:
      planning: prices and damages.
      target: speed-up of the FFNs for which a trial conversion shows what is repaired.
      narrow: whether plans may choose widths alone.
      console: shows progress.
    """

    def __init__(self, planning: Planning, target: float, *, narrow: bool, console: Console):
        self._prices, planner = planning.prices, planning.planner()
        alone = planner.without_bypasses()
        # Prices may be a little too high: what is fastest by them is tried out at least.
        share = max(1.0 / target, min(self._prices.values()))
        with counter("trying out layer", console) as count:
            self._planner = try_out_best(
                [alone] if narrow else [planner, alone],
                lambda planner: self._plan_by(planner, share),
                on_layer=count,
            )

    def size(self, spec: DecoderSpec, flops_ratio: float) -> PlannedConfigs:
        """Returns the best plan within a share of the dense FFNs' time.

        Raises:
          ValueError: if there is none.
        """
        del spec
        return PlannedConfigs(self._plan_by(self._planner, flops_ratio).configs)

    def flops_ratio(self, config: PlannedConfigs) -> float:
        """Returns the mean of the layers' floating-point operations over the dense FFN's."""
        return costs.mean_flops_ratio(config.layers)

    def ffns(self, config: PlannedConfigs, n_layer: int) -> tuple[SparseFFNConfig | None, ...]:
        """Returns the configurations."""
        del n_layer
        return config.layers

    def convert(
        self, model: Decoder, params: Params, config: PlannedConfigs, start: WarmStart
    ) -> tuple[Decoder, Params]:
        """Calls :func:`sparsify`."""
        return start.sparsify(model, params, config.layers)

    def _plan_by(self, planner: Planner, share: float) -> Plan:
        return planner.plan(self._prices.__getitem__, budget=share * len(planner.weights))
