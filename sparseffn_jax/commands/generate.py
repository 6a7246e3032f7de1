"""The command ``sparseffn generate``."""

import dataclasses
import itertools
from pathlib import Path

import jax
from rich.console import Console

from sparseffn_jax.checkpoints.pretrained import EMBEDDED_MODEL, load_pretrained
from sparseffn_jax.commands.common import matching_tokenizer
from sparseffn_jax.models.generation import Sampling
from sparseffn_jax.models.text_generation import stream_text
from sparseffn_jax.progress import stage


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt; the text appears as it is written.

    Attributes:
      model: Folder, GGUF file or hub name, dense or sparse.
      prompt: The beginning.
      max_new_tokens: Tokens to add at most; an end-of-text token ends the text before.
      temperature: 0 takes the likeliest token; higher is bolder.
      top_k: Sample from the k likeliest tokens only.
      top_p: Sample from the likeliest tokens only, as few as have this probability together.
      repetition_penalty: Above 1 makes tokens that are there already less likely.
      stop: Strings that end the text; they are not printed.
      plans: Table of measured plans to choose by, as "inspect --autotune" writes it.
      seed: Of sampling.
    """

    model: str = str(EMBEDDED_MODEL)
    prompt: str = "def read_config(path):\n"
    max_new_tokens: int = 120
    temperature: float = 0.6
    top_k: int | None = 40
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    plans: Path | None = None
    seed: int = 0

    def run(self, console: Console) -> None:
        """Runs the command."""
        sampling = Sampling(self.repetition_penalty, self.temperature, self.top_k, self.top_p)
        with stage("loading the model"):
            pretrained = load_pretrained(self.model)
            tokenizer = matching_tokenizer(self.model, pretrained)
        pieces = stream_text(
            pretrained.model(),
            pretrained.params,
            tokenizer,
            [self.prompt],
            self.max_new_tokens,
            sampling,
            stop=self.stop,
            key=jax.random.key(self.seed),
        )
        with stage("compiling"):
            first = next(pieces)
        for (piece,) in itertools.chain([(self.prompt,), first], pieces):
            console.out(piece, end="", highlight=False)
            console.file.flush()
        console.out()
