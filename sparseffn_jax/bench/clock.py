"""What FFNs cost on this machine's clock: the prices that a plan is made with."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from scipy.optimize import nnls

from sparseffn_jax.bench.stacks import Stack, ffn_stack, fresh_ffns, time_stacks
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.evaluate.losses import make_evaluator
from sparseffn_jax.measure.programs import Program, read_program
from sparseffn_jax.measure.timing import PairedTimes, time_in_turn, time_pair
from sparseffn_jax.models.decoder import Decoder, layers_of, replace_ffns
from sparseffn_jax.sparsify.planning import Size, size_of
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.step import init_state, make_stage, make_step
from sparseffn_jax.train.strategies import STEP_SCALARS

# Layers in one program: so many that their weights leave the caches between two of its runs.
_LAYERS = 6
# Number of widths beside which each rank of a bypass is timed.
_WIDTHS_A_RANK = 3
# Short programs run more often: for so many seconds in all, as far as ``time_in_turn`` allows.
_LEAST_SECONDS = 2.0


class FFNClock:
    """Measures what a layer takes; each configuration once, in turn with the dense FFN.

    Args:
      model: a decoder whose layers are all dense, in the precision to measure in.
      tokens: rows of activations.
      train: whether to measure forward and backward pass together instead of the forward pass.
      repeats: runs of each program, at least; medians count.
    """

    def __init__(self, model: Decoder, tokens: int, *, train: bool = False, repeats: int = 5):
        self._model, self._train, self._repeats = model, train, repeats
        shape = tokens, model.spec.d_model
        self._x = jax.random.normal(jax.random.key(0), shape, model.dtype)
        self._dense = self._stack((), _LAYERS)
        self._pairs: dict[SparseFFNConfig, PairedTimes] = {}

    def pair(self, config: SparseFFNConfig) -> PairedTimes:
        """Returns the times of dense FFNs, and those of as many layers of a configuration.

        Args:
          config: configuration of the layers.
        """
        if config not in self._pairs:
            stacks = self._dense, self._stack((config,) * self._model.spec.n_layer, _LAYERS)
            self._pairs[config] = self._timed(*stacks, self._repeats)
        return self._pairs[config]

    def prices(
        self,
        configs: Sequence[SparseFFNConfig | None],
        on_size: Callable[[int, int], None] | None = None,
    ) -> dict[SparseFFNConfig | None, float]:
        """Returns the time of each layer over that of the dense FFN.

        Every width is timed without a bypass, and every rank beside a few widths. The prices are
        free of most of the clock's noise (:func:`smooth_prices`), because a plan would otherwise be
        drawn to the sizes whose times came out too low.

        Args:
          configs: layers of a core beside a bypass; ``None`` stands for the dense FFN.
          on_size: function that is called with the numbers of sizes timed and to be timed.
        """
        spec = self._model.spec
        of_size = {size_of(config, spec): config for config in configs if config is not None}
        timed, measured = _sizes_to_time(list(of_size)), {}
        for i, size in enumerate(timed):
            measured[size] = self.pair(of_size[size])
            if on_size is not None:
                on_size(i + 1, len(timed))
        smooth = smooth_prices(measured, list(of_size))
        return {None: 1.0} | {of_size[size]: price for size, price in smooth.items()}

    def dense_seconds(self) -> float:
        """Returns what one dense FFN takes, in seconds."""
        how = {"repeats": self._repeats, "least_seconds": _LEAST_SECONDS}
        (times,) = time_in_turn([lambda: self._dense(self._x)], **how)
        return float(np.median(times)) / min(_LAYERS, self._model.spec.n_layer)

    def speedup(self, configs: Sequence[SparseFFNConfig | None]) -> float:
        """Returns the speed-up of all layers' FFNs together.

        Args:
          configs: the configuration of each layer.
        """
        stacks = self._stack(()), self._stack(tuple(configs))
        return self._timed(*stacks, 2 * self._repeats).speedup

    def _timed(self, baseline: Stack, candidate: Stack, repeats: int) -> PairedTimes:
        how = {"repeats": repeats, "least_seconds": _LEAST_SECONDS}
        return time_stacks(baseline, candidate, self._x, **how)

    def _stack(
        self, configs: tuple[SparseFFNConfig | None, ...], count: int | None = None
    ) -> Stack:
        model = self._model.clone(ffns=configs)
        return ffn_stack(model, fresh_ffns(model, count=count), train=self._train)


def _sizes_to_time(sizes: Sequence[Size]) -> list[Size]:
    """Returns all sizes without a bypass, and for each rank some, narrow to wide."""
    chosen = []
    for rank in sorted({rank for _, rank in sizes}):
        widths = sorted(width for width, other in sizes if other == rank)
        places = np.linspace(0, len(widths) - 1, _WIDTHS_A_RANK).round().astype(int)
        some = widths if rank == 0 else [widths[i] for i in np.unique(places)]
        chosen += [(width, rank) for width in some]
    return chosen


def smooth_prices(measured: Mapping[Size, PairedTimes], sizes: Sequence[Size]) -> dict[Size, float]:
    """Returns the time of each size over the dense FFN's, without most of the clock's noise.

    All times together give a line: the price of a start, of so many units, of having a bypass, and
    of so many components of it, none of which is negative. Some widths suit a machine better than
    the line says; what each was measured off the line counts by the share of it that is not noise,
    as the times themselves tell (empirical Bayes, as Efron and Morris 1975). On a CPU 384 of 1,024
    units took 0.40 of the dense FFN's time and 288 took 0.27; of SmolLM2's widths none stands out.
    There the scatter within a measurement, 3 %, was also that between two of them.

    Args:
      measured: times of some sizes.
      sizes: the sizes whose prices are wanted.
    """

    def terms(size: Size) -> list[float]:
        width, rank = size
        return [1.0, width, rank > 0, rank]

    times = {size: 1.0 / pair.speedup for size, pair in measured.items()}
    rows = np.array([terms(size) for size in times]) / np.array(list(times.values()))[:, None]
    weights, _ = nnls(rows, np.ones(len(rows)))
    line = {size: float(weights @ terms(size)) for size in {*sizes, *measured}}
    alone = [size for size in measured if not size[1]]
    off = np.array([times[size] - line[size] for size in alone])
    scale = np.array([line[size] for size in alone])
    noise = np.square([measured[size].relative_error for size in alone])
    true = max(0.0, float(np.sum((off / scale) ** 2 - noise))) / max(len(alone), 1)
    trusted = true / np.maximum(true + noise, np.finfo(float).tiny)
    steps = dict(zip((width for width, _ in alone), trusted * off, strict=True))
    return {size: line[size] + steps.get(size[0], 0.0) for size in sizes}


def step_config(batch_size: int) -> TrainConfig:
    """Returns the settings of the training step that is timed: all parameters, AdamW."""
    return TrainConfig(steps=1000, batch_size=batch_size, recipe="full")


class TrainingStep:
    """A model's training step of all parameters, compiled.

    Args:
      model: a decoder.
      batch_size: windows in a batch.
      window: tokens in a window.

    Attributes:
      compile_seconds: how long it took to trace and compile the step.
    """

    def __init__(self, model: Decoder, batch_size: int, window: int):
        config = step_config(batch_size)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))[
            "params"
        ]
        self._stage = make_stage(config, params, 0)
        state, frozen = jax.eval_shape(lambda p: init_state(self._stage, p), params)
        batch = jax.ShapeDtypeStruct((batch_size, window + 1), jnp.int32)
        step = make_step(model, self._stage, config)
        started = time.perf_counter()
        self._run = step.lower(state, frozen, None, batch, *STEP_SCALARS).compile()
        self.compile_seconds = time.perf_counter() - started

    @property
    def program(self) -> Program:
        """What the compiled step consists of."""
        return read_program(self._run)

    def on(self, params: Any, windows: Int[np.ndarray, "n w"]) -> Callable[[], Any]:
        """Returns a function that makes the next step from these parameters on."""
        state, frozen = init_state(self._stage, params)

        def run() -> Any:
            nonlocal state
            # The state is donated: each step goes on from the one before.
            state, metrics = self._run(state, frozen, None, windows, *STEP_SCALARS)
            return metrics

        return run


class FFNShare:
    """What part FFNs have in the time of a whole model.

    Args:
      n_layer: number of FFNs.
      whole: the dense model's time over that of one dense FFN.
    """

    def __init__(self, n_layer: int, whole: float):
        self._n_layer, self._whole = n_layer, whole

    def ffn_budget(self, speedup: float) -> float:
        """Returns what all FFNs may take for a speed-up of the model; one dense FFN takes 1.

        Args:
          speedup: time of the dense model over that of the sparse one.
        """
        return self._n_layer - self._whole * (1.0 - 1.0 / speedup)


class ModelClock(FFNShare):
    """Measures what a whole model takes to evaluate some text, or for a training step on it.

    Args:
      model: a decoder whose layers are all dense, in the precision to measure in.
      params: its parameters.
      windows: token ids (n, t + 1), which make one batch.
      clock: measures FFNs on equally many tokens, and in the same passes.
      train: whether to measure a training step of all parameters instead of the evaluation.
      repeats: runs of each program; medians count.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        windows: Int[np.ndarray, "n w"],
        clock: FFNClock,
        *,
        train: bool = False,
        repeats: int = 5,
    ):
        self._model, self._params, self._windows = model, params, windows
        self._train, self._repeats = train, repeats
        self._dense = self._run(model, params)
        (times,) = time_in_turn([self._dense], repeats=repeats, least_seconds=_LEAST_SECONDS)
        super().__init__(model.spec.n_layer, float(np.median(times)) / clock.dense_seconds())

    def speedup(self, configs: Sequence[SparseFFNConfig | None]) -> float:
        """Returns the speed-up of the whole model.

        Args:
          configs: the configuration of each layer.
        """
        model = self._model.clone(ffns=tuple(configs))
        fresh = layers_of(model, fresh_ffns(model))
        ffns = {i: fresh[i]["mlp"] for i, config in enumerate(configs) if config is not None}
        sparse = self._run(model, replace_ffns(model, self._params, ffns))
        how = {"repeats": 2 * self._repeats, "least_seconds": _LEAST_SECONDS}
        return time_pair(self._dense, sparse, **how).speedup

    def _run(self, model: Decoder, params: Any) -> Callable[[], Any]:
        if self._train:
            count, length = self._windows.shape
            return TrainingStep(model, count, length - 1).on(params, self._windows)
        evaluate, params = make_evaluator(model), jax.device_put(params)
        return lambda: evaluate(params, self._windows, len(self._windows))
