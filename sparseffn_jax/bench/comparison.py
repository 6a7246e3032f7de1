"""One fair comparison: a dense model and its sparse replacements, trained and evaluated alike."""

import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from sparseffn_jax.bench.fairness import Conditions, token_hash
from sparseffn_jax.bench.peers import Method
from sparseffn_jax.bench.settings import ComparisonSettings
from sparseffn_jax.bench.sizing import Settled, Sizer
from sparseffn_jax.bench.stacks import Stack, ffn_stack, fresh_ffns, time_stacks
from sparseffn_jax.checkpoints.pretrained import Pretrained, load_pretrained
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer, load_tokenizer
from sparseffn_jax.evaluate.losses import make_evaluator
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.measure.timing import PairedTimes
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import TextCounts, TokenWindows, load_windows
from sparseffn_jax.train.loop import train

# Windows in one forward pass, in evaluation and in calibration.
EVALUATION_BATCH = 16
# Pairs of runs, and seconds that they are to take: while a size is sought, and once it is found.
_SIZING: dict[str, Any] = {"repeats": 5, "least_seconds": 2.0}
_FINAL: dict[str, Any] = {"repeats": 15, "least_seconds": 6.0}


class Tuned(NamedTuple):
    """What one side of a comparison is after fine-tuning.

    Attributes:
      params: its parameters.
      loss: its loss on the held-out windows, in nats a token.
      conditions: the conditions under which the loss came about.
      curve: the number of each step, from 1, and the cross-entropy of its batch in nats a token.
    """

    params: Any
    loss: float
    conditions: Conditions
    curve: list[tuple[int, float]]


class Comparison:
    """A dense model, and the text that it and its replacements are trained and evaluated on.

    Both sides read the same batches with the same recipe, and are evaluated on the same windows.

    Attributes:
      dense: the pretrained dense model, as it was loaded.
      model: the dense model's decoder.
      tokenizer: the model's tokenizer.
      windows: the training windows, and the held-out windows that are evaluated on.
      text_counts: how much text there was.
      calibration: (calibration_windows, window + 1) token ids, drawn from the training windows.
      timed_tokens: rows of the activations that FFNs are timed on.

    Args:
      settings: the settings of the comparison.
      dense: the dense model, from :func:`load_dense`.
      timed_tokens: rows of the activations that FFNs are timed on.
      timing_seed: seed of these activations.

    Raises:
      CheckpointError, FileNotFoundError, ValueError: if tokenizer, text or window do not fit.
    """

    def __init__(
        self,
        settings: ComparisonSettings,
        dense: Pretrained,
        *,
        timed_tokens: int,
        timing_seed: int,
    ):
        self._settings, self.dense, self.model = settings, dense, dense.model()
        self.tokenizer = load_tokenizer(settings.model)
        check_tokenizer(self.tokenizer, dense.config)
        window = check_window(settings.window, dense.spec.n_positions)
        windows = load_windows(settings.text, self.tokenizer, window)
        rng = np.random.default_rng(settings.seed)
        held_out = rng.permutation(len(windows.validation))[: settings.evaluation_windows]
        self.windows = TokenWindows(windows.train, windows.validation[held_out])
        assert windows.counts is not None
        self.text_counts: TextCounts = windows.counts
        chosen = rng.permutation(len(windows.train))[: settings.calibration_windows]
        self.calibration: Int[np.ndarray, "n w"] = windows.train[chosen]
        self.timed_tokens = timed_tokens
        self._activations = jax.random.normal(
            jax.random.key(timing_seed), (timed_tokens, dense.spec.d_model)
        )
        self._dense_stacks: dict[bool, Stack] = {}
        self._times: dict[Any, dict[str, Any]] = {}

    def loss(
        self, model: Decoder, params: Any, windows: Int[np.ndarray, "n w"] | None = None
    ) -> float:
        """Returns a model's loss on the held-out windows, or on others, in nats a token."""
        windows = self.windows.validation if windows is None else windows
        return make_evaluator(model)(params, windows, EVALUATION_BATCH)

    def tune_dense(self) -> Tuned:
        """Fine-tunes the dense model on the text."""
        settings = self._settings
        rate = settings.dense_learning_rate
        return self._tune("dense", self.model, self.dense.params, settings.steps, rate, None)

    def tune(
        self,
        name: str,
        model: Decoder,
        params: Any,
        *,
        teacher: Any = None,
        steps: int | None = None,
    ) -> Tuned:
        """Fine-tunes a sparse model with the dense one as its teacher.

        Args:
          name: the folder of the run below ``out/training``; what it holds is removed first.
          model: the sparse model.
          params: the parameters to start from.
          teacher: the dense model's parameters to distil from; ``None`` takes the pretrained ones.
          steps: number of training steps; ``None`` takes that of the settings.
        """
        settings = self._settings
        teacher = self.dense.params if teacher is None else teacher
        how = steps or settings.steps, settings.learning_rate, teacher
        return self._tune(name, model, params, *how)

    def time_ffns(
        self,
        model: Decoder,
        params: Any,
        *,
        train: bool = False,
        repeats: int = 15,
        least_seconds: float = 0.0,
    ) -> PairedTimes:
        """Times the FFNs of all of a model's layers in turn with the dense model's.

        Args:
          model: a sparse model.
          params: its parameters, or those of its FFNs alone.
          train: whether gradients are timed instead of outputs.
          repeats: number of pairs of runs, at least.
          least_seconds: as in :func:`~sparseffn_jax.measure.timing.time_in_turn`.
        """
        if train not in self._dense_stacks:
            self._dense_stacks[train] = ffn_stack(self.model, self.dense.params, train=train)
        stack = ffn_stack(model, params, train=train)
        how = {"repeats": repeats, "least_seconds": least_seconds}
        return time_stacks(self._dense_stacks[train], stack, self._activations, **how)

    def sizer(self, method: Method) -> Sizer:
        """Returns a search for the size of a method that is as fast as is wanted.

        Args:
          method: the method.
        """
        return Sizer(
            lambda ratio: method.size(self.model.spec, ratio),
            lambda config: self._time(method, config, _SIZING)["speedup"],
        )

    def settle(self, method: Method, sizer: Sizer, target: float) -> Settled | None:
        """Sizes a method for a speed-up of all FFNs together, and measures the result longer.

        Args:
          method: the method.
          sizer: its :meth:`sizer`, which knows the sizes that have been measured.
          target: speed-up over the dense FFNs.

        Returns:
          The configuration and its times, or ``None`` if the method is never that fast.
        """
        return sizer.settle(target, lambda config: self._time(method, config, _FINAL))

    def _time(self, method: Method, config: Any, how: dict[str, Any]) -> dict[str, Any]:
        # Layers that are alike are timed once for all methods: on an unsteady clock one method
        # would otherwise be given more units than another whose layers are the same.
        ffns = tuple(method.ffns(config, self.model.spec.n_layer))
        key = ffns, *how.values()
        if key not in self._times:
            model = self.model.clone(ffns=ffns)
            self._times[key] = self.time_ffns(model, fresh_ffns(model), **how).summary()
        return self._times[key]

    def _tune(
        self,
        name: str,
        model: Decoder,
        params: Any,
        steps: int,
        rate: float,
        teacher: Any,
    ) -> Tuned:
        settings = self._settings
        distill_weight, learns_from = 0.0, None
        if teacher is not None and settings.distill_weight:
            distill_weight, learns_from = settings.distill_weight, (self.model, teacher)
        config = TrainConfig(
            steps=steps,
            batch_size=settings.batch_size,
            recipe="full",
            learning_rate=rate,
            ffn_learning_rate=rate,
            distill_weight=distill_weight,
            temperature=1.0,
            seed=settings.seed,
            log_every=max(1, steps // 10),
            eval_every=0,
            save_every=steps,
        )
        curve: list[tuple[int, float]] = []

        def remember(step: int, metrics: dict[str, float]) -> None:
            curve.append((step, metrics.get("cross_entropy", metrics["loss"])))

        folder = settings.out / "training" / name
        # What a stopped run left there may be a model of another size, because the clock that
        # sizes it never says quite the same; and its curve would be missing here.
        shutil.rmtree(folder, ignore_errors=True)
        result = train(
            model, params, self.windows, config, folder, teacher=learns_from, on_step=remember
        )
        conditions = Conditions(
            data_hash=result.data_hash,
            evaluation_hash=token_hash(self.windows.validation),
            batch_size=config.batch_size,
            steps=config.steps,
            precision=np.dtype(model.dtype).name,
        )
        return Tuned(result.params, self.loss(model, result.params), conditions, curve)


def load_dense(source: str) -> Pretrained:
    """Loads the dense model of a comparison.

    Args:
      source: folder, GGUF file or hub name of a checkpoint.

    Raises:
      CheckpointError, FileNotFoundError: if it cannot be read.
      ValueError: if the model is sparse already.
    """
    dense = load_pretrained(source)
    if dense.ffns:
        raise ValueError(f"{source} is sparse already: give a dense model")
    return dense
