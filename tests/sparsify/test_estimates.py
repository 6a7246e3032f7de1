"""Estimates that are kept: used again for the same text alone, and completed after a stop."""

import json

import jax.numpy as jnp
import numpy as np
from tiny_models import make_model

from sparseffn_jax.sparsify.estimates import kept_estimates
from sparseffn_jax.sparsify.planning import size_grid


def test_what_is_kept_belongs_to_its_text(tmp_path):
    model, params = make_model("llama", dtype=jnp.float32)
    spec, file = model.spec, tmp_path / "estimates.json"
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=(64, 16))
    fisher = [np.eye(spec.d_model)] * spec.n_layer
    grid = size_grid(spec)

    def estimate(tokens):
        done = []
        damages = kept_estimates(
            file, model, params, tokens, fisher, grid, on_layer=lambda i, n: done.append(i)
        )
        return damages, done

    first, done = estimate(tokens)
    assert done == list(range(1, spec.n_layer + 1))
    assert estimate(tokens) == (first, [])
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"damages": stored["damages"][:-1]}))
    assert estimate(tokens) == (first, [spec.n_layer])
    other, done = estimate(tokens[:60])
    assert len(done) == spec.n_layer
    assert other != first
