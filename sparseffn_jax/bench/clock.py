"""What FFNs cost on this machine's clock: the prices that a plan is made with."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from sparseffn_jax.bench.stacks import Stack, ffn_stack, fresh_ffns, time_stacks
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.evaluate.losses import make_evaluator
from sparseffn_jax.measure.timing import time_in_turn, time_pair
from sparseffn_jax.models.decoder import Decoder, layers_of, replace_ffns

# Layers in one program: so many that their weights leave the caches between two of its runs.
_LAYERS = 6


class FFNClock:
    """Measures what a layer takes; each configuration once, in turn with the dense FFN.

    Args:
      model: a decoder whose layers are all dense, in the precision to measure in.
      tokens: rows of activations.
      train: whether to measure forward and backward pass together instead of the forward pass.
      repeats: runs of each program; medians count.
    """

    def __init__(self, model: Decoder, tokens: int, *, train: bool = False, repeats: int = 5):
        self._model, self._train, self._repeats = model, train, repeats
        shape = tokens, model.spec.d_model
        self._x = jax.random.normal(jax.random.key(0), shape, model.dtype)
        self._dense = self._stack((), _LAYERS)
        self._ratios: dict[SparseFFNConfig | None, float] = {None: 1.0}

    def ratio(self, config: SparseFFNConfig | None) -> float:
        """Returns the time of a layer over that of the dense FFN.

        Args:
          config: configuration of the layer; ``None`` stands for the dense FFN.
        """
        if config not in self._ratios:
            sparse = self._stack((config,) * self._model.spec.n_layer, _LAYERS)
            pair = time_stacks(self._dense, sparse, self._x, repeats=self._repeats)
            self._ratios[config] = 1.0 / pair.speedup
        return self._ratios[config]

    def dense_seconds(self) -> float:
        """Returns what one dense FFN takes, in seconds."""
        (times,) = time_in_turn([lambda: self._dense(self._x)], repeats=self._repeats)
        return float(np.median(times)) / min(_LAYERS, self._model.spec.n_layer)

    def speedup(self, configs: Sequence[SparseFFNConfig | None]) -> float:
        """Returns the speed-up of all layers' FFNs together.

        Args:
          configs: the configuration of each layer.
        """
        stacks = self._stack(()), self._stack(tuple(configs))
        return time_stacks(*stacks, self._x, repeats=2 * self._repeats).speedup

    def _stack(
        self, configs: tuple[SparseFFNConfig | None, ...], count: int | None = None
    ) -> Stack:
        model = self._model.clone(ffns=configs)
        return ffn_stack(model, fresh_ffns(model, count=count), train=self._train)


class ModelClock:
    """Measures what a whole model takes to evaluate some text.

    Args:
      model: a decoder whose layers are all dense, in the precision to measure in.
      params: its parameters.
      windows: token ids (n, t + 1), which are evaluated at once.
      clock: measures FFNs on equally many tokens.
      repeats: runs of each program; medians count.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        windows: Int[np.ndarray, "n w"],
        clock: FFNClock,
        *,
        repeats: int = 5,
    ):
        self._model, self._params, self._windows = model, params, windows
        self._repeats = repeats
        self._dense = self._run(model, params)
        (times,) = time_in_turn([self._dense], repeats=repeats)
        # In units of what one dense FFN takes.
        self._whole = float(np.median(times)) / clock.dense_seconds()

    def ffn_budget(self, speedup: float) -> float:
        """Returns what all FFNs may take for a speed-up of the model; one dense FFN takes 1.

        Args:
          speedup: time of the dense model over that of the sparse one.

        Raises:
          ValueError: if what is no FFN takes too long for it.
        """
        budget = self._model.spec.n_layer - self._whole * (1.0 - 1.0 / speedup)
        if budget <= 0.0:
            most = self._whole / (self._whole - self._model.spec.n_layer)
            raise ValueError(
                f"speedup={speedup:g} is out of reach: without any FFN the model would be "
                f"{most:.2f} times as fast"
            )
        return budget

    def speedup(self, configs: Sequence[SparseFFNConfig | None]) -> float:
        """Returns the speed-up of the whole model.

        Args:
          configs: the configuration of each layer.
        """
        model = self._model.clone(ffns=tuple(configs))
        fresh = layers_of(model, fresh_ffns(model))
        ffns = {i: fresh[i]["mlp"] for i, config in enumerate(configs) if config is not None}
        sparse = self._run(model, replace_ffns(model, self._params, ffns))
        return time_pair(self._dense, sparse, repeats=2 * self._repeats).speedup

    def _run(self, model: Decoder, params: Any) -> Callable[[], Any]:
        evaluate, params = make_evaluator(model), jax.device_put(params)
        return lambda: evaluate(params, self._windows, len(self._windows))
