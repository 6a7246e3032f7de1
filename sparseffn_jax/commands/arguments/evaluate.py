"""The arguments of ``sparseffn evaluate``."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from sparseffn_jax.commands.arguments.common import check_at_least, check_files, check_models
from sparseffn_jax.commands.parser import Arguments
from sparseffn_jax.measure.records import check_folder
from sparseffn_jax.train.choices import LossOn
from sparseffn_jax.train.sources import check_source


@dataclasses.dataclass(frozen=True)
class EvaluateArguments(Arguments):
    """Measure a model's loss on a text, in nats a token over the whole text.

    The text is cut into non-overlapping windows; every token but the text's first is predicted
    once, from what stands before it in its window. With --stride the windows overlap, so that
    every token is predicted from at least window - stride others: slower and lower, the
    perplexity that Hugging Face documents for models of fixed length.

    Attributes:
      model: Folder, GGUF file or hub name of a dense or sparse model.
      text: Text to evaluate on: a file, a folder or a dataset, whose texts are joined by blank
        lines, and whose prompts, completions and messages by what ends them in training.
      loss_on: Whether all tokens count or completions alone: what follows prompts, or what the
        assistant says.
      window: Tokens in a window, by default n_positions or 1024 if that is less.
      stride: Tokens between the beginnings of two windows.
      batch_size: Windows computed at once; it changes the time, not the result. The default is 8,
        or 2 on a CPU, whose caches hold no more.
      plans: Table of measured execution plans, as "sparseffn inspect --autotune" writes it.
      json: File to write loss, tokens and perplexity to.
    """

    example = "sparseffn evaluate --model run/model --text held_out.txt --json loss.json"
    groups: ClassVar = {
        "options": ("model", "text", "loss_on", "json", "window", "stride", "batch_size", "plans")
    }

    model: str
    text: str
    loss_on: LossOn = "all"
    window: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    plans: Path | None = None
    json: Path | None = None

    def check(self) -> None:
        check_at_least(1, self, "window", "stride", "batch_size")
        check_models(self.model)
        check_files([self.plans])
        if self.stride is not None and self.loss_on != "all":
            raise ValueError("--stride counts all tokens: leave out --loss-on, or --stride")
        check_source(self.text)
        if self.json is not None:
            check_folder(self.json.parent)
