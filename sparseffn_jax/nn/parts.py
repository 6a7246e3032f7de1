"""The plain parts of decoders: linear maps, embeddings and LayerNorm, by a model's config."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any


def dense(module: Any, name: str, features: int, use_bias: bool = False) -> nn.Dense:
    """Returns a linear map for a part of a model, with that part's dtypes."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=nn.initializers.normal(module.config.initializer_range),
        dot_general=flat_dot_general,
        name=name,
    )


def embed(config: Any, dtype: Dtype, param_dtype: Dtype) -> nn.Embed:
    """Returns the embedding of a model's tokens."""
    return nn.Embed(
        config.vocab_size,
        config.hidden_size,
        dtype=dtype,
        param_dtype=param_dtype,
        embedding_init=nn.initializers.normal(config.initializer_range),
    )


def layer_norm(config: Any, name: str | None, dtype: Dtype, param_dtype: Dtype) -> nn.LayerNorm:
    """Returns the LayerNorm of GPT-2 and GPT-J."""
    # The two-pass variance: GPT-2's outlier channels cancel badly in E[x^2] - E[x]^2.
    return nn.LayerNorm(
        epsilon=config.layer_norm_epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        name=name,
    )


def flat_dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
    """Multiplies the last axis of ``lhs`` by either axis of a matrix, as one product of matrices.

    With several batch axes, XLA's CPU compiler copies activations into another order for the
    weight's gradient. It is what :class:`flax.linen.Dense` takes as ``dot_general``.
    """
    ((left, (axis,)), batch) = dimension_numbers
    assert left == (lhs.ndim - 1,)
    assert batch == ((), ())
    flat = jax.lax.dot_general(
        lhs.reshape(-1, lhs.shape[-1]),
        rhs,
        (((1,), (axis,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return flat.reshape(*lhs.shape[:-1], -1)


def dot_general_f32(lhs, rhs, dimension_numbers, precision=None, **_):
    """Multiplies as ``jax.lax.dot_general`` does, with a float32 result whatever the inputs are."""
    return jax.lax.dot_general(
        lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=jnp.float32
    )
