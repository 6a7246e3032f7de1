"""The command ``sparseffn finetune``."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

from sparseffn_jax.checkpoints.adapters import save_adapter
from sparseffn_jax.checkpoints.cards import adapter_card, model_card, origin_of, table
from sparseffn_jax.checkpoints.folders import ADAPTER_CONFIG, check_replaceable
from sparseffn_jax.checkpoints.hub import check_push, push_to_hub
from sparseffn_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from sparseffn_jax.commands.common import DTYPES, Precision, matching_tokenizer, read_windows
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.measure.records import make_folder, versions
from sparseffn_jax.progress import stage
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import TextCounts
from sparseffn_jax.train.documents import STDLIB
from sparseffn_jax.train.loop import Resume, TrainResult, train
from sparseffn_jax.train.processes import DistributedConfig, is_first
from sparseffn_jax.train.reporters import check_installed, parse_names
from sparseffn_jax.train.strategies import StrategyName, make_strategy
from sparseffn_jax.train.tokens import LossOn


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Fine-tune a dense or sparse model; stop and resume at will.

    --out gets checkpoints, metrics.jsonl, TensorBoard events, text.json with the counts of the text
    and, at the end, the model in Hugging Face format in --out/model. The recipe "lora" leaves its
    adapters too, in peft's format in --out/adapter. The same command goes on where it stopped.
    After SIGTERM it saves and exits with status 143, after Ctrl-C with 130.

    Attributes:
      model: Folder, GGUF file or hub name.
      out: Folder of the run.
      train: How to train.
      text: What to train on; see "demo". Messages go through the tokenizer's chat template.
      validation_text: What to validate on; default a twentieth of --text, which is held out.
      text_tokens: Most tokens to take of each text, from its beginning; a dataset of the Hugging
        Face Hub is then streamed and not downloaded. Default all.
      loss_on: "all" tokens, or those of "completion" alone: what follows prompts, or the assistant
        says.
      adapter: Folder or hub name of LoRA adapters, in peft's format, to merge into --model first.
      merge: Of the recipe "lora", write the model with its adapters merged, in --out/model, too.
      push: Repository on the Hugging Face Hub, such as me/sparse-gpt2, to push the model to; with
        --no-merge, the adapters.
      private: Make that repository private.
      window: Tokens in a window; default the smaller of n_positions and 1024.
      teacher: Folder, GGUF file or hub name of a dense model to distil from; needs
        --distill-weight.
      dtype: Of the computation; weights stay float32. In float16 the loss is scaled.
      remat: Compute each block again in the backward pass: a third more time, far less memory. By
        itself where a step would not fit into memory.
      no_remat: Never do that; a step that does not fit is an error.
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
    remat: tyro.conf.FlagCreatePairsOff[bool] = False
    no_remat: tyro.conf.FlagCreatePairsOff[bool] = False
    resume: Resume = "auto"
    strategy: StrategyName = "single"
    mesh: str | None = None
    plans: Path | None = None
    cluster: tyro.conf.OmitArgPrefixes[DistributedConfig] = dataclasses.field(
        default_factory=DistributedConfig
    )

    def run(self, console: Console) -> None:
        """Runs the command."""
        if self.remat and self.no_remat:
            raise ValueError("--remat and --no-remat exclude each other: give one, or neither")
        check_installed(parse_names(self.train.report_to))
        # Before anything else: it decides which devices there are.
        self.cluster.start()
        strategy = make_strategy(self.strategy, self.mesh)
        strategy.check(self.train)
        self._check()
        make_folder(self.out)
        with stage("loading the model"):
            pretrained = load_pretrained(self.model, adapter=self.adapter)
            tokenizer = matching_tokenizer(self.model, pretrained)
        window = check_window(self.window, pretrained.spec.n_positions)
        windows, counts = read_windows(
            self.text,
            tokenizer,
            window,
            console,
            validation_source=self.validation_text,
            most_tokens=self.text_tokens,
            loss_on=self.loss_on,
        )
        model = pretrained.model(DTYPES[self.dtype])
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
            remat=True if self.remat else False if self.no_remat else None,
        )
        if not is_first():
            return
        origin = origin_of(self.model, pretrained.folder)
        section = self._card_section(counts, result)
        if result.adapter is not None:
            save_adapter(
                self._adapter,
                model,
                result.adapter,
                base_model=self.model,
                card=adapter_card(self.push or self._adapter.name, model, origin, section),
                overwrite=True,
            )
            console.print(f"wrote {self._adapter}")
        if self._is_merged:
            with stage("writing the model"):
                card = model_card(self.push or self.out.name, model, result.params, origin, section)
                save_pretrained(
                    self._result,
                    model,
                    result.params,
                    tokenizer=tokenizer,
                    overwrite=True,
                    card=card,
                )
            console.print(f"wrote {self._result} (batches {result.data_hash[:12]})")
        if self.push is not None:
            pushed = self._result if self._is_merged else self._adapter
            with stage(f"pushing {pushed}"):
                url = push_to_hub(pushed, self.push, private=self.private or None)
            console.print(f"pushed {pushed} to {self.push}: {url}")

    @property
    def _result(self) -> Path:
        return self.out / "model"

    @property
    def _adapter(self) -> Path:
        return self.out / "adapter"

    @property
    def _is_merged(self) -> bool:
        return self.merge or self.train.recipe != "lora"

    def _check(self) -> None:
        """Checks what can be known to go wrong at the end before anything is done."""
        if self.train.recipe == "lora":
            if self.adapter is not None:
                raise ValueError(
                    "--adapter with --recipe lora: new adapters would be for a model that is "
                    "stored nowhere. Merge these first, in Python: save_pretrained what "
                    "load_pretrained(model, adapter=...) gives"
                )
            self._check_replaceable(self._adapter, ADAPTER_CONFIG)
        elif not self.merge:
            raise ValueError(
                f"--no-merge is for --recipe lora: {self.train.recipe} has no adapters"
            )
        if self._is_merged:
            self._check_replaceable(self._result)
        if self.push is not None and is_first():
            check_push(self.push)

    def _check_replaceable(self, folder: Path, holds: str = "config.json") -> None:
        # What is read stays; the last run's result is replaced.
        sources = [self.model, *filter(None, [self.teacher, self.adapter])]
        check_replaceable(folder, True, sources, holds)

    def _card_section(self, counts: TextCounts, result: TrainResult) -> str:
        config, last = self.train, result.history[-1]
        window = counts.train.targets // counts.train.windows
        tokens = config.steps * config.batch_size * window
        rows = [
            ("recipe", config.recipe),
            ("text", Path(self.text).name),
            ("tokens that the loss counts", self.loss_on),
            ("steps", f"{config.steps} of {config.batch_size} windows, {tokens:,} tokens in all"),
            ("learning rate", f"{config.learning_rate:g}"),
            ("loss of the last batch", f"{last['loss']:.4f} nats a token"),
        ]
        if self.teacher is not None:
            name = origin_of(self.teacher, None).name
            rows.append(("distilled from", f"{name}, with weight {config.distill_weight:g}"))
        if result.adapter is not None:
            ranks = f" ({config.lora_ranks})" if config.lora_ranks else ""
            rows.append(("adapters", f"rank {config.lora_rank}{ranks} on {config.lora_targets}"))
        if (loss := last.get("validation_loss")) is not None:
            held_out = counts.validation.counted
            rows.append(
                ("validation loss", f"{loss:.4f} nats a token over {held_out:,} held-out tokens")
            )
        if (speed := last.get("tokens_per_second")) is not None:
            device = versions()["device"]
            rows.append(("speed of training", f"{speed:,.0f} tokens/s in {self.dtype} on {device}"))
        return f"## Fine-tuned\n\n{table(('', ''), rows)}"
