"""Builds the tokenizer that a GGUF file describes in its metadata.

transformers builds one too, but version 4 only with PyTorch, with begin and end of text exchanged
and with one way to split text for all vocabularies. Here the text is split as llama.cpp splits it
for the file's ``tokenizer.ggml.pre``.
"""

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from sparseffn_jax.checkpoints.errors import CheckpointError, is_failure, one_line
from sparseffn_jax.checkpoints.gguf_header import read_gguf_header

_SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_QWEN2 = _SPLIT_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLIT_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = "digits"
# How text is split before merges apply, by tokenizer.ggml.pre. None is GPT-2's way, which the
# format's first files did not name.
_SPLITS: dict[str, str | None] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2")),
    # GPT-2's way once every digit stands alone.
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _SPLIT_LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _SPLIT_QWEN2),
    "tekken": _SPLIT_TEKKEN,
}
# Where llama.cpp takes a piece that is a token as a whole, and text begins with a token.
_WHOLE_PIECES = (_SPLIT_LLAMA3, _SPLIT_TEKKEN)
# What transformers calls the special tokens, and the format their keys.
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_LONGEST_TOKEN = 1024
# Each takes the tokenizers library a kilobyte and more; Gemma has 6,000, LLaMA 3 has 256.
_MOST_MARKED = 50_000
# Of making a token from two others, on average: so memory stays in proportion to the file.
_MOST_WAYS = 32


class TokenType(enum.IntEnum):
    """What ``tokenizer.ggml.token_type`` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def read_gguf_tokenizer(file: Path) -> Any:
    """Returns the fast tokenizer that a GGUF file describes.

    Its ids are the file's, its control tokens are special, a text begins with the token for that
    where the file or else llama.cpp says so, and the chat template is the file's.

    Raises:
      CheckpointError: if the file is damaged, or its tokenizer is of a kind that is not read.
    """
    settings = read_gguf_header(file).settings
    try:
        return build_tokenizer(settings)
    except ValueError as error:
        raise CheckpointError(f"{file} has {error}") from error
    # The tokenizers library raises bare Exceptions, and panics.
    except BaseException as error:
        if not is_failure(error):
            raise
        raise CheckpointError(
            f"no tokenizer can be built from {file}: {one_line(error)}; the file is damaged, copy "
            "or download it again"
        ) from error


def build_tokenizer(settings: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Returns the fast tokenizer that a GGUF file's metadata describe, as the function above does.

    Raises:
      ValueError: if they are wrong, or the tokenizer is of a kind that is not read.
    """
    kind = settings.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer.ggml.model={str(kind)[:80]!r}: expected gpt2 (byte-level BPE) or llama "
            "(SentencePiece); take the tokenizer from the model's Hugging Face folder"
        )
    tokens = _strings(settings, "tokens")
    if not tokens or len(set(tokens)) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens that are not distinct strings: the file is damaged")
    if (longest := max(map(len, tokens))) > _LONGEST_TOKEN:
        raise ValueError(f"a token of {longest:,} characters: at most {_LONGEST_TOKEN:,} are read")
    special = {
        name: tokens[i]
        for name, key in SPECIAL.items()
        if isinstance(i := settings.get(f"tokenizer.ggml.{key}_token_id"), int)
        and 0 <= i < len(tokens)
    }
    make = _byte_level if kind == "gpt2" else _sentencepiece
    tokenizer, begins = make(settings, tokens, special)
    _mark(tokenizer, tokens, settings)
    _add_ends(tokenizer, tokens, special, settings, begins)
    length = settings.get(f"{settings.get('general.architecture')}.context_length")
    template = settings.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in special.items()},
        **({"model_max_length": length} if isinstance(length, int) else {}),
        **({"chat_template": template} if isinstance(template, str) else {}),
    )


def _byte_level(
    settings: Mapping[str, Any], tokens: list[str], special: Mapping[str, str]
) -> tuple[Tokenizer, bool]:
    """Returns byte-level BPE, and whether a text begins with a token if the file does not say."""
    name = settings.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre={str(name)[:80]!r}: text can be split as for "
            f"{', '.join(_SPLITS)}; take the tokenizer from the model's Hugging Face folder"
        )
    split, merges = _SPLITS[name], []
    vocabulary = {token: i for i, token in enumerate(tokens)}
    for merge in _strings(settings, "merges"):
        left, _, right = merge.partition(" ")
        # Some versions of tokenizers end in a panic where these are no tokens.
        if not vocabulary.keys() >= {left, right, left + right}:
            raise ValueError(
                f"the merge {merge[:80]!r}: expected two tokens, a space between them, that make "
                "another token; the file is damaged"
            )
        merges.append((left, right))
    whole = split in _WHOLE_PIECES
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole))
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if split in (None, _DIGITS)
        else pre_tokenizers.Split(Regex(split), "isolated")
    )
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, _DIGITS))
    steps = pre_tokenizers.Sequence([first, spell])
    tokenizer.pre_tokenizer = spell if split is None else steps
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, whole


def _sentencepiece(
    settings: Mapping[str, Any], tokens: list[str], special: Mapping[str, str]
) -> tuple[Tokenizer, bool]:
    """Returns SentencePiece's BPE with bytes for what is unknown, as LLaMA 2 has it."""
    scores = _numbers(settings, "scores", len(tokens))
    if scores is None:
        raise ValueError("no tokenizer.ggml.scores: SentencePiece needs one for every token")
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            _merges(tokens, scores),
            unk_token=special.get("unk"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if settings.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


def _merges(tokens: list[str], scores: np.ndarray) -> list[tuple[str, str]]:
    """Returns all pairs that make a token, those of the token with the best score first.

    The file has no merges: SentencePiece joins the neighbours whose token has the best score.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    merges, left = [], _MOST_WAYS * sum(map(len, tokens))
    for i in np.argsort(-scores, kind="stable").tolist():
        token = tokens[i]
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        left -= len(token) * len(known)
        if left < 0:
            raise ValueError(
                f"tokens that other tokens make in more than {_MOST_WAYS} ways on average: the "
                "file is damaged"
            )
    return merges


def _mark(tokenizer: Tokenizer, tokens: list[str], settings: Mapping[str, Any]) -> None:
    """Makes control tokens special, and has those that users added found in text as a whole."""
    types = _numbers(settings, "token_type", len(tokens))
    if types is None:
        return
    count = int(np.isin(types, (TokenType.CONTROL, TokenType.USER_DEFINED)).sum())
    if count > _MOST_MARKED:
        raise ValueError(
            f"{count:,} tokens that are special or added by users: at most {_MOST_MARKED:,} are "
            "read"
        )
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        marked = [tokens[i] for i in np.flatnonzero(types == kind)]
        added = [AddedToken(token, normalized=False, special=special) for token in marked]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _add_ends(
    tokenizer: Tokenizer,
    tokens: list[str],
    special: Mapping[str, str],
    settings: Mapping[str, Any],
    begins: bool,
) -> None:
    """Has the tokenizer put the tokens for begin and end around a text where it should."""
    before, after = [], []
    if "bos" in special and settings.get("tokenizer.ggml.add_bos_token", begins):
        before.append(special["bos"])
    if "eos" in special and settings.get("tokenizer.ggml.add_eos_token", False):
        after.append(special["eos"])
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{end}:1" for end in before), "$B:1"]
            + [f"{end}:1" for end in after],
            special_tokens=[(end, tokens.index(end)) for end in {*before, *after}],
        )


def _strings(settings: Mapping[str, Any], key: str) -> list[str]:
    values = settings.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list):
        raise ValueError(
            f"no list of strings as tokenizer.ggml.{key}: the file is damaged, or without tokenizer"
        )
    return values


def _numbers(settings: Mapping[str, Any], key: str, count: int) -> np.ndarray | None:
    values = settings.get(f"tokenizer.ggml.{key}")
    if values is None:
        return None
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise ValueError(
            f"tokenizer.ggml.{key} that are not {count:,} numbers, one for each token: the file is "
            "damaged"
        )
    return values
