"""Reads tokenizers, checks them against a model and writes them into its folder."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sparseffn_jax.checkpoints.configs import is_sparse, read_config
from sparseffn_jax.checkpoints.errors import CheckpointError, is_failure, one_line
from sparseffn_jax.checkpoints.folders import TOKENIZER_FILES, PathLike, find_gguf
from sparseffn_jax.checkpoints.gguf_tokenizer import read_gguf_tokenizer
from sparseffn_jax.checkpoints.untrusted import read_json


def load_tokenizer(source: PathLike) -> Any:
    """Returns the fast tokenizer of a model.

    Args:
      source: a model folder; a GGUF file, named ``*.gguf``, whose metadata describe its tokenizer;
        or the name of a model on the Hugging Face Hub.

    Raises:
      CheckpointError: if there is none, or it cannot be read.

    Example:
      >>> import sparseffn_jax as sf
      >>> tokenizer = sf.load_tokenizer(sf.EMBEDDED_MODEL)
      >>> tokenizer.decode(tokenizer.encode("def main():"))
      'def main():'
    """
    if (file := find_gguf(source)) is not None:
        return read_gguf_tokenizer(file)
    folder = Path(source).expanduser()
    if folder.is_dir():
        # Given a folder without them, some versions of transformers make up an empty tokenizer.
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(
                f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
            )
        source = folder
    try:
        # Never the code that a folder may bring: without a word transformers would ask for leave.
        tokenizer = AutoTokenizer.from_pretrained(
            str(source), trust_remote_code=False, config=_config_of(folder)
        )
    # The tokenizers library raises bare Exceptions, and panics.
    except BaseException as error:
        if not is_failure(error):
            raise
        raise CheckpointError(
            f"no tokenizer can be read from {source}: {one_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"the tokenizer of {source} has no fast form, tokenizer.json")
    return tokenizer


def _config_of(folder: Path) -> Any:
    """Returns a sparse model's config, whose ``model_type`` transformers does not know."""
    file = folder / "config.json"
    if file.is_file() and is_sparse(read_json(file)):
        config, _ = read_config(folder)
        return config
    return None


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Checks that every token that ``tokenizer`` can give has an embedding.

    Raises:
      CheckpointError: if it has more tokens than the model.
    """
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"wrong tokenizer: it has {len(tokenizer)} tokens, but the model has "
            f"vocab_size={config.vocab_size}; use the tokenizer that the model was trained with"
        )


@contextlib.contextmanager
def whole_texts(tokenizer: Any) -> Iterator[Any]:
    """Yields a fast tokenizer's backend, which within the block neither cuts nor pads texts.

    ``tokenizer.json`` keeps both settings of whatever the tokenizer was last called for.
    """
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes a tokenizer, that of a GGUF file or copies of another folder's tokenizer files.

    Args:
      folder: where they go.
      tokenizer: the tokenizer, the GGUF file or the other folder; ``None`` writes nothing.

    Raises:
      CheckpointError: if the other folder has no such files.
    """
    if tokenizer is None:
        return
    if not isinstance(tokenizer, str | os.PathLike):
        tokenizer.save_pretrained(folder)
        return
    if (file := find_gguf(tokenizer)) is not None:
        read_gguf_tokenizer(file).save_pretrained(folder)
        return
    source = Path(tokenizer).expanduser()
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        raise CheckpointError(f"{source} has no tokenizer files to copy, such as tokenizer.json")
    for file in files:
        shutil.copyfile(file, folder / file.name)
