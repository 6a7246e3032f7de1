"""The settings of the benches and of the demo, how they are checked and how a report records them.

They are cheap to import, for the command line's help.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sparseffn_jax.defaults import EMBEDDED_MODEL, STDLIB

# Side of the blocks of the layers that are measured.
BLOCK = 64
# Channels, blocks and heads of the GPT-2s that are measured.
SIZES = MappingProxyType({"small": (768, 12, 12), "medium": (1024, 24, 16)})


def check_counts(settings: Any, *names: str, least: int = 1) -> None:
    """Refuses settings in which a count is too small.

    Args:
      settings: any object with the named attributes.
      *names: names of the counts.
      least: the smallest value that each of them may have.

    Raises:
      ValueError: if one is smaller; the message names it and its value.
    """
    for name in names:
        if getattr(settings, name) < least:
            expected = "must not be negative" if least == 0 else f"must be at least {least}"
            raise ValueError(f"{name}={getattr(settings, name)} {expected}")


def check_known(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Checks names of things to measure.

    Args:
      what: what they are names of, for the message.
      names: the names that were given.
      known: the names that there are.

    Raises:
      ValueError: if one is not known.
    """
    if unknown := set(names) - set(known):
        raise ValueError(
            f"unknown {what} {', '.join(sorted(unknown))}: expected some of {', '.join(known)}"
        )


def begin_report(settings: Any) -> dict[str, Any]:
    """Returns what every report begins with: the settings and the versions of the libraries.

    Args:
      settings: a dataclass whose fields JSON can hold, apart from paths, which become strings.
    """
    from sparseffn_jax.measure import records

    values = dataclasses.asdict(settings)
    return {
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in values.items()
        },
        "versions": records.versions(),
    }


@dataclasses.dataclass(frozen=True)
class FFNBenchSettings:
    """Which layers are measured, on what and how often.

    Attributes:
      d_model: Number of channels in and out of the layers.
      d_ff: Number of hidden units of the dense FFN.
      tokens: Rows of activations in the forward pass and in training.
      only: Names of the configurations to measure. The default is the whole grid.
      dtype: Precision of the weights and of the computation.
      repeats: Runs of each program, which take turns with the dense one's in three rounds over
        the grid. Medians over the runs count.
      all_plans: Also measure every plan, to see what the chosen one loses to the best.
      external: Also time the products of other libraries.
      out: Folder that ffn.json and the pictures are written to.

    Raises:
      ValueError: on construction, if a value is out of its range.
    """

    d_model: int = 768
    d_ff: int = 3072
    tokens: int = 2048
    only: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 11
    all_plans: bool = True
    external: bool = True
    out: Path = Path("runs/bench")

    def __post_init__(self):
        if self.d_model < 1 or self.d_model % BLOCK or self.d_ff < 1 or self.d_ff % (4 * BLOCK):
            raise ValueError(
                f"d_model={self.d_model} and d_ff={self.d_ff} must be multiples of {BLOCK} and "
                f"{4 * BLOCK}, for the grid's blocks"
            )
        check_counts(self, "tokens", "repeats")


@dataclasses.dataclass(frozen=True)
class ModelBenchSettings:
    """The model that is measured, on what and how often.

    Attributes:
      model: Folder, GGUF file or hub name of a dense model. The default is a GPT-2 of random
        weights.
      size: Size of that GPT-2: "small" has 124M parameters, "medium" 355M.
      layers: Number of blocks that it is cut down to. The default is all of them.
      flops: FFN FLOPs of the sparse model over those of the dense one.
      circulant_block: Replace every FFN by block-circulant maps of blocks of this side, instead of
        what --flops gives.
      batch_size: Sequences in a batch.
      window: Tokens in a sequence.
      prompt: Tokens of the one prompt that generation starts from.
      decoded: Tokens that it is continued by, with the cache.
      dtype: Precision of the computation. The weights are float32.
      repeats: Runs of each program, which take turns with the dense model's. Medians count.
      external: Also time the dense model of Hugging Face's PyTorch.
      out: Folder that model.json is written to.

    Raises:
      ValueError: on construction, if a value is out of its range.
    """

    model: str | None = None
    size: Literal["small", "medium"] = "small"
    layers: int | None = None
    flops: float = 0.4
    circulant_block: int | None = None
    batch_size: int = 2
    window: int = 512
    prompt: int = 256
    decoded: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 5
    external: bool = True
    out: Path = Path("runs/bench")

    def __post_init__(self):
        check_counts(self, "batch_size", "window", "prompt", "decoded", "repeats")
        _, n_layer, _ = SIZES[self.size]
        if self.layers is not None and not 1 <= self.layers <= n_layer:
            raise ValueError(f"layers={self.layers} must lie between 1 and {n_layer}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """What a dense model and its sparse replacements are trained and evaluated on.

    Attributes:
      model: Folder, GGUF file or hub name of a dense model.
      text: What to train, calibrate and evaluate on: "stdlib" (the source of Python's standard
        library); a file of text, or a .jsonl or .parquet file with "text", with "messages", or with
        "prompt" and "completion"; a folder of such files; a folder that a Hugging Face dataset was
        saved to; or a dataset of the Hub, NAME:CONFIGURATION:SPLIT.
      out: Folder that the results are written to.
      steps: Fine-tuning steps, as many for the dense model as for sparse ones.
      distill_weight: Share of the pretrained dense model's predictions in what sparse models learn
        from; the rest is the text, from which alone the dense model learns.
      batch_size: Windows in a training step.
      window: Tokens in a window, by default n_positions or 1024 if that is less.
      learning_rate: Peak learning rate of sparse models.
      dense_learning_rate: Peak learning rate of the dense model, which has less far to go.
      calibration_windows: Windows of training text that the sparse models' closed forms are
        fitted to.
      distill_steps: Steps of layer-wise distillation between the closed forms and fine-tuning.
      evaluation_windows: Held-out windows that every loss is the mean over.
      seed: Seed of the order of the data and of the choice of windows.

    Raises:
      ValueError: on construction, if a value is out of its range.
    """

    model: str
    text: str = STDLIB
    out: Path
    steps: int
    distill_weight: float = 1.0
    batch_size: int = 8
    window: int | None = None
    learning_rate: float = 1e-3
    dense_learning_rate: float = 3e-4
    calibration_windows: int = 96
    distill_steps: int
    evaluation_windows: int = 128
    seed: int = 0

    def __post_init__(self):
        check_counts(self, "steps", "batch_size", "calibration_windows", "evaluation_windows")
        check_counts(self, "distill_steps", "seed", least=0)
        for name in ("learning_rate", "dense_learning_rate"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0.0 <= self.distill_weight <= 1.0:
            raise ValueError(f"distill_weight={self.distill_weight} must be between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualitySettings(ComparisonSettings):
    """What is compared, at which speed, and how long it trains.

    Attributes:
      model: Folder, GGUF file or hub name of a dense model.
      out: Folder for quality.json and quality_at_equal_time.png. Points that are there already,
        from the same settings, are kept.
      targets: Speed-ups of the FFNs to compare at, as measured on this machine.
      methods: Names of the methods to compare. The default is all of them.
      timed_tokens: Rows of activations that the FFNs are timed on.
      seed: Seed of the order of the data, of the choice of windows and of the timed activations.

    Raises:
      ValueError: on construction, if a value is out of its range.
    """

    out: Path = Path("runs/quality")
    targets: tuple[float, ...] = (1.5, 2.0, 4.0, 8.0)
    methods: tuple[str, ...] = ()
    steps: int = 100
    distill_steps: int = 60
    timed_tokens: int = 4096
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for target in self.targets:
            if not target > 1.0:
                raise ValueError(f"a target speed-up of {target} must be above 1")
        if not self.targets:
            raise ValueError("targets is empty: give at least one speed-up")
        check_counts(self, "timed_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings(ComparisonSettings):
    """What the main job runs on, and for how long.

    Attributes:
      out: Folder for report.json, the pictures and the sparse model. An earlier report there is
        replaced.
      ffn_speedup: Speed-up of the FFNs, measured on this machine, that a plan sizes the layers for.
      flops: Make all layers alike instead, with this share of the dense FFN's FLOPs.
      distill_weight: Share of the tuned dense model's predictions in what the sparse model learns
        from; the rest is the text, from which alone the dense model learns.
      sweep: FFN FLOPs ratios that the picture of quality against time shows.
      sweep_steps: Fine-tuning steps for each of these ratios, after layer-wise distillation. If
        it is 0, the picture shows the losses right after the closed forms.
      prompt: Text that both models continue.
      seed: Seed of the order of the data, of the choice of windows and of sampling.

    Raises:
      ValueError: on construction, if a value is out of its range.
    """

    model: str = str(EMBEDDED_MODEL)
    out: Path = Path("runs/demo")
    ffn_speedup: float = 2.0
    flops: float | None = None
    steps: int = 500
    distill_weight: float = 0.7
    distill_steps: int = 100
    sweep: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    sweep_steps: int = 0
    prompt: str = "def read_config(path):\n"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.ffn_speedup > 1.0:
            raise ValueError(f"ffn_speedup={self.ffn_speedup} must be above 1")
        ratios = self.sweep if self.flops is None else (self.flops, *self.sweep)
        for ratio in ratios:
            if not 0.0 < ratio <= 1.0:
                raise ValueError(f"a FLOPs ratio of {ratio} must lie above 0 and not above 1")
        check_counts(self, "sweep_steps", least=0)
