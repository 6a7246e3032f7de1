"""The dense FFN that a layer starts from, read from a checkpoint and applied chunk by chunk."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseffn_jax.models.spec import FFNLayout
from sparseffn_jax.ops.activations import get_activation


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear map ``x weight + bias``.

    Attributes:
      kernel: weight matrix, (i, o), as the model stores it, or in float64 as a fit gives it.
      bias: bias, (o,); zero if the model's map has no bias.
    """

    kernel: Float[np.ndarray, "i o"]
    bias: Float[np.ndarray, " o"]

    @property
    def weight(self) -> Float[np.ndarray, "i o"]:
        """The kernel in float32, or in float64 if it is; a copy if the model stores less."""
        return np.asarray(self.kernel, np.promote_types(self.kernel.dtype, np.float32))

    def __call__(self, x: Float[Array, "n i"]) -> Float[Array, "n o"]:
        """Returns the outputs (n, o) in float32."""
        return _affine(x, *self._on_device)

    @functools.cached_property
    def _on_device(self) -> tuple[Array, Array]:
        return jnp.asarray(self.kernel, jnp.float32), jnp.asarray(self.bias, jnp.float32)

    def release(self) -> None:
        """Frees the copy of the weights on the devices; the next call makes it anew."""
        self.__dict__.pop("_on_device", None)

    def outputs(self, chosen: Int[np.ndarray, " k"]) -> "Linear":
        """Returns the map to the chosen outputs alone."""
        return Linear(self.kernel[:, chosen], self.bias[chosen])


@dataclasses.dataclass(frozen=True)
class DenseFFN:
    """A dense FFN ``down(phi(up(x)))`` or, if gated, ``down(phi(gate(x)) * up(x))``.

    Attributes:
      up_maps: the maps into the m hidden units, ``(up,)`` or ``(gate, up)``.
      down: the map out of the hidden units.
      activation: Hugging Face name of phi.
    """

    up_maps: tuple[Linear, ...]
    down: Linear
    activation: str

    @classmethod
    def from_params(cls, mlp: Mapping[str, Any], layout: FFNLayout, activation: str) -> "DenseFFN":
        """Reads a dense FFN from a layer's ``mlp`` parameters.

        Args:
          mlp: parameters of the FFN.
          layout: the names that the model's family gives to the parameters.
          activation: Hugging Face name of the activation.
        """

        def linear(name: str) -> Linear:
            kernel = np.asarray(mlp[name]["kernel"])
            kernel = kernel.T if layout.transposed else kernel
            bias = mlp[name].get("bias", np.zeros(kernel.shape[1]))
            return Linear(kernel, np.asarray(bias, np.float32))

        up_maps = tuple(map(linear, layout.up_maps))
        return cls(up_maps, linear(layout.down), activation)

    def release(self) -> None:
        """Frees the copies of the weights on the devices; the next call makes them anew."""
        for linear in (*self.up_maps, self.down):
            linear.release()

    @property
    def width(self) -> int:
        """Number of hidden units."""
        return len(self.down.kernel)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Returns the FFN's outputs (n, d) in float32."""
        return self.down(self.hidden([up(x) for up in self.up_maps]))

    def hidden(self, preactivations: Sequence[Float[Array, "n m"]]) -> Float[Array, "n m"]:
        """Returns the hidden units."""
        return _hidden(tuple(preactivations), self.activation)

    def hidden_and_slopes(
        self, preactivations: Sequence[Float[Array, "n m"]]
    ) -> tuple[Float[Array, "n m"], list[Float[Array, "n m"]]]:
        """Returns the hidden units, and their derivatives by each of the pre-activations."""
        return _hidden_and_slopes(tuple(preactivations), self.activation)


@jax.jit
def _affine(x, weight, bias):
    return jnp.matmul(x, weight, precision="highest") + bias


@functools.partial(jax.jit, static_argnames="activation")
def _hidden(preactivations, activation):
    first, *up = preactivations
    value = get_activation(activation)(first)
    return value * up[0] if up else value


@functools.partial(jax.jit, static_argnames="activation")
def _hidden_and_slopes(preactivations, activation):
    first, *up = preactivations
    value, slope = jax.jvp(get_activation(activation), (first,), (jnp.ones_like(first),))
    if not up:
        return value, [slope]
    return value * up[0], [slope * up[0], value]
