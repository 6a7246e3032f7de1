"""Loss scaling for float16, whose smallest numbers are larger than many gradients.

The loss is multiplied before and the gradient divided after the backward pass (Micikevicius et al.
2017, 1710.03740, sections 3.2 and 4.1). Where that makes the gradient overflow, the update is
skipped and the scale halved; after many updates without overflow it is doubled. The scale is part
of the optimizer's state, and so is checkpointed, sharded and restored with it.

Flax's ``DynamicScale`` adjusts its scale in the call that differentiates one loss, so that each
microbatch of an accumulated update would adjust it, where only their sum can say whether the
update overflowed. It leaves skipping the update to its caller, and optax's ``apply_if_finite``
skips updates but knows no scale.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

# A gradient that overflows without any scaling comes from a run that has diverged.
_SMALLEST = 1.0
_LARGEST = 2.0**32


class LossScaleState(NamedTuple):
    """State of :func:`dynamic_loss_scale`.

    Attributes:
      scale: the factor of the loss, float32.
      sound: the number of updates without overflow since the scale last changed, int32.
      inner: the wrapped optimizer's state.
    """

    scale: Float[Array, ""]
    sound: Int[Array, ""]
    inner: optax.OptState


def dynamic_loss_scale(
    optimizer: optax.GradientTransformation, initial_scale: float, interval: int
) -> optax.GradientTransformation:
    """Wraps an optimizer: a gradient that is not finite changes nothing but the scale.

    Args:
      optimizer: the transform to wrap; its gradients come divided by the scale already.
      initial_scale: the factor of the loss in the first step.
      interval: the number of updates in a row without overflow after which the scale is doubled.
    """

    def init(params):
        return LossScaleState(jnp.float32(initial_scale), jnp.int32(0), optimizer.init(params))

    def update(updates, state, params=None):
        is_sound = jnp.isfinite(optax.tree.norm(updates))
        new, inner = optimizer.update(updates, state.inner, params)
        new = jax.tree.map(lambda x: jnp.where(is_sound, x, 0.0), new)
        inner = jax.tree.map(lambda x, old: jnp.where(is_sound, x, old), inner, state.inner)
        sound = jnp.where(is_sound, state.sound + 1, 0)
        grows = sound == interval
        scale = jnp.where(grows, 2.0 * state.scale, state.scale)
        scale = jnp.clip(jnp.where(is_sound, scale, 0.5 * state.scale), _SMALLEST, _LARGEST)
        return new, LossScaleState(scale, jnp.where(grows, 0, sound), inner)

    return optax.GradientTransformation(init, update)


def scale_of(optimizer: optax.OptState) -> Float[Array, ""] | None:
    """Returns the factor of the loss in an optimizer's state, or ``None`` if it is not scaled."""
    return optimizer.scale if isinstance(optimizer, LossScaleState) else None


def has_overflowed(scale: Float[Array, ""], grad_norm: Float[Array, ""]) -> Any:
    """Says whether a gradient of this norm has overflowed because of this scale of the loss.

    At the smallest scale it has not: there the run itself has diverged.
    """
    return ~jnp.isfinite(grad_norm) & (scale > _SMALLEST)
