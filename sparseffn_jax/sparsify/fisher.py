"""How strongly the loss feels an error of each layer's FFN: the Fisher matrix of its outputs.

To second order an error ``e`` of a layer's output raises the loss by ``e' F e / 2``, where F is the
mean of ``g g'`` over tokens, and ``g`` the loss's gradient at that output (as in Kwon et al. 2022,
2204.09656, for units). One backward pass of the dense model gives the matrices of all layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseffn_jax.evaluate.fused_loss import mean_loss
from sparseffn_jax.evaluate.losses import forward
from sparseffn_jax.models.decoder import FFN_NAME, Decoder

# Tokens for each channel from which a matrix is estimated. With 8 the embedded model gets the same
# plans as with 96, and SmolLM2 would wait four minutes for its whole calibration text.
_TOKENS_A_CHANNEL = 16


def fisher_windows(windows: Int[np.ndarray, "n w"], d_model: int) -> Int[np.ndarray, "k w"]:
    """Returns as many windows of text as Fisher matrices are estimated well from.

    Args:
      windows: token ids (n, w) of text in random order.
      d_model: number of channels.
    """
    return windows[: -(-_TOKENS_A_CHANNEL * d_model // (windows.shape[1] - 1))]


def output_fisher(
    model: Decoder, params: Any, windows: Int[np.ndarray, "n w"], *, batch_size: int = 1
) -> list[Float[np.ndarray, "d d"]]:
    """Returns the Fisher matrix of each layer's FFN outputs, estimated on text.

    The gradient is that of the text's own cross-entropy. No gradient is kept for more than one
    layer: each adds to its layer's matrix where the backward pass meets it, and blocks are computed
    again in that pass.

    Args:
      model: a decoder.
      params: its parameters.
      windows: token ids (n, w); the last of each window is a target only.
      batch_size: number of windows in one pass; it changes the result by rounding alone.

    Returns:
      One float64 matrix (d_model, d_model) a layer, in nats a token for an error of one in every
      token.
    """
    spec = model.spec
    recomputing = model.clone(remat=True)

    def loss(matrices: list[Array], params: Any, ids: Array) -> Array:
        def tapped(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = call(*args, **kwargs)
            if context.module.name != FFN_NAME or context.method_name != "__call__":
                return y
            return _tap(y, matrices[int(context.module.path[-2])])

        with nn.intercept_methods(tapped):
            outputs, _ = forward(recomputing, params, ids[:, :-1])
        # Of the sum, so that a token's gradient is that of all the losses that it takes part in.
        return mean_loss(outputs, ids[:, 1:])[0] * (ids.shape[0] * (ids.shape[1] - 1))

    gradient = jax.jit(jax.grad(loss))
    zeros = [jnp.zeros((spec.d_model, spec.d_model))] * spec.n_layer
    totals = [np.zeros((spec.d_model, spec.d_model)) for _ in range(spec.n_layer)]
    for start in range(0, len(windows), batch_size):
        batch = gradient(zeros, params, windows[start : start + batch_size])
        for total, part in zip(totals, batch, strict=True):
            total += np.asarray(part)
    tokens = len(windows) * (windows.shape[1] - 1)
    return [total / tokens for total in totals]


@jax.custom_vjp
def _tap(y: Array, matrix: Array) -> Array:
    """Returns ``y``, whose gradient's second moments are the "gradient" of ``matrix``."""
    del matrix
    return y


def _tap_forward(y: Array, matrix: Array) -> tuple[Array, None]:
    del matrix
    return y, None


def _tap_backward(_: None, g: Array) -> tuple[Array, Array]:
    rows = g.reshape(-1, g.shape[-1]).astype(jnp.float32)
    return g, jnp.matmul(rows.T, rows, precision="highest")


_tap.defvjp(_tap_forward, _tap_backward)
