"""The settings of a training run; cheap to import, for the command line's help."""

import dataclasses
import re
from typing import get_args

from sparseffn_jax.train.choices import (
    DEFAULTS,
    STAGES,
    OptimizerName,
    ScheduleName,
    parse_reporters,
)
from sparseffn_jax.train.guard import GuardConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to fine-tune.

    Attributes:
      steps: number of batches to read, each for one optimizer update.
      batch_size: number of windows in a batch.
      recipe: what trains: ``"full"``, ``"ffn_only"``, ``"lora"`` or ``"stepwise"``; ``"lora"`` is
        adapters, and in full the feed-forward layers without adapters, ``"stepwise"`` half of the
        steps ``ffn_only``, then attention and LayerNorm too.
      optimizer: what makes the updates: ``"adamw"``, ``"lion"``, or ``"muon"`` for the matrices of
        blocks with AdamW for the rest.
      schedule: how the rate goes on after the warm-up: ``"cosine"`` falls to a tenth, ``"linear"``
        to zero, ``"constant"`` stays, and ``"wsd"`` (warmup-stable-decay) stays and falls to zero
        in the last fifth of a stage.
      learning_rate: peak learning rate; ``None`` takes 5e-4, for Lion 5e-5.
      ffn_learning_rate: peak learning rate of sparse feed-forward layers; ``None`` takes half of
        ``learning_rate``.
      warmup_steps: number of updates in which the rate rises to its peak, in each stage of the
        recipe; ``None`` takes a tenth of the stage.
      weight_decay: decoupled weight decay of matrices; ``None`` takes 0.1, for Lion 1.
      clip_norm: global norm that a larger gradient is scaled down to.
      loss_scale: first factor of the loss in float16; it falls and rises by itself.
      loss_scale_interval: number of updates in a row without overflow after which the factor of
        the loss is doubled.
      accumulate_steps: number of microbatches that a batch is split into to save memory; it must
        divide ``batch_size``, and changes nothing but rounding and dropout.
      lora_rank: rank of the adapters.
      lora_alpha: scale of the adapters, which is divided by their rank; ``None`` takes the rank.
      lora_targets: linear maps that get adapters, names joined by commas: ``"attention"``,
        ``"all-linear"`` (dense feed-forward layers too), or modules, such as ``"q_proj,v_proj"``.
      lora_ranks: ranks of their own for some targets, such as ``"q_proj=16,o_proj=4"``.
      lora_rslora: whether alpha is divided by the square root of the rank.
      lora_ffns: whether feed-forward layers without adapters train in full beside the adapters;
        otherwise the adapters train alone.
      dropout: whether to apply the model's dropout rates.
      distill_weight: weight of the distillation loss, from 0 to 1; cross-entropy has the rest.
      temperature: temperature that softens both distributions of the distillation loss.
      hidden_weight: weight of the hidden states' mean squared error, which is added to both.
      seed: seed of the data order, of dropout and of the adapters.
      log_every: number of steps between two lines of the log.
      eval_every: number of steps between two validation losses, with one more at the end; 0 for
        no validation.
      save_every: number of steps between two checkpoints, with one more at the end.
      keep_checkpoints: number of checkpoints that stay, the newest ones.
      report_to: what gets the log beside ``metrics.jsonl``: ``"tensorboard"``, ``"wandb"``, both
        with a comma between, or ``"none"``.
      guard: settings of the divergence guard.

    Raises:
      ValueError: on construction, if a value is out of its range; the message names it.

    Example:
      >>> import sparseffn_jax as sf
      >>> config = sf.TrainConfig(steps=200, recipe="stepwise", learning_rate=3e-4)
      >>> config.stage_ends
      (100, 200)
      >>> sf.TrainConfig(batch_size=8, accumulate_steps=3)
      Traceback (most recent call last):
      ValueError: accumulate_steps=3 does not divide batch_size=8
    """

    steps: int = 1000
    batch_size: int = 8
    recipe: str = "ffn_only"
    optimizer: OptimizerName = "adamw"
    schedule: ScheduleName = "cosine"
    learning_rate: float | None = None
    ffn_learning_rate: float | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    clip_norm: float = 1.0
    loss_scale: float = 2.0**15
    loss_scale_interval: int = 2000
    accumulate_steps: int = 1
    lora_rank: int = 8
    lora_alpha: float | None = None
    lora_targets: str = "attention"
    lora_ranks: str = ""
    lora_rslora: bool = False
    lora_ffns: bool = True
    dropout: bool = False
    distill_weight: float = 0.0
    temperature: float = 2.0
    hidden_weight: float = 0.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 500
    keep_checkpoints: int = 3
    report_to: str = "tensorboard"
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)

    def __post_init__(self):
        for name, known in (
            ("recipe", STAGES),
            ("optimizer", get_args(OptimizerName)),
            ("schedule", get_args(ScheduleName)),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(known)}")
        parse_reporters(self.report_to)
        for name in (
            "steps",
            "batch_size",
            "accumulate_steps",
            "lora_rank",
            "loss_scale_interval",
            "log_every",
            "save_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            "learning_rate",
            "ffn_learning_rate",
            "clip_norm",
            "loss_scale",
            "lora_alpha",
            "temperature",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name}={value} must be positive")
        for name in ("weight_decay", "hidden_weight", "eval_every", "seed"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        if not 0.0 <= self.distill_weight <= 1.0:
            raise ValueError(f"distill_weight={self.distill_weight} must lie between 0 and 1")
        if self.batch_size % self.accumulate_steps:
            raise ValueError(
                f"accumulate_steps={self.accumulate_steps} does not divide "
                f"batch_size={self.batch_size}"
            )
        self._check_lora()
        shortest = self.steps // STAGES[self.recipe]
        if self.warmup_steps is not None and not 0 <= self.warmup_steps < max(1, shortest):
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must lie between 0 and the {shortest} steps of "
                "a stage"
            )
        if shortest < 1:
            raise ValueError(f"steps={self.steps} are too few for the stages of {self.recipe!r}")

    @property
    def peak_rates(self) -> tuple[float, float]:
        """The peak learning rates of what is not a sparse feed-forward layer, and of what is."""
        peak = self.learning_rate or DEFAULTS[self.optimizer].learning_rate
        return peak, self.ffn_learning_rate or peak / 2

    @property
    def decay(self) -> float:
        """The decoupled weight decay of matrices."""
        if self.weight_decay is None:
            return DEFAULTS[self.optimizer].weight_decay
        return self.weight_decay

    @property
    def loss_mixture(self) -> str | None:
        """What the loss is made of, or ``None`` if it is the cross-entropy alone."""
        parts = []
        if self.distill_weight < 1.0:
            share = 1.0 - self.distill_weight
            parts.append("cross-entropy" if share == 1.0 else f"{share:.3g} cross-entropy")
        if self.distill_weight > 0.0:
            parts.append(
                f"{self.distill_weight:.3g} distillation at temperature {self.temperature:g}"
            )
        if self.hidden_weight > 0.0:
            parts.append(f"{self.hidden_weight:g} hidden states' squared error")
        return None if parts == ["cross-entropy"] else " + ".join(parts)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """The steps after which the stages of the recipe are over, in order."""
        stages = STAGES[self.recipe]
        return tuple(self.steps * (i + 1) // stages for i in range(stages))

    @property
    def lora_target_names(self) -> list[str]:
        """The names in :attr:`lora_targets`."""
        return [name.strip() for name in self.lora_targets.split(",")]

    @property
    def lora_ranks_by_name(self) -> dict[str, int]:
        """The ranks that :attr:`lora_ranks` gives, by the names of their targets."""
        pairs = [pair.partition("=") for pair in self.lora_ranks.split(",") if pair]
        return {name.strip(): int(rank) for name, _, rank in pairs}

    def lora_scale(self, rank: int) -> float:
        """Returns what the product of an adapter's factors of some rank is multiplied with.

        By default 1: with Adam, tuning alpha is tuning the learning rate (Hu et al. 2021, 4.1).
        The square root is Kalajdzievski's 2023 (2312.03732).
        """
        alpha = rank if self.lora_alpha is None else self.lora_alpha
        return alpha / (rank**0.5 if self.lora_rslora else rank)

    def _check_lora(self) -> None:
        for name, form, example in (
            ("lora_targets", r"[\w.-]+", "q_proj,v_proj"),
            ("lora_ranks", r"[\w.-]+=0*[1-9]\d*", "q_proj=16,o_proj=4"),
        ):
            value, item = getattr(self, name), rf"\s*{form}\s*"
            optional = name == "lora_ranks" and value == ""
            if not isinstance(value, str) or not (
                optional or re.fullmatch(rf"{item}(,{item})*", value)
            ):
                raise ValueError(
                    f"{name}={value!r}: expected a string such as {example!r}, its parts joined by "
                    "commas"
                )
        if self.recipe == "lora":
            return
        for name in ("lora_alpha", "lora_targets", "lora_ranks", "lora_rslora", "lora_ffns"):
            value = getattr(self, name)
            if value != getattr(TrainConfig, name):
                raise ValueError(f"{name}={value!r} needs recipe='lora', not {self.recipe!r}")
