"""The Fisher matrices of FFN outputs, against gradients of single outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import make_model

from sparseffn_jax.models.decoder import FFN_NAME
from sparseffn_jax.sparsify.fisher import fisher_windows, output_fisher


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_fisher_is_the_second_moment_of_the_gradient_at_the_output(family):
    model, params = make_model(family, dtype=jnp.float32)
    spec = model.spec
    windows = np.random.default_rng(0).integers(model.config.vocab_size, size=(3, 7))

    def loss(shift, layer, window):
        def shifted(call, args, kwargs, context):
            y = call(*args, **kwargs)
            chosen = context.module.name == FFN_NAME and context.module.path[-2] == str(layer)
            return y + shift if chosen and context.method_name == "__call__" else y

        with nn.intercept_methods(shifted):
            logits = model.apply({"params": params}, window[None, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[None, 1:]).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    matrices = output_fisher(model, params, windows, batch_size=2)
    assert len(matrices) == spec.n_layer
    for layer, matrix in enumerate(matrices):
        zeros = jnp.zeros((1, windows.shape[1] - 1, spec.d_model))
        grads = np.concatenate(
            [np.asarray(gradient(zeros, layer, window)[0], np.float64) for window in windows]
        )
        expected = grads.T @ grads / len(grads)
        np.testing.assert_allclose(matrix, expected, atol=1e-5 * np.abs(expected).max())


def test_a_part_of_a_long_text_is_enough():
    windows = np.arange(100 * 65).reshape(100, 65)
    chosen = fisher_windows(windows, d_model=30)
    # 16 tokens for each channel, and no window in part.
    np.testing.assert_array_equal(chosen, windows[:8])
    np.testing.assert_array_equal(fisher_windows(windows, d_model=3000), windows)
