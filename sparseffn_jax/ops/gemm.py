"""Plain matrix products in the precision of the activations."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def matmul(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]) -> Float[Array, "*batch o"]:
    """Returns ``x @ kernel`` in the dtype of ``x``, accumulated in float32 where that is narrower.

    XLA accumulates half-precision products in float32 by itself. Asking for a float32 result and
    casting it would say the same of the forward pass, but then the cotangent is cast up too, and
    both products of the backward pass run in float32.
    """
    return jnp.matmul(x, kernel).astype(x.dtype)


def contract_first(
    a: Float[Array | np.ndarray, "k i"], b: Float[Array, "k o"]
) -> Float[Array, "i o"]:
    """Returns ``a.T @ b`` without transposing ``a`` in memory."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))
