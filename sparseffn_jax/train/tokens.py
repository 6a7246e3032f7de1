"""Tokenizes documents, and says which of their tokens a loss on completions counts.

A text and the completion of a prompt end with an end-of-text token. A chat is what the tokenizer's
own template makes of it; an end-of-text token parts it from the next document where the template
does not end with one.

What is counted: behind a prompt all that follows, the end-of-text token included; in a chat what
the assistant says. If the template marks that (``{% generation %}``), its mask is taken. Otherwise
the beginnings of the chat are rendered and tokenized too, and a turn is what lies behind the tokens
that the whole has in common with the beginning up to the turn: so TRL finds completions
(https://huggingface.co/docs/trl/sft_trainer). Texts have no prompt: all their tokens count.
"""

import itertools
import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sparseffn_jax.checkpoints.errors import one_line
from sparseffn_jax.checkpoints.tokenizers import whole_texts
from sparseffn_jax.train.choices import LossOn
from sparseffn_jax.train.documents import AnyDocument, Chat, Completion, Document

# Documents that are tokenized together, by all processors.
_TOGETHER = 1024


class Tokens(NamedTuple):
    """A document's tokens.

    Attributes:
      document: the document.
      ids: its token ids, int32.
      counted: which of them the loss counts.
    """

    document: AnyDocument
    ids: Int[np.ndarray, " n"]
    counted: Bool[np.ndarray, " n"]


class _Rendered(NamedTuple):
    """The texts of a document that are tokenized.

    Attributes:
      whole: all of it.
      beginnings: parts that it begins with. Behind the first of them counted tokens begin, behind
        the second others, and so on in turn.
      mask: which tokens of the whole count behind the only beginning.
    """

    whole: str
    beginnings: list[str]
    mask: list[int] | None = None


def tokenize(
    documents: Iterable[AnyDocument], tokenizer: Any, loss_on: LossOn = "all"
) -> Iterator[Tokens]:
    """Yields the documents' tokens, in order.

    Args:
      documents: the documents.
      tokenizer: a transformers fast tokenizer with an end-of-text token and, if there are chats, a
        chat template.
      loss_on: whether all tokens count, or those of completions.

    Raises:
      ValueError: if the tokenizer lacks what the documents need, or a chat's template refuses it or
        does not show where the assistant's turns begin and end; the message names the place.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token) to part documents")
    together: list[tuple[AnyDocument, _Rendered]] = []
    for document in documents:
        together.append((document, _render(document, tokenizer, loss_on)))
        if len(together) == _TOGETHER:
            yield from _encode(together, tokenizer, loss_on)
            together = []
    yield from _encode(together, tokenizer, loss_on)


def marks_completions(tokenizer: Any) -> bool:
    """Says whether the tokenizer's chat template marks what the assistant says."""
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()))


def _encode(
    together: list[tuple[AnyDocument, _Rendered]], tokenizer: Any, loss_on: LossOn
) -> Iterator[Tokens]:
    texts = [text for _, rendered in together for text in (rendered.whole, *rendered.beginnings)]
    with whole_texts(tokenizer) as backend:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    rows = (np.array(encoding.ids, np.int32) for encoding in encodings)
    for document, rendered in together:
        ids = next(rows)
        beginnings = [next(rows) for _ in rendered.beginnings]
        counted = _counted(ids, beginnings, rendered.mask)
        has_end = rendered.whole.rstrip().endswith(tokenizer.eos_token)
        if isinstance(document, Document) or not has_end:
            ids = np.append(ids, np.int32(tokenizer.eos_token_id))
            # The template does not end with it: what is tuned for chats need not say it.
            counted = np.append(counted, loss_on == "all" or not isinstance(document, Chat))
        yield Tokens(document, ids, counted)


def _counted(
    ids: Int[np.ndarray, " n"], beginnings: list[Int[np.ndarray, "..."]], mask: list[int] | None
) -> Bool[np.ndarray, " n"]:
    """Returns which tokens of a whole count, as :class:`_Rendered` describes."""
    counted = np.zeros(len(ids), bool)
    ends = [_common(ids, beginning) for beginning in beginnings]
    if mask is not None:
        counted[ends[0] :] = mask[ends[0] :]
        return counted
    for start, stop in itertools.zip_longest(ends[::2], ends[1::2]):
        counted[start:stop] = True
    return counted


def _common(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " m"]) -> int:
    """Returns the number of tokens at the beginning that two rows have in common."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if len(differ) else shorter


def _render(document: AnyDocument, tokenizer: Any, loss_on: LossOn) -> _Rendered:
    if isinstance(document, Document):
        return _Rendered(document.text, [""])
    if isinstance(document, Completion):
        prompt = document.prompt if loss_on == "completion" else ""
        return _Rendered(document.prompt + document.completion, [prompt])
    if not tokenizer.chat_template:
        raise ValueError(
            f"{document.place}: messages need a chat template, and the tokenizer has none: take "
            'that of a model tuned for chats, or give "prompt" and "completion" as strings'
        )
    whole = _apply(tokenizer, document)
    if loss_on == "all":
        return _Rendered(whole, [""])
    if not marks_completions(tokenizer):
        return _Rendered(whole, _turns(document, whole, tokenizer))
    given = _apply(tokenizer, document, document.given, prompt=True) if document.given else ""
    masked = _apply(
        tokenizer,
        document,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        # Of texts longer than the model reads at once, which are cut into windows.
        tokenizer_kwargs={"verbose": False},
    )
    return _Rendered(whole, [given], masked["assistant_masks"])


def _turns(chat: Chat, whole: str, tokenizer: Any) -> list[str]:
    """Returns a chat's beginnings up to, and through, each turn of the assistant."""
    beginnings = []
    for i in range(chat.given, len(chat.messages)):
        if chat.messages[i]["role"] != "assistant":
            continue
        # Templates refuse chats without messages, of which there is nothing to count anyway.
        before = _apply(tokenizer, chat, i) if i else ""
        header = _apply(tokenizer, chat, i, prompt=True) if i else ""
        ends = [] if i + 1 == len(chat.messages) else [_apply(tokenizer, chat, i + 1)]
        stable = before.removesuffix(tokenizer.eos_token)
        if not (
            whole.startswith(stable)
            and header.startswith(stable)
            and all(whole.startswith(end.removesuffix(tokenizer.eos_token)) for end in ends)
        ):
            raise ValueError(
                f"{chat.place}: the tokenizer's chat template renders messages otherwise when "
                f"others follow, so that it is not to be seen which tokens message {i} has: take "
                "a template that marks them with {% generation %}, or count all tokens"
            )
        beginnings += [header, *ends]
    # Without a turn of the assistant nothing counts.
    return beginnings or [whole]


def _apply(
    tokenizer: Any,
    chat: Chat,
    count: int | None = None,
    *,
    prompt: bool = False,
    tokenize: bool = False,
    **options: Any,
) -> Any:
    """Returns what the tokenizer's template makes of a chat's first ``count`` messages, or all."""
    try:
        return tokenizer.apply_chat_template(
            chat.messages[:count],
            tools=chat.tools,
            add_generation_prompt=prompt,
            tokenize=tokenize,
            **options,
        )
    # A template is a program, and may fail as any.
    except Exception as error:
        raise ValueError(
            f"{chat.place}: the tokenizer's chat template cannot render the messages: "
            f"{one_line(error)}; found {reprlib.repr(chat.messages[:count])}"
        ) from error
