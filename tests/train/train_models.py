"""Models and texts small enough to train in a second."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from transformers import GPT2Config

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.train.data import TokenWindows, make_batches

VOCAB_SIZE, WINDOW, N_EMBD = 97, 16, 32
SPARSE_FFN = SparseFFNConfig(
    d_model=N_EMBD,
    d_ff=4 * N_EMBD,
    spectral=SpectralConfig(width=4 * N_EMBD, rank=8),
    polynomial=PolynomialConfig(),
    micro=MicroRefinementConfig(core=CoreConfig(width=16)),
)


@functools.cache
def make_model(ffns=(SPARSE_FFN,), dtype=jnp.float32, **overrides):
    """Returns a GPT-2 with a layer for each of ``ffns``, and parameters for it.

    Each is made once: what trains leaves the parameters that it was given as they are.
    """
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=WINDOW,
        n_embd=N_EMBD,
        n_layer=len(ffns),
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        **overrides,
    )
    model = GPT2LMHeadModel(config, ffns, dtype)
    ids = jnp.zeros((1, WINDOW), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(0), ids)["params"]


def make_windows(vocab_size=VOCAB_SIZE):
    """Returns 40 training windows and 8 for validation, of text in which small ids are frequent."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (2, 48, WINDOW + 1)).min(axis=0)
    return TokenWindows(tokens[8:].astype(np.int32), tokens[:8].astype(np.int32))


def make_counted_windows():
    """Returns the same windows, of each of which 0 to WINDOW targets count."""
    rng, windows = np.random.default_rng(1), make_windows()
    train, validation = (
        rng.random((len(x), WINDOW)) < rng.choice((0.0, 0.1, 0.9), (len(x), 1))
        for x in (windows.train, windows.validation)
    )
    return dataclasses.replace(windows, train_counted=train, validation_counted=validation)


def poison(params, windows, config, step):
    """Makes the loss NaN at one step: its batch has a token whose embedding is NaN.

    The model must not tie its embeddings: the NaN would be in every logit.
    """
    rows = np.arange(len(windows.train))[:, None]
    batches = make_batches(rows, config.batch_size, config.seed)
    row = [next(batches) for _ in range(step)][-1][0, 0]
    train = windows.train.copy()
    train[row, 3] = VOCAB_SIZE - 1
    embedding = params["transformer"]["wte"]["embedding"].at[VOCAB_SIZE - 1].set(jnp.nan)
    transformer = {**params["transformer"], "wte": {"embedding": embedding}}
    return {**params, "transformer": transformer}, dataclasses.replace(windows, train=train)
