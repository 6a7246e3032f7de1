"""The data pipeline: tokenises text, splits it, cuts windows and shuffles them.

The pipeline is a pure function of (source, tokenizer, window, seed), so that two runs see the same
batches. The state of a grain iterator, a small JSON object, records the position of a run.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int

from sparseffn_jax.checkpoints.tokenizers import whole_texts
from sparseffn_jax.defaults import STDLIB
from sparseffn_jax.evaluate.windows import cut_windows
from sparseffn_jax.train.choices import LossOn
from sparseffn_jax.train.documents import AnyDocument, Chat, Document, Source
from sparseffn_jax.train.tokens import Tokens, marks_completions, tokenize

_PIECE_CHARACTERS = 16_384


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """How much text one split has.

    Attributes:
      documents: number of documents, or of pieces of them.
      tokens: number of their tokens.
      windows: number of windows cut from them. What does not fill the last one is left out, and so
        are windows of which nothing counts.
      targets: number of tokens that the windows predict.
      counted: number of targets that the loss counts.

    Example:
      >>> import sparseffn_jax as sf
      >>> split = sf.SplitCounts(documents=3, tokens=170, windows=10, targets=160, counted=160)
      >>> split.tokens - split.targets  # The first token, and what fills no window.
      10
    """

    documents: int
    tokens: int
    windows: int
    targets: int
    counted: int


@dataclasses.dataclass(frozen=True)
class TextCounts:
    r"""How much text was read, and what was not.

    Attributes:
      train: the training split.
      validation: the validation split.
      loss_on: ``"all"`` or ``"completion"``.
      turns: how the assistant's turns were found: ``"generation"`` by the chat template's own
        marks, ``"prefix"`` by rendering the beginnings of the chats; ``None`` if that was not
        asked for, or if there are no chats.
      unread: the files of folders that are of no known format: how many there are by suffix.
      empty: number of documents without any text, which are left out.

    Example:
      >>> import pathlib, tempfile
      >>> import sparseffn_jax as sf
      >>> tokenizer = sf.load_tokenizer(sf.EMBEDDED_MODEL)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = pathlib.Path(folder, "book.txt").write_text("import os, sys\n" * 400)
      ...     _ = pathlib.Path(folder, "cover.png").write_bytes(b"")
      ...     counts = sf.load_windows(folder, tokenizer, window=16).counts
      >>> counts.unread
      {'.png': 1}
      >>> counts.validation.tokens < counts.train.tokens / 15
      True
    """

    train: SplitCounts
    validation: SplitCounts
    loss_on: LossOn
    turns: str | None
    unread: dict[str, int]
    empty: int

    def lines(self) -> list[str]:
        """Returns what a user should know, in lines."""
        lines = []
        for name, split in (("training", self.train), ("validation", self.validation)):
            line = (
                f"{name} text: {split.tokens:,} tokens in {split.documents:,} documents, "
                f"{split.windows:,} windows that predict {split.targets:,}"
            )
            lines.append(line + f", loss on {split.counted:,}" * (self.loss_on == "completion"))
        if self.turns is not None:
            how = {"generation": "by the template's marks", "prefix": "by rendered prefixes"}
            lines.append(f"the assistant's turns were found {how[self.turns]}")
        return lines + left_out(self.unread, self.empty)


@dataclasses.dataclass(frozen=True)
class TokenWindows:
    """Windows of token ids of one length, for training and for validation.

    Attributes:
      train: token ids ``(n, window + 1)``, int32; the inputs are ``[:, :-1]`` and the targets
        ``[:, 1:]``.
      validation: token ids ``(k, window + 1)``, int32, from documents of which ``train`` has no
        part.
      train_counted: bools ``(n, window)``: which targets the loss counts; ``None`` if all.
      validation_counted: bools ``(k, window)``, likewise.
      counts: how much text there was; ``None`` if the windows were not read by
        :func:`load_windows`.

    Raises:
      ValueError: on construction, if what counts has not the targets' shape, or is nothing.

    Example:
      >>> import numpy as np
      >>> import sparseffn_jax as sf
      >>> tokens = np.arange(170, dtype=np.int32).reshape(10, 17)
      >>> windows = sf.TokenWindows(train=tokens[2:], validation=tokens[:2])
      >>> windows.train[:, :-1].shape  # Eight windows of sixteen inputs.
      (8, 16)
    """

    train: Int[np.ndarray, "n w"]
    validation: Int[np.ndarray, "k w"]
    train_counted: Bool[np.ndarray, "n t"] | None = None
    validation_counted: Bool[np.ndarray, "k t"] | None = None
    counts: TextCounts | None = None

    def __post_init__(self):
        for name in ("train", "validation"):
            windows, counted = getattr(self, name), getattr(self, f"{name}_counted")
            if counted is None:
                continue
            if counted.shape != windows[:, 1:].shape or counted.dtype != bool:
                raise ValueError(
                    f"{name}_counted must hold a bool for each target, {windows[:, 1:].shape}, not "
                    f"{counted.dtype} {counted.shape}"
                )
            if not counted.any():
                raise ValueError(
                    f"no target of the {name} windows counts: there is nothing to learn"
                )


def load_windows(
    source: str,
    tokenizer: Any,
    window: int,
    validation_fraction: float = 0.05,
    *,
    validation_source: str | None = None,
    most_tokens: int | None = None,
    loss_on: LossOn = "all",
) -> TokenWindows:
    """Reads text and returns its training and validation windows.

    Documents are packed: their tokens form one row, which is cut. A source of text is
    ``"stdlib"`` (the source code of the running Python's standard library); a text file; a
    ``.jsonl`` or ``.parquet`` file whose rows have ``"text"``, ``"messages"``, or ``"prompt"`` and
    ``"completion"``; a folder of such files; a folder that a Hugging Face dataset was saved to; or
    the name of a dataset on the Hub, ``NAME:CONFIGURATION:SPLIT``, of which the last two may be
    left out.

    Args:
      source: what to train on.
      tokenizer: a transformers fast tokenizer with an end-of-text token; for messages also with a
        chat template.
      window: number of tokens that a window predicts; at most the model's ``n_positions``.
      validation_fraction: share of the tokens that are kept for validation, between 0 and 1:
        whole documents, chosen by a hash of their names. Texts that are long beside that share are
        cut into pieces first, at blank lines where there are any. Of ``"stdlib"`` it is the share
        of the files.
      validation_source: another source of text to validate on; ``source`` is not split then.
      most_tokens: largest number of tokens to take of each source, from its beginning; a dataset
        of the Hub is then streamed and not downloaded. ``None`` takes all.
      loss_on: whether the loss counts all targets, or, with ``"completion"``, none that is part of
        a prompt or is not said by the assistant.

    Raises:
      FileNotFoundError: if a source is no file, folder or dataset that can be read.
      ImportError: if a library is missing that reads it.
      ValueError: if the text is empty, is not UTF-8, has a row of another form, cannot be split,
        is too short for one window in each split, or has nothing that the loss counts; if the
        tokenizer lacks its end-of-text token or chat template; or if a number is out of its range.

    Example:
      >>> import pathlib, tempfile
      >>> import sparseffn_jax as sf
      >>> tokenizer = sf.load_tokenizer(sf.EMBEDDED_MODEL)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for name in ("first.txt", "second.txt"):
      ...         _ = pathlib.Path(folder, name).write_text("import os, sys; " * 20)
      ...     windows = sf.load_windows(folder, tokenizer, window=16, validation_fraction=0.5)
      >>> windows.train.dtype.name, windows.train.shape[1]
      ('int32', 17)
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction={validation_fraction} must lie between 0 and 1")
    if most_tokens is not None and most_tokens < 1:
        raise ValueError(f"most_tokens={most_tokens} must be at least 1")
    names = [source] if validation_source is None else [source, validation_source]
    sources = [Source(name, streamed=most_tokens is not None) for name in names]
    texts = [
        _first(tokenize(each, tokenizer, loss_on), tokenizer, most_tokens, each.name)
        for each in sources
    ]
    documents = [tokens.document for text in texts for tokens in text]
    check_has_completions(documents, loss_on, source)
    if validation_source is None:
        splits = _split(texts[0], tokenizer, validation_fraction, source)
    else:
        splits = [[text[i] for i in _ranked([t.document.name for t in text])] for text in texts]
    train = _windows(f"train split of {source!r}", splits[0], window, loss_on)
    validation = _windows(f"validation split of {names[-1]!r}", splits[1], window, loss_on)
    turns = None
    if loss_on == "completion" and any(isinstance(each, Chat) for each in documents):
        turns = "generation" if marks_completions(tokenizer) else "prefix"
    unread = sum((each.unread for each in sources), collections.Counter())
    empty = sum(each.empty for each in sources)
    counts = TextCounts(train[2], validation[2], loss_on, turns, dict(unread.most_common()), empty)
    return TokenWindows(train[0], validation[0], train[1], validation[1], counts)


def left_out(unread: Mapping[str, int], empty: int) -> list[str]:
    """Returns what a user should know of what was not read, in lines.

    Args:
      unread: number of files by suffix.
      empty: number of documents without any text.
    """
    lines = []
    if unread:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in unread.items())
        lines.append(f"files not read, of no known format: {kinds}")
    if empty:
        lines.append(f"empty documents left out: {empty:,}")
    return lines


def join_tokens(
    documents: list[AnyDocument], tokenizer: Any, loss_on: LossOn = "all"
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"] | None]:
    """Returns the token ids of documents as one row, and which of them count, or ``None`` for all.

    Texts are joined by blank lines, and tokenized as one, so that a file of text is what it is.
    Among completions and chats every document ends as in training.

    Args:
      documents: the documents, in order.
      tokenizer: a transformers fast tokenizer, with what the documents need.
      loss_on: whether the loss counts all tokens, or those of completions.

    Raises:
      ValueError: if the tokenizer lacks what the documents need, or nothing is counted.
    """
    texts = [document.text for document in documents if isinstance(document, Document)]
    if len(texts) == len(documents) and loss_on == "all":
        whole = "\n\n".join(texts)
        with whole_texts(tokenizer) as backend:
            return np.array(backend.encode(whole).ids, np.int32), None
    tokens = list(tokenize(documents, tokenizer, loss_on))
    ids = np.concatenate([each.ids for each in tokens])
    counted = np.concatenate([each.counted for each in tokens])
    return ids, counted if loss_on == "completion" else None


def check_has_completions(documents: Iterable[AnyDocument], loss_on: LossOn, source: str) -> None:
    """Refuses a loss on completions where there are none: texts have no prompts to leave out.

    Raises:
      ValueError: if every document is a text.
    """
    if loss_on == "completion" and all(isinstance(each, Document) for each in documents):
        raise ValueError(
            f"{source!r} has no completions, of which alone the loss was to be: give rows with "
            '"messages", or with "prompt" and "completion"; or count all tokens'
        )


def split_names(
    names: Sequence[str], sizes: Sequence[int], validation_fraction: float
) -> tuple[list[int], list[int]]:
    """Splits documents into those for training and those for validation.

    They are ranked by a hash of their names: their order does not matter, and two documents keep
    their order in the ranking when others are added or removed. The first ones in the ranking whose
    sizes come nearest to the share are held out; any that is larger than the share is passed over.

    Args:
      names: the documents' names, at least two.
      sizes: the documents' sizes.
      validation_fraction: share of all sizes together that is held out, between 0 and 1.

    Returns:
      The numbers of the training documents and of the validation documents, each in the order of
      the ranking; there is at least one of each.
    """
    ranking = _ranked(names)
    ranked = np.array(sizes)[ranking]
    share = validation_fraction * ranked.sum()
    fitting = np.flatnonzero(ranked <= max(share, ranked.min()))
    nearest = int(np.argmin(np.abs(np.cumsum(ranked[fitting]) - share)))
    held_out = set(fitting[: min(nearest + 1, len(ranked) - 1)].tolist())
    parts: tuple[list[int], list[int]] = ([], [])
    for place, number in enumerate(ranking):
        parts[place in held_out].append(number)
    return parts


def make_batches(
    windows: Int[np.ndarray, "n w"], batch_size: int, seed: int
) -> grain.DatasetIterator:
    """Returns an endless iterator of batches ``(batch_size, window + 1)``, reshuffled each epoch.

    The iterator's methods ``get_state()`` and ``set_state()`` save and restore its position
    exactly.

    Args:
      windows: token ids ``(n, window + 1)``.
      batch_size: number of windows in a batch.
      seed: seed of the order of the windows.

    Raises:
      ValueError: if there are fewer windows than ``batch_size``.
    """
    if len(windows) < batch_size:
        raise ValueError(
            f"{len(windows)} training windows do not fill one batch of {batch_size}: "
            "give more text, a smaller batch or a shorter window"
        )
    source: Any = windows
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    # The windows are in memory already: reading threads would only take cores from the model.
    in_line = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.batch(batch_size, drop_remainder=True).to_iter_dataset(in_line))


def _first(
    texts: Iterable[Tokens], tokenizer: Any, most_tokens: int | None, source: str
) -> list[Tokens]:
    """Returns the first documents that have together no more tokens than the most, if it is given.

    The last one is cut if it is a text, and left out otherwise.
    """
    if most_tokens is None:
        return list(texts)
    taken, left = [], most_tokens
    for tokens in texts:
        if len(tokens.ids) > left:
            if isinstance(tokens.document, Document) and left > 1:
                document = _beginning(tokens.document, tokenizer, left - 1)
                taken += tokenize([document], tokenizer)
            break
        taken.append(tokens)
        left -= len(tokens.ids)
    if not taken:
        raise ValueError(
            f"most_tokens={most_tokens} are fewer than the first document of {source!r} has"
        )
    return taken


def _beginning(document: Document, tokenizer: Any, tokens: int) -> Document:
    """Returns a text's first tokens as a text."""
    with whole_texts(tokenizer) as backend:
        encoding = backend.encode(document.text, add_special_tokens=False)
    return Document(document.name, document.text[: encoding.offsets[tokens - 1][1]])


def _ranked(names: Sequence[str]) -> list[int]:
    """Returns the numbers of names in the order of the names' hashes."""
    return sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())


def _split(
    texts: list[Tokens], tokenizer: Any, validation_fraction: float, source: str
) -> tuple[list[Tokens], list[Tokens]]:
    # By files: what the embedded model was trained on must not become validation text.
    by_file = source == STDLIB
    if not by_file:
        texts = _in_pieces(texts, tokenizer, validation_fraction)
    if len(texts) < 2:
        raise ValueError(
            f"{source!r} has {len(texts)} document, which cannot be split into training and "
            "validation text: give more text, or text to validate on"
        )
    names = [tokens.document.name for tokens in texts]
    sizes = [1 if by_file else len(tokens.ids) for tokens in texts]
    train, validation = split_names(names, sizes, validation_fraction)
    return [texts[i] for i in train], [texts[i] for i in validation]


def _in_pieces(texts: list[Tokens], tokenizer: Any, validation_fraction: float) -> list[Tokens]:
    """Returns the documents' tokens, with texts of more than half the share cut into pieces.

    A piece has about 16 kB, or a third of the share if that is less.
    """
    share = validation_fraction * sum(len(tokens.ids) for tokens in texts)
    parts: list[Tokens] = []
    for tokens in texts:
        document = tokens.document
        if isinstance(document, Document) and len(tokens.ids) > share / 2:
            third = int(len(document.text) * share / (3 * len(tokens.ids)))
            pieces = _cut(document, max(1, min(_PIECE_CHARACTERS, third)))
            parts += tokenize(pieces, tokenizer)
        else:
            parts.append(tokens)
    return parts


def _cut(document: Document, size: int) -> list[Document]:
    text, pieces, start = document.text, [], 0
    while start < len(text):
        end = _break_after(text, start + size, start + 2 * size)
        pieces.append(Document(f"{document.name}#{len(pieces)}", text[start:end]))
        start = end
    return pieces


def _break_after(text: str, start: int, stop: int) -> int:
    """Returns the best place from ``start`` to ``stop`` to cut: after a paragraph, line or word."""
    for separator in ("\n\n", "\n", " "):
        found = text.find(separator, start, stop)
        if found >= 0:
            return found + len(separator)
    return start


def _windows(
    what: str, texts: list[Tokens], window: int, loss_on: LossOn
) -> tuple[Int[np.ndarray, "n w"], Bool[np.ndarray, "n t"] | None, SplitCounts]:
    """Returns a split's windows, which of their targets count, and how much text that is."""
    row = np.concatenate([tokens.ids for tokens in texts])
    windows, counted = cut_windows(row, window), None
    if not len(windows):
        raise ValueError(
            f"the {what} has {len(row)} tokens, too few for one window of {window + 1}: give more "
            "text or a shorter window"
        )
    if loss_on == "completion":
        counted = cut_windows(np.concatenate([tokens.counted for tokens in texts]), window)[:, 1:]
        has_counted = counted.any(axis=1)
        if not has_counted.any():
            raise ValueError(f"the {what} has no completion that fills a window: give more text")
        windows, counted = windows[has_counted], counted[has_counted]
    targets = windows[:, 1:].size
    total = targets if counted is None else int(counted.sum())
    return windows, counted, SplitCounts(len(texts), len(row), len(windows), targets, total)
