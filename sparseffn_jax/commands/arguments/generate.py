"""The arguments of ``sparseffn generate``."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from sparseffn_jax.commands.arguments.common import check_at_least, check_files, check_models
from sparseffn_jax.commands.parser import Arguments
from sparseffn_jax.defaults import EMBEDDED_MODEL


@dataclasses.dataclass(frozen=True)
class GenerateArguments(Arguments):
    """Continue a prompt, or many; the text appears as it is written.

    Attributes:
      model: Folder, GGUF file or hub name of a dense or sparse model.
      prompt: Text to continue, or "-" to read it from standard input.
      prompt_file: File of prompts, which are continued together: one in each line, or in a .jsonl
        file one in each line's "prompt".
      chat: Take the prompt for a message to a chat model, and write the answer. On a terminal, with
        no prompt, a conversation.
      max_new_tokens: Tokens to add at most; an end-of-text token ends the text before.
      temperature: Boldness of the choice of tokens; 0 takes the likeliest one.
      top_k: Number of likeliest tokens to sample from.
      top_p: Probability of the smallest set of likeliest tokens to sample from.
      repetition_penalty: Number above 1 that makes tokens that are there already less likely.
      stop: Strings that end the text; they are not printed.
      seed: Seed of sampling.
      batch_size: Prompts of --prompt-file that are continued at once.
      json: Print one JSON object a prompt, with "prompt" and "text", instead of the text.
      plans: Table of measured execution plans, as "sparseffn inspect --autotune" writes it.
    """

    example = 'sparseffn generate --model run/model --prompt "The meaning of" --top-p 0.9'
    groups: ClassVar = {
        "options": ("model", "prompt", "prompt_file", "chat", "max_new_tokens", "stop"),
        "sampling": ("temperature", "top_k", "top_p", "repetition_penalty", "seed"),
        "batches and output": ("batch_size", "json", "plans"),
    }

    model: str = str(EMBEDDED_MODEL)
    prompt: str | None = None
    prompt_file: Path | None = None
    chat: bool = False
    max_new_tokens: int = 120
    temperature: float = 0.6
    top_k: int | None = 40
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 8
    json: bool = False
    plans: Path | None = None

    def check(self) -> None:
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt-file exclude each other: give one")
        check_at_least(1, self, "max_new_tokens", "batch_size", "top_k")
        check_at_least(0, self, "temperature", "seed")
        check_models(self.model)
        check_files([self.prompt_file, self.plans])
