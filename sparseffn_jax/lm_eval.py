"""lm-evaluation-harness on dense and sparse models.

    python -m sparseffn_jax.lm_eval --model sparseffn --model_args pretrained=DIR \
        --tasks lambada_openai

is the harness' own command line after this module has registered its model; in Python, importing
the module registers it. Needs ``pip install 'sparseffn_jax[eval]'``.
"""

import itertools
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sparseffn_jax.checkpoints.pretrained import load_pretrained
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer, load_tokenizer
from sparseffn_jax.evaluate.perplexity import make_scorer
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.models.generation import Sampling
from sparseffn_jax.models.text_generation import generate_text

_DEFAULT_NEW_TOKENS = 256


@register_model("sparseffn")
class SparseFFNLM(TemplateLM):
    """A decoder as the harness sees it: texts in, log-likelihoods and continuations out.

    Args:
      pretrained: folder or hub name, dense or sparse.
      batch_size: rows computed at once.
      max_length: of the inputs, in tokens; by default all that the model has positions for.
      dtype: of the computation.
      seed: of sampling, where a task asks for it.
      device: given by the harness for PyTorch's sake; JAX runs where ``JAX_PLATFORMS`` says.
      max_batch_size: of the harness's search for a batch size, which there is none of here.

    Raises:
      ValueError: if the model cannot be loaded or a setting does not fit it.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        max_length: int | None = None,
        dtype: str = "float32",
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} must be a number, at least 1")
        loaded = load_pretrained(pretrained)
        self.tokenizer = load_tokenizer(pretrained)
        check_tokenizer(self.tokenizer, loaded.config)
        self.max_length = check_window(max_length, loaded.spec.n_positions)
        self._model, self._params = loaded.model(jnp.dtype(dtype)), loaded.params
        self._batch_size, self._name = int(batch_size), pretrained
        self._score = make_scorer(self._model, self.max_length, self._batch_size)
        self._key = jax.random.key(seed)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens), **kwargs)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_
    ) -> list[tuple[float, bool]]:
        counts = [len(continuation) for _, _, continuation in requests]
        if max(counts, default=0) > self.max_length:
            raise ValueError(
                f"a continuation of {max(counts)} tokens does not fit max_length={self.max_length}"
            )
        # The end of what does not fit, as the harness' own models do it.
        rows = [(a + b)[-(self.max_length + 1) :] for _, a, b in requests]
        log_probs, is_greedy = self._score(self._params, rows, counts)
        answers = list(zip(log_probs.tolist(), is_greedy.tolist(), strict=True))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        rows, counts, owners = [], [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for context, predicted in map(make_disjoint_window, windows):
                rows.append(context + predicted)
                counts.append(len(predicted))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, log_prob in zip(owners, self._score(self._params, rows, counts)[0], strict=True):
            totals[owner] += float(log_prob)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]  # pyright: ignore[reportGeneralTypeIssues]
        # Prompts of like settings and lengths run together.
        order = sorted(range(len(requests)), key=lambda i: (settings[i], len(prompts[i])))
        for setting, group in itertools.groupby(order, key=settings.__getitem__):
            numbers = list(group)
            texts = self._generate([prompts[i] for i in numbers], **json.loads(setting))
            for i, text in zip(numbers, texts, strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _generate(
        self,
        prompts: list[list[int]],
        until: str | Sequence[str] = (),
        max_gen_toks: int | None = None,
        do_sample: bool = False,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        new = max_gen_toks or min(_DEFAULT_NEW_TOKENS, self.max_length // 2)
        room = self.max_length - new
        if room < 1:
            raise ValueError(
                f"max_gen_toks={new} leaves no room for a prompt in max_length={self.max_length}"
            )
        until = [until] if isinstance(until, str) else until
        texts = []
        for start in range(0, len(prompts), self._batch_size):
            batch = [
                ids[-room:] or [self.prefix_token_id] for ids in prompts[start:][: self._batch_size]
            ]
            longest = max(map(len, batch))
            # Whole batches of few lengths, so that few programs are compiled.
            padded = batch + batch[:1] * (self._batch_size - len(batch))
            texts += generate_text(
                self._model,
                self._params,
                self.tokenizer,
                padded,
                new,
                Sampling(repetition_penalty, temperature if do_sample else 0.0, top_k, top_p),
                stop=until,
                key=jax.random.fold_in(self._key, start),
                least_length=min(room, 1 << (longest - 1).bit_length()),
            )[: len(batch)]
        return texts


if __name__ == "__main__":
    cli_evaluate()
