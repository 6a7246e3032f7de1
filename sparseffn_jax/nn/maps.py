"""The parameters of a layer's maps: low-rank, block-circulant, block-sparse or dense.

A map gives its weights in the dtype of the computation; the operators multiply by them.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from sparseffn_jax.ops import filters, low_rank
from sparseffn_jax.ops.fourier import complex_frequencies
from sparseffn_jax.ops.masks import BlockMask

Dtype = Any
_kernel_init = nn.initializers.lecun_normal()


class LowRankMap(nn.Module):
    """The parameters of one low-rank map: ``axes`` (channels, rank), ``filter`` (rank, features).

    Attributes:
      channels: number of input channels.
      features: number of output channels.
      rank: number of components kept.
      use_bias: whether there is a parameter ``bias`` (features,).
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    channels: int
    features: int
    rank: int
    use_bias: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        self.axes = self.param("axes", _kernel_init, (self.channels, self.rank), self.param_dtype)
        self.filter = self.param(
            "filter", _kernel_init, (self.rank, self.features), self.param_dtype
        )
        if self.use_bias:
            self.bias = bias_of(self, self.features)

    def weights(self) -> low_rank.Factors:
        """Returns the factors in ``dtype``."""
        return low_rank.Factors(*promote_dtype(self.axes, self.filter, dtype=self.dtype))


class CirculantMap(nn.Module):
    """The parameters of one block-circulant map: ``real`` and, where it has entries, ``imag``.

    Attributes:
      channels: number of input channels.
      features: number of output channels.
      blocks: block size and kept frequencies.
      band_limited: whether the inputs lie mostly in the kept frequencies already. The initial
        filter then need not make up for frequencies that are left out.
      use_bias: whether there is a parameter ``bias`` (features,).
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    channels: int
    features: int
    blocks: filters.Blocks
    band_limited: bool = False
    use_bias: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        b, frequencies = self.blocks
        sides = (self.channels // b, self.features // b)
        complex_count = len(complex_frequencies(frequencies, b))
        # Outputs have the variance of inputs. By Parseval's theorem a complex frequency adds four
        # times the entries' variance (real and imaginary part, and the same at the conjugate
        # frequency), DC and Nyquist add it once.
        carried = len(frequencies) + 3 * complex_count
        if self.band_limited:
            carried = b + 2 * ((b - 1) // 2)
        init = nn.initializers.normal(b / (self.channels * carried) ** 0.5)
        self.real = self.param("real", init, (len(frequencies), *sides), self.param_dtype)
        # No parameter without entries: Orbax refuses to save one.
        self.imag = (
            self.param("imag", init, (complex_count, *sides), self.param_dtype)
            if complex_count
            else jnp.zeros((0, *sides), self.param_dtype)
        )
        if self.use_bias:
            self.bias = bias_of(self, self.features)

    def weights(self) -> filters.Filter:
        """Returns the filter in ``dtype``."""
        return filters.Filter(*promote_dtype(self.real, self.imag, dtype=self.dtype))


class BlockSparseMap(nn.Module):
    """The parameter ``kernel`` of one block-sparse or dense map, of shape ``mask.kernel_shape``.

    Attributes:
      channels: number of input channels.
      features: number of output channels.
      mask: mask over ``(channels, features)``; ``None`` stands for a dense kernel.
      use_bias: whether there is a parameter ``bias`` (features,).
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the kernel; ``None`` keeps the variance of the inputs.
    """

    channels: int
    features: int
    mask: BlockMask | None = None
    use_bias: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer | None = None

    def setup(self):
        shape, fan_in = (self.channels, self.features), self.channels
        if self.mask is not None:
            shape = self.mask.kernel_shape
            # What a living output adds up, on average.
            fan_in = self.mask.size / (len(self.mask.live_columns) * self.mask.block_shape[1])
        init = self.kernel_init or nn.initializers.normal(fan_in**-0.5)
        self.kernel = self.param("kernel", init, shape, self.param_dtype)
        if self.use_bias:
            self.bias = bias_of(self, self.features)

    def weights(self) -> Float[Array, "..."]:
        """Returns the kernel in ``dtype``."""
        return promote_dtype(self.kernel, dtype=self.dtype)[0]


def bias_of(module: Any, features: int) -> Float[Array, " o"]:
    """Returns a module's parameter ``bias`` (features,), which is initialised to zero."""
    return module.param("bias", nn.initializers.zeros, (features,), module.param_dtype)
