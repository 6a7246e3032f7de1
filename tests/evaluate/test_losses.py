from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_models import SPARSE_FFN, VOCAB_SIZE, WINDOW, make_model

from sparseffn_jax.evaluate import losses

RNG = np.random.default_rng(0)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_the_teachers_hidden_states_get_no_gradient():
    student, teacher = jnp.array(RNG.normal(size=(2, 5))), jnp.array(RNG.normal(size=(2, 5)))
    gradients = jax.grad(lambda x, y: losses.hidden_state_mse([x], [y]), (0, 1))(student, teacher)
    assert np.abs(gradients[0]).max() > 0
    np.testing.assert_array_equal(gradients[1], 0)


def test_hidden_state_mse_is_the_mean_over_blocks():
    x, y = [np.zeros((2, 3)), np.ones((2, 3))], [np.full((2, 3), 2.0), np.ones((2, 3))]
    np.testing.assert_allclose(losses.hidden_state_mse(x, y), 2.0)
    with pytest.raises(ValueError, match="1 blocks cannot be compared with the teacher's 2"):
        losses.hidden_state_mse(x[:1], y)


def test_forward_gives_the_residual_stream_after_each_block():
    model, params = make_model(ffns=(SPARSE_FFN, None))
    ids = jnp.array(RNG.integers(0, VOCAB_SIZE, (2, WINDOW)))
    plain, none = jax.jit(partial(losses.forward, model))(params, ids)
    outputs, states = jax.jit(partial(losses.forward, model, with_hidden_states=True))(params, ids)
    assert none == []
    np.testing.assert_allclose(outputs.hidden, plain.hidden, atol=1e-6)
    assert [state.shape for state in states] == [(2, WINDOW, 32)] * 2
    final = nn.LayerNorm(use_fast_variance=False, epsilon=1e-5).apply(
        {"params": params["transformer"]["ln_f"]}, states[1]
    )
    np.testing.assert_allclose(final, outputs.hidden, atol=1e-5)
    np.testing.assert_array_equal(outputs.head.weight, params["transformer"]["wte"]["embedding"])


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_evaluate_loss_is_exact_for_every_batch_size(batch_size, model_and_params, windows):
    model, params = model_and_params
    logits = jax.jit(model.apply)({"params": params}, windows.validation[:, :-1])
    expected = -np.take_along_axis(log_softmax(logits), windows.validation[:, 1:, None], -1).mean()
    loss = losses.evaluate_loss(model, params, windows.validation, batch_size)
    np.testing.assert_allclose(loss, expected, 1e-6)


def test_a_partial_batch_does_not_compile_again(windows):
    traces = []

    class Uniform(nn.Module):
        @nn.compact
        def __call__(self, input_ids, deterministic):
            traces.append(input_ids.shape)
            return jnp.zeros((*input_ids.shape, VOCAB_SIZE))

    evaluate = losses.make_evaluator(Uniform())
    for count in (8, 7, 5):
        loss = evaluate({}, windows.validation[:count], 4)
        np.testing.assert_allclose(loss, np.log(VOCAB_SIZE), 1e-6)
    assert traces == [(4, WINDOW)]


def test_windows_that_the_model_cannot_read(model_and_params, windows):
    model, params = model_and_params
    with pytest.raises(ValueError, match=r"token id 97 is beyond .* vocab_size=97"):
        losses.evaluate_loss(model, params, np.full((2, WINDOW + 1), 97, np.int32), 2)
    with pytest.raises(ValueError, match=r"token id -100 is negative: give ids from 0 to 96"):
        losses.evaluate_loss(model, params, np.full((2, WINDOW + 1), -100, np.int32), 2)
    with pytest.raises(ValueError, match="no window"):
        losses.evaluate_loss(model, params, windows.train[:0], 2)
