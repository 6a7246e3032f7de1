"""What several commands of the CLI share."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparseffn_jax.checkpoints.pretrained import Pretrained
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer, load_tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def matching_tokenizer(source: str, pretrained: Pretrained) -> Any:
    """Loads a model's tokenizer and checks that the model knows all its tokens."""
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, pretrained.config)
    return tokenizer


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, for the next process.

    A folder that the user has chosen for JAX stays in force. Programs for CPUs hold instructions
    that another CPU may lack, so that each kind of CPU has a folder of its own.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "sparseffn_jax" / f"compiled-{_cpu()}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)


def _cpu() -> str:
    description = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        description += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        description += platform.processor()
    return hashlib.sha256(description.encode()).hexdigest()[:12]
