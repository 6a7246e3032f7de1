"""The command ``sparseffn finetune``."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

from sparseffn_jax.checkpoints.folders import check_replaceable
from sparseffn_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from sparseffn_jax.commands.common import DTYPES, Precision, matching_tokenizer
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.measure.records import make_folder
from sparseffn_jax.progress import stage
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import STDLIB, load_windows
from sparseffn_jax.train.loop import Resume, train
from sparseffn_jax.train.processes import DistributedConfig, is_first
from sparseffn_jax.train.strategies import StrategyName, make_strategy


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Fine-tune a dense or sparse model; stop and resume at will.

    --out gets checkpoints, metrics.jsonl, TensorBoard events and, at the end, the model in
    Hugging Face format in --out/model. The same command goes on where it stopped. After SIGTERM it
    saves and exits with status 143, after Ctrl-C with 130.

    Attributes:
      model: Folder, GGUF file or hub name.
      out: Folder of the run.
      train: How to train.
      text: What to train on; see "demo".
      window: Tokens in a window; default the smaller of n_positions and 1024.
      teacher: Folder, GGUF file or hub name of a dense model to distil from; needs
        --distill-weight.
      dtype: Of the computation; weights stay float32. In float16 the loss is scaled.
      remat: Compute each block again in the backward pass: a third more time, far less memory.
      resume: "auto" goes on from the newest whole checkpoint if there is one, "must" demands one,
        "never" refuses one.
      strategy: "single" device; "pmap", every device with all parameters and a part of the batch;
        or "mesh", parameters and batch laid out over --mesh. A run may be resumed with another.
      mesh: Sizes of the mesh's axes, such as data=2,fsdp=2,tensor=2: data counts replicas, fsdp
        and tensor share one copy of the parameters, tensor also each layer's work.
      plans: Table of measured plans to choose by, as "inspect --autotune" writes it.
      cluster: How several processes meet; see --distributed.
    """

    model: str
    out: Path
    train: tyro.conf.OmitArgPrefixes[TrainConfig]
    text: str = STDLIB
    window: int | None = None
    teacher: str | None = None
    dtype: Precision = "float32"
    remat: bool = False
    resume: Resume = "auto"
    strategy: StrategyName = "single"
    mesh: str | None = None
    plans: Path | None = None
    cluster: tyro.conf.OmitArgPrefixes[DistributedConfig] = dataclasses.field(
        default_factory=DistributedConfig
    )

    def run(self, console: Console) -> None:
        """Runs the command."""
        # Before anything else: it decides which devices there are.
        self.cluster.start()
        strategy = make_strategy(self.strategy, self.mesh)
        strategy.check(self.train)
        # What is read stays; the last run's result is replaced.
        check_replaceable(self._result, True, [self.model, *filter(None, [self.teacher])])
        make_folder(self.out)
        with stage("loading the model"):
            pretrained = load_pretrained(self.model)
            tokenizer = matching_tokenizer(self.model, pretrained)
        with stage("reading the text"):
            window = check_window(self.window, pretrained.spec.n_positions)
            windows = load_windows(self.text, tokenizer, window)
        model = pretrained.model(DTYPES[self.dtype], self.remat)
        teacher = None
        if self.teacher is not None:
            with stage("loading the teacher"):
                loaded = load_pretrained(self.teacher)
            teacher = (loaded.model(DTYPES[self.dtype]), loaded.params)
        result = train(
            model,
            pretrained.params,
            windows,
            self.train,
            self.out,
            teacher=teacher,
            strategy=strategy,
            resume=self.resume,
        )
        if not is_first():
            return
        save_pretrained(self._result, model, result.params, tokenizer=tokenizer, overwrite=True)
        console.print(f"wrote {self._result} (batches {result.data_hash[:12]})")

    @property
    def _result(self) -> Path:
        return self.out / "model"
