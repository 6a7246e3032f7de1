"""Describes a tokenizer in the metadata of a GGUF file.

Which of the format's ways to split text a tokenizer has is found by trying them: the one is written
with which :func:`build_tokenizer`, which reads such metadata, gives the same tokens.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.gguf_tokenizer import SPECIAL, TokenType, build_tokenizer

# One name of tokenizer.ggml.pre for each way to split.
_PRES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
# Wherever two ways to split text differ, they differ on some of this.
_PROBE = (
    "def f(x):\n    return  12 + x3456  # 345\n\n\t'It's' we'LL naïve,\u0301 ½ of 2026: 日本語 é\n"
    " \U0001f600 \u00a0camelCase HTTPServer//\n\n\n  1. a list!!!\r\n   ٣٤ ___ Ünïcödé'sx <a/>   "
)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary(tokenizer: Any, size: int) -> dict[str, Any]:
    """Returns a tokenizer's settings in a GGUF file, by the key after ``tokenizer.``.

    Args:
      tokenizer: a fast transformers tokenizer; ``None`` stands for a file without one.
      size: the number of the model's embeddings, which may exceed that of the tokens.

    Raises:
      CheckpointError: if llama.cpp has no such tokenizer.
    """
    if tokenizer is None:
        return {"ggml.model": "none"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"a tokenizer of the kind {model.get('type', type(tokenizer).__name__)}: llama.cpp "
            "gets byte-level BPE, or SentencePiece's BPE"
        )
    shared = _shared(tokenizer, backend, size)
    tried = _sentencepiece(model, shared) if model.get("byte_fallback") else _byte_level(model)
    for settings in tried:
        if _is_same(tokenizer, settings := shared | settings):
            return settings
    raise CheckpointError(
        "the tokenizer splits text in a way that GGUF files have no name for, or that this library "
        "does not know: leave it out, and give llama.cpp token ids"
    )


def _shared(tokenizer: Any, backend: Any, size: int) -> dict[str, Any]:
    ids = backend.get_vocab(with_added_tokens=True)
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in ids.items():
        tokens[i] = token
        types[i] = TokenType.BYTE if _BYTE.fullmatch(token) else TokenType.NORMAL
    for i, token in backend.get_added_tokens_decoder().items():
        types[i] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    special = {
        f"ggml.{key}_token_id": i
        for name, key in SPECIAL.items()
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    plain, whole = tokenizer.encode("x", add_special_tokens=False), tokenizer.encode("x")
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return {
        "ggml.tokens": tokens,
        "ggml.token_type": [int(kind) for kind in types],
        **special,
        "ggml.add_bos_token": whole[:1] == [tokenizer.bos_token_id] and whole[:1] != plain[:1],
        "ggml.add_eos_token": whole[-1:] == [tokenizer.eos_token_id] and whole[-1:] != plain[-1:],
        **({"chat_template": template} if template else {}),
    }


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    # Older versions of tokenizers write both tokens in one string.
    merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in merges]


def _byte_level(model: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    merges = [f"{left} {right}" for left, right in _pairs(model)]
    for pre in _PRES:
        yield {"ggml.model": "gpt2", "ggml.pre": pre, "ggml.merges": merges}


def _sentencepiece(model: Mapping[str, Any], shared: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    # SentencePiece joins the neighbours whose token has the best score: the first merge's.
    ranks: dict[str, int] = {}
    for i, (left, right) in enumerate(_pairs(model)):
        ranks.setdefault(left + right, i)
    scores = [-float(ranks.get(token, len(ranks))) for token in shared["ggml.tokens"]]
    for prefix in (True, False):
        yield {"ggml.model": "llama", "ggml.scores": scores, "ggml.add_space_prefix": prefix}


def _is_same(tokenizer: Any, settings: Mapping[str, Any]) -> bool:
    arrays = ("ggml.token_type", "ggml.scores")
    read = {key: np.asarray(value) if key in arrays else value for key, value in settings.items()}
    rebuilt = build_tokenizer({f"tokenizer.{key}": value for key, value in read.items()})
    return rebuilt.encode(_PROBE) == tokenizer.encode(_PROBE)
