"""What several commands of the CLI share."""

from typing import Any, Literal

import jax.numpy as jnp

from sparseffn_jax.checkpoints.pretrained import Pretrained
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer, load_tokenizer

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def matching_tokenizer(source: str, pretrained: Pretrained) -> Any:
    """Loads a model's tokenizer and checks that the model knows all its tokens."""
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, pretrained.config)
    return tokenizer


def check_at_least(name: str, value: int, least: int) -> None:
    """Checks a number that the user gave.

    Raises:
      ValueError: if it is too small.
    """
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
