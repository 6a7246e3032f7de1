"""The arguments of ``sparseffn finetune``."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from sparseffn_jax.checkpoints.folders import ADAPTER_CONFIG, check_replaceable, local_folder
from sparseffn_jax.commands.arguments.common import (
    Precision,
    check_at_least,
    check_files,
    check_models,
)
from sparseffn_jax.commands.parser import Arguments
from sparseffn_jax.defaults import STDLIB
from sparseffn_jax.measure.records import check_folder
from sparseffn_jax.train.choices import LossOn, Resume, StrategyName
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.distributed import DistributedConfig
from sparseffn_jax.train.sources import check_sources


@dataclasses.dataclass(frozen=True)
class TrainArguments(TrainConfig):
    """How to fine-tune, with a batch's size as Hugging Face counts it.

    Attributes:
      per_device_batch_size: Windows that a device computes at once, in place of --batch-size; that
        becomes this times --accumulate-steps times the number of parts that --strategy deals a
        batch out to.
    """

    per_device_batch_size: int | None = None

    def __post_init__(self):
        if self.per_device_batch_size is not None:
            check_at_least(1, self, "per_device_batch_size")
            if self.batch_size != TrainConfig.batch_size:
                raise ValueError(
                    f"batch_size={self.batch_size} and "
                    f"per_device_batch_size={self.per_device_batch_size} say the same: give one"
                )
            # On one device; :meth:`config` knows of others.
            batch_size = self.per_device_batch_size * self.accumulate_steps
            object.__setattr__(self, "batch_size", batch_size)
        super().__post_init__()

    def config(self, batch_shards: int) -> TrainConfig:
        """Returns the settings of the run.

        Args:
          batch_shards: the number of parts that the strategy deals a batch out to.
        """
        names = (field.name for field in dataclasses.fields(TrainConfig))
        values = {name: getattr(self, name) for name in names}
        if self.per_device_batch_size is not None:
            values["batch_size"] *= batch_shards
        return TrainConfig(**values)


@dataclasses.dataclass(frozen=True)
class FinetuneArguments(Arguments):
    """Fine-tune a dense or sparse model; stop and resume at will.

    The folder --out gets checkpoints, metrics.jsonl, TensorBoard events, counts of the text in
    text.json and, at the end, the model in OUT/model; the recipe "lora" leaves its adapters too, in
    peft's format in OUT/adapter. The same command goes on where it stopped. SIGTERM saves and exits
    with 143, Ctrl-C with 130.

    Attributes:
      model: Folder, GGUF file or hub name of a model.
      out: Folder of the run.
      train: How to train.
      text: Text to train on: a file, a folder, a dataset, or "stdlib" for Python's library.
      validation_text: Text to validate on; by default a twentieth of --text is held out for that.
      text_tokens: Most tokens to read of each text; a dataset of the Hub is then streamed.
      loss_on: Whether all tokens count in the loss or completions alone: what follows prompts, or
        what the assistant says.
      adapter: Folder or hub name of LoRA adapters, in peft's format, to merge into --model first.
      merge: Write the model with its adapters merged, in OUT/model, when the recipe is "lora".
      push: Repository on the Hugging Face Hub, such as me/sparse-gpt2, to push the model to; with
        --no-merge, the adapters.
      private: Make that repository private.
      window: Tokens in a window, by default n_positions or 1024 if that is less.
      teacher: Folder, GGUF file or hub name of a dense model to distil from; it needs
        --distill-weight.
      dtype: Precision of the computation; weights stay float32.
      remat: Compute each block again in the backward pass: more time, far less memory; by default
        only where a step does not fit into memory, with --no-remat never.
      resume: Whether to go on from the newest checkpoint: if there is one, in any case, or never.
      strategy: Where to train: on one device, on all with a part of the batch each, or on --mesh.
      mesh: Sizes of the mesh's axes, such as data=2,fsdp=2,tensor=2; data counts replicas, fsdp
        and tensor share one copy of the parameters, tensor also each layer's work.
      plans: Table of measured execution plans, as "sparseffn inspect --autotune" writes it.
      cluster: How several processes meet.
    """

    example = (
        "sparseffn finetune --model sparse --text t.md --out run --teacher dense "
        "--distill-weight .7"
    )
    groups: ClassVar = {
        "options": ("model", "out", "text", "loss_on", "steps", "recipe", "learning_rate"),
        "batches": ("batch_size", "per_device_batch_size", "accumulate_steps", "window"),
        "distillation": ("teacher", "distill_weight"),
        "memory and devices": ("dtype", "remat", "strategy", "mesh"),
        "the run": ("resume", "eval_every"),
    }

    model: str
    out: Path
    train: TrainArguments
    text: str = STDLIB
    validation_text: str | None = None
    text_tokens: int | None = None
    loss_on: LossOn = "all"
    adapter: str | None = None
    merge: bool = True
    push: str | None = None
    private: bool = False
    window: int | None = None
    teacher: str | None = None
    dtype: Precision = "float32"
    remat: bool | None = None
    resume: Resume = "auto"
    strategy: StrategyName = "single"
    mesh: str | None = None
    plans: Path | None = None
    cluster: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    @property
    def result(self) -> Path:
        """The folder that gets the trained model."""
        return self.out / "model"

    @property
    def adapters(self) -> Path:
        """The folder that gets trained adapters."""
        return self.out / "adapter"

    @property
    def is_merged(self) -> bool:
        """Whether there is a trained model at the end, and not adapters alone."""
        return self.merge or self.train.recipe != "lora"

    def check(self) -> None:
        check_at_least(1, self, "window", "text_tokens")
        if (self.strategy == "mesh") != (self.mesh is not None):
            raise ValueError(
                "--strategy mesh, and no other, needs the sizes of a mesh, such as --mesh "
                "data=2,fsdp=2,tensor=2"
            )
        distils = self.train.distill_weight > 0.0 or self.train.hidden_weight > 0.0
        if distils and self.teacher is None:
            raise ValueError("--distill-weight and --hidden-weight need --teacher, to learn from")
        if self.teacher is not None and not distils:
            raise ValueError(
                "--teacher is not used: give --distill-weight, its share in what the model learns "
                "from"
            )
        self._check_results()
        check_models(self.model, self.teacher)
        if self.adapter is not None:
            local_folder(self.adapter, "the folder that holds it")
        check_files([self.plans])
        check_sources(self.text, self.validation_text)
        check_folder(self.out)

    def _check_results(self) -> None:
        # What is read stays; the last run's results are replaced.
        sources = [self.model, *filter(None, [self.teacher, self.adapter])]
        if self.train.recipe == "lora":
            if self.adapter is not None:
                raise ValueError(
                    "--adapter with --recipe lora: new adapters would be for a model that is "
                    "stored nowhere. Merge these first, in Python: save_pretrained what "
                    "load_pretrained(model, adapter=...) gives"
                )
            check_replaceable(self.adapters, True, sources, ADAPTER_CONFIG)
        elif not self.merge:
            raise ValueError(
                f"--no-merge is for --recipe lora: {self.train.recipe} has no adapters"
            )
        if self.is_merged:
            check_replaceable(self.result, True, sources)
