"""The command ``sparseffn generate``."""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from sparseffn_jax.checkpoints.pretrained import Pretrained, load_pretrained
from sparseffn_jax.commands.arguments.generate import GenerateArguments
from sparseffn_jax.commands.common import matching_tokenizer
from sparseffn_jax.models.generation import Sampling
from sparseffn_jax.models.text_generation import generate_text, stream_text
from sparseffn_jax.progress import counter, stage
from sparseffn_jax.train.documents import read_text
from sparseffn_jax.train.sources import JSON_LINES

_PROMPT = "def read_config(path):\n"
# A conversation's prompts are padded to multiples of this, so that few programs are compiled.
_TURN = 128


class Generate(GenerateArguments):
    """Continues prompts."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        sampling = Sampling(self.repetition_penalty, self.temperature, self.top_k, self.top_p)
        converses = self.chat and self.prompt is None and self.prompt_file is None
        if converses and not sys.stdin.isatty():
            raise ValueError("chat needs a message: give --prompt, or --prompt - to read it")
        prompts = [] if converses else self._prompts()
        with stage("loading the model"):
            pretrained = load_pretrained(self.model)
            tokenizer = matching_tokenizer(self.model, pretrained)
        if self.chat and not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {self.model} has no chat template, it is no chat model: leave "
                "out --chat"
            )
        writer = _Writer(self, pretrained, tokenizer, sampling)
        if converses:
            self._converse(writer, tokenizer, console)
            return
        inputs = prompts
        if self.chat:
            inputs = [_as_chat(tokenizer, [_message("user", prompt)]) for prompt in prompts]
        if len(prompts) == 1 and not self.json:
            before = "" if self.chat else prompts[0]
            _show(writer.stream(inputs[0], before=before), console)
            return
        with counter("continuing prompts") as count:
            for done, text in enumerate(writer.texts(inputs), 1):
                if self.json:
                    record = {"prompt": prompts[done - 1], "text": text}
                    print(json.dumps(record, ensure_ascii=False), flush=True)
                else:
                    before = "" if self.chat else prompts[done - 1]
                    console.out(before + text, highlight=False)
                count(done, len(prompts))

    def _prompts(self) -> list[str]:
        if self.prompt_file is not None:
            return read_prompts(self.prompt_file)
        prompt = _PROMPT if self.prompt is None else self.prompt
        if prompt == "-":
            # The line end that every program leaves is none of the prompt's.
            prompt = sys.stdin.read().removesuffix("\n")
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        return [prompt]

    def _converse(self, writer: "_Writer", tokenizer: Any, console: Console) -> None:
        console.print("Ctrl-D ends the conversation.", style="dim")
        messages: list[dict[str, str]] = []
        while True:
            try:
                said = input("> ")
            except EOFError:
                return
            if not said.strip():
                continue
            messages.append(_message("user", said))
            ids = _as_chat(tokenizer, messages)
            turns = -(-len(ids) // _TURN)
            answer = _show(writer.stream(ids, least_length=turns * _TURN), console)
            messages.append(_message("assistant", answer))


class _Writer:
    """What continues prompts, as the arguments say."""

    def __init__(
        self, arguments: GenerateArguments, pretrained: Pretrained, tokenizer: Any, how: Sampling
    ):
        self._arguments, self._tokenizer = arguments, tokenizer
        self._model = pretrained.model(), pretrained.params, tokenizer
        self._how = how
        self._key = jax.random.key(arguments.seed)
        self._n_positions = pretrained.spec.n_positions

    def stream(
        self, prompt: str | Sequence[int], *, before: str = "", least_length: int = 0
    ) -> Iterator[str]:
        """Yields ``before`` and one prompt's continuation, piece by piece."""
        limit = self._arguments.max_new_tokens
        pieces = stream_text(
            *self._model, [self._ids(prompt)], limit, self._how,
            stop=self._arguments.stop, key=self._key,
            least_length=min(least_length, self._n_positions - limit),
        )  # fmt: skip
        with stage("compiling"):
            first = next(pieces)
        # On a terminal, what is said of compiling clears the line that it stands on.
        for (piece,) in itertools.chain([(before,), first], pieces):
            yield piece

    def texts(self, prompts: Sequence[str | Sequence[int]]) -> Iterator[str]:
        """Yields the prompts' continuations; ``batch_size`` prompts are continued at once."""
        ids = [self._ids(prompt) for prompt in prompts]
        # One length for all batches: one program.
        longest, size = max(map(len, ids)), self._arguments.batch_size
        for start in range(0, len(ids), size):
            yield from generate_text(
                *self._model, ids[start : start + size], self._arguments.max_new_tokens, self._how,
                stop=self._arguments.stop, key=jax.random.fold_in(self._key, start),
                least_length=longest,
            )  # fmt: skip

    def _ids(self, prompt: str | Sequence[int]) -> Sequence[int]:
        return self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def read_prompts(path: Path) -> list[str]:
    """Returns the prompts of a file.

    Args:
      path: a text file with a prompt in each line, or a ``.jsonl`` file with one in each line's
        ``"prompt"``.

    Raises:
      ValueError: if the file has no prompts, is not UTF-8, or a line of JSON has no prompt.
    """
    prompts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        prompt = line.removesuffix("\r")
        if path.suffix == JSON_LINES:
            try:
                prompt = json.loads(line)["prompt"]
            except (KeyError, RecursionError, TypeError, ValueError):
                prompt = None
            if not isinstance(prompt, str) or not prompt:
                raise ValueError(
                    f'{path}, line {number}: expected a JSON object with a string "prompt"'
                )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"no prompts found in {path}: it is empty")
    return prompts


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _as_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The template has the special tokens already.
    return tokenizer.encode(text, add_special_tokens=False)


def _show(pieces: Iterator[str], console: Console) -> str:
    text = ""
    for piece in pieces:
        console.out(piece, end="", highlight=False)
        console.file.flush()
        text += piece
    console.out()
    return text
