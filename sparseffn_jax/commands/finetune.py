"""The command ``sparseffn finetune``."""

from pathlib import Path
from typing import Any

from rich.console import Console

from sparseffn_jax.checkpoints.adapters import save_adapter
from sparseffn_jax.checkpoints.cards import adapter_card, model_card, origin_of, table
from sparseffn_jax.checkpoints.hub import check_push, push_to_hub
from sparseffn_jax.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained
from sparseffn_jax.commands.arguments.finetune import FinetuneArguments
from sparseffn_jax.commands.common import DTYPES, matching_tokenizer, read_windows
from sparseffn_jax.measure.records import make_folder, versions
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.progress import stage
from sparseffn_jax.train.choices import parse_reporters
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.data import TextCounts
from sparseffn_jax.train.loop import TrainResult, train
from sparseffn_jax.train.processes import is_first, leaving_together
from sparseffn_jax.train.reporters import check_installed
from sparseffn_jax.train.strategies import make_strategy


class Finetune(FinetuneArguments):
    """Fine-tunes a dense or sparse model."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        check_installed(parse_reporters(self.train.report_to))
        # Before JAX is used: it decides which devices there are.
        self.cluster.start()
        strategy = make_strategy(self.strategy, self.mesh)
        config = self.train.config(strategy.batch_shards)
        strategy.check(config)
        if self.push is not None and is_first():
            check_push(self.push)
        make_folder(self.out)
        with stage("loading the model"):
            pretrained = load_pretrained(self.model, adapter=self.adapter)
            tokenizer = matching_tokenizer(self.model, pretrained)
        windows, counts = read_windows(
            self, tokenizer, pretrained.spec.n_positions, console, self.loss_on
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
            config,
            self.out,
            teacher=teacher,
            strategy=strategy,
            resume=self.resume,
            remat=self.remat,
        )
        with leaving_together("written"):
            if is_first():
                section = self._card_section(config, counts, result)
                self._write(console, pretrained, model, tokenizer, result, section)

    def _write(
        self,
        console: Console,
        pretrained: Pretrained,
        model: Decoder,
        tokenizer: Any,
        result: TrainResult,
        section: str,
    ) -> None:
        origin = origin_of(self.model, pretrained.folder)
        if result.adapter is not None:
            save_adapter(
                self.adapters,
                model,
                result.adapter,
                base_model=self.model,
                card=adapter_card(self.push or self.adapters.name, model, origin, section),
                overwrite=True,
            )
            console.print(f"wrote {self.adapters}")
        if self.is_merged:
            with stage("writing the model"):
                card = model_card(self.push or self.out.name, model, result.params, origin, section)
                save_pretrained(
                    self.result,
                    model,
                    result.params,
                    tokenizer=tokenizer,
                    overwrite=True,
                    card=card,
                )
            console.print(f"wrote {self.result} (batches {result.data_hash[:12]})")
        if self.push is not None:
            pushed = self.result if self.is_merged else self.adapters
            with stage(f"pushing {pushed}"):
                url = push_to_hub(pushed, self.push, private=self.private or None)
            console.print(f"pushed {pushed} to {self.push}: {url}")

    def _card_section(self, config: TrainConfig, counts: TextCounts, result: TrainResult) -> str:
        # Of the last step, if it was not kept, there is the validation loss alone.
        history = result.history[::-1]
        last = next((record for record in history if "loss" in record), {})
        validated = next((record for record in history if "validation_loss" in record), {})
        window = counts.train.targets // counts.train.windows
        tokens = config.steps * config.batch_size * window
        rows = [
            ("recipe", config.recipe),
            ("text", Path(self.text).name),
            ("tokens that the loss counts", self.loss_on),
            ("steps", f"{config.steps} of {config.batch_size} windows, {tokens:,} tokens in all"),
            ("learning rate", f"{config.peak_rates[0]:g}, {config.schedule}, {config.optimizer}"),
        ]
        # Of a mixed loss the part that can be compared.
        if (loss := last.get("cross_entropy", last.get("loss"))) is not None:
            rows.append(("cross-entropy of the last batch", f"{loss:.4f} nats a token"))
        if self.teacher is not None:
            name = origin_of(self.teacher, None).name
            rows.append(("distilled from", f"{name}, with weight {config.distill_weight:g}"))
        if result.adapter is not None:
            ranks = f" ({config.lora_ranks})" if config.lora_ranks else ""
            rows.append(("adapters", f"rank {config.lora_rank}{ranks} on {config.lora_targets}"))
        if (loss := validated.get("validation_loss")) is not None:
            held_out = counts.validation.counted
            rows.append(
                ("validation loss", f"{loss:.4f} nats a token over {held_out:,} held-out tokens")
            )
        if (speed := last.get("tokens_per_second")) is not None:
            device = versions()["device"]
            rows.append(("speed of training", f"{speed:,.0f} tokens/s in {self.dtype} on {device}"))
        return f"## Fine-tuned\n\n{table(('', ''), rows)}"
