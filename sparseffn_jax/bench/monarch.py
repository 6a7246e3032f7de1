"""The Monarch FFN, a peer whose maps are made of low-rank blocks: two batched GEMMs for each map.

A weight is cut into n x n blocks, each of rank r. With r = 1 and n the root of the width this is a
Monarch matrix (Dao et al. 2022, 2204.00595); with larger ranks it is block low rank, the form that
structured FFNs use (Wei et al. 2024, 2406.16450). In shapes, t stands for tokens, n for the blocks
on a side, r for the rank, i and o for the channels of one input and output block.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from sparseffn_jax.ops.activations import get_activation
from sparseffn_jax.sparsify import closed_form
from sparseffn_jax.sparsify.closed_form import Moments
from sparseffn_jax.sparsify.dense import DenseFFN, Linear
from sparseffn_jax.sparsify.selection import score_units
from sparseffn_jax.sparsify.streams import LayerActivations

Dtype = Any


@dataclasses.dataclass(frozen=True)
class MonarchConfig:
    """A Monarch FFN in the place of a dense ``d_model -> d_ff -> d_model`` one.

    Attributes:
      d_model: number of channels in and out.
      d_ff: number of hidden units, which all stay.
      activation: Hugging Face name of the activation.
      blocks: number n of blocks on each side of both maps, a divisor of ``d_model`` and ``d_ff``.
      rank: rank r of every block, at most the smaller side of a block.
      gated: whether a hidden unit is ``phi(gate) * up``, made of two maps of the input.
      bias: whether the maps have biases.

    Raises:
      ValueError: on construction, if the blocks or the rank do not fit.
    """

    d_model: int
    d_ff: int
    activation: str
    blocks: int
    rank: int
    gated: bool = False
    bias: bool = True

    def __post_init__(self):
        for name in ("d_model", "d_ff"):
            if self.blocks < 1 or getattr(self, name) % self.blocks:
                raise ValueError(f"blocks={self.blocks} do not divide {name}={getattr(self, name)}")
        limit = min(self.d_model, self.d_ff) // self.blocks
        if not 1 <= self.rank <= limit:
            raise ValueError(f"rank={self.rank} must lie between 1 and {limit}, a block's side")

    @property
    def flops_ratio(self) -> float:
        """Floating-point operations of all maps over the dense FFN's."""
        return self.rank * self.blocks * (self.d_model + self.d_ff) / (self.d_model * self.d_ff)

    @property
    def up_maps(self) -> tuple[str, ...]:
        """Names of the maps into the hidden units; the first one meets the activation."""
        return ("gate", "up") if self.gated else ("up",)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dict that JSON can hold."""
        return dataclasses.asdict(self)


class MonarchLinear(nn.Module):
    """One map of a Monarch FFN, without bias, on activations cut into blocks.

    The blocks lead, so that both stages are batched GEMMs of whole matrices, and only what lies
    between the stages, r numbers a pair of blocks, is ever rearranged.

    Attributes:
      features: number o of output channels of one block.
      rank: rank r of every block.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters: ``axes`` of shape (n, i, n r), and ``filter`` of shape
        (n, n r, o).
    """

    features: int
    rank: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n t i"]) -> Float[Array, "n t o"]:
        (n, tokens, channels), r = x.shape, self.rank
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        axes = self.param("axes", init, (n, channels, n * r), self.param_dtype)
        filter = self.param("filter", init, (n, n * r, self.features), self.param_dtype)
        x, axes, filter = promote_dtype(x, axes, filter, dtype=self.dtype)
        z = jnp.einsum("nti,nir->ntr", x, axes).reshape(n, tokens, n, r)
        # Input block i speaks to output block j through r numbers; regrouping them from i to j is
        # the permutation between Monarch's two block-diagonal factors.
        z = z.transpose(2, 1, 0, 3).reshape(n, tokens, n * r)
        return jnp.einsum("ntr,nro->nto", z, filter)


class MonarchFFN(nn.Module):
    """A Monarch FFN that takes the place of a dense FFN in a decoder.

    It maps ``(*batch, d_model)`` to the same shape, in ``dtype``.

    Attributes:
      config: sizes of the layer.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    config: MonarchConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        config, n = self.config, self.config.blocks
        blocks = x.reshape(-1, n, config.d_model // n).transpose(1, 0, 2)
        first, *up = (self._up(name, blocks) for name in config.up_maps)
        hidden = get_activation(config.activation)(first)
        if up:
            hidden = hidden * up[0]
        y = self._linear("down", config.d_model // n)(hidden)
        y = y.transpose(1, 0, 2).reshape(x.shape)
        return y + self._bias("bias", config.d_model) if config.bias else y

    def _up(self, name, blocks):
        config, n = self.config, self.config.blocks
        u = self._linear(name, config.d_ff // n)(blocks)
        if not config.bias:
            return u
        return u + self._bias(f"{name}_bias", config.d_ff).reshape(n, 1, -1)

    def _linear(self, name, features):
        return MonarchLinear(features, self.config.rank, self.dtype, self.param_dtype, name=name)

    def _bias(self, name, features):
        bias = self.param(name, nn.initializers.zeros, (features,), self.param_dtype)
        return bias.astype(self.dtype)


def fit_monarch(
    dense: DenseFFN, config: MonarchConfig, activations: LayerActivations
) -> dict[str, Any]:
    """Fits a Monarch FFN to the outputs that a layer should have, in closed form.

    Every block starts from its SVD, whitened by its own inputs' second moments: exact but for
    what the blocks of one row share. The second factor is then regressed on what the first one
    really outputs. The map out of the hidden units is regressed on the outputs.

    Args:
      dense: the dense FFN.
      config: sizes of the Monarch FFN.
      activations: inputs of the layer, and the outputs that it should have.

    Returns:
      Parameters of :class:`MonarchFFN`, float32.
    """
    bias = config.bias
    scales = score_units(dense, activations, centred=bias).sensitivities
    inputs = Moments.of(((x, x[:, :0]) for x, _ in activations.chunks()), centred=bias)
    params: dict[str, Any] = {}
    mapped = []
    for name, first, scale in zip(config.up_maps, dense.up_maps, scales, strict=True):
        mean = inputs.x_mean @ first.weight
        wanted = Moments(inputs.xx, inputs.xx @ first.weight, inputs.x_mean, mean)
        params[name], weight = _regress(config, wanted, first.weight, scale)
        mapped.append(Linear(weight, first.bias + inputs.x_mean @ (first.weight - weight)))
        if bias:
            params[f"{name}_bias"] = mapped[-1].bias

    outputs = Moments.of(
        (
            (dense.hidden([linear(x) for linear in mapped]), target)
            for x, target in activations.chunks()
        ),
        centred=bias,
    )
    full = closed_form.ridge_solve(outputs.xx, outputs.xy)
    params["down"], weight = _regress(config, outputs, full, np.ones(config.d_model))
    if bias:
        params["bias"] = outputs.y_mean - outputs.x_mean @ weight
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


def _regress(config, moments, weight, output_scale):
    """Returns the factors nearest to ``weight``, and the matrix that they multiply out to."""
    n, r = config.blocks, config.rank
    blocks = weight.reshape(n, weight.shape[0] // n, n, weight.shape[1] // n)
    _, i, _, o = blocks.shape
    axes = np.zeros((n, i, n, r))
    scale = output_scale.reshape(n, o)
    for row in range(n):
        rows = slice(row * i, (row + 1) * i)
        for column in range(n):
            axes[row, :, column], _ = closed_form.whitened_svd(
                blocks[row, :, column], moments.xx[rows, rows], r, scale[column]
            )
    filter = np.zeros((n, n * r, o))
    fitted = np.zeros_like(weight)
    for column in range(n):
        # Block-diagonal: from all inputs to the n r numbers that this output block sees.
        first = np.zeros((n, i, n, r))
        first[range(n), :, range(n)] = axes[:, :, column]
        first = first.reshape(n * i, n * r)
        outputs = slice(column * o, (column + 1) * o)
        filter[column] = closed_form.ridge_solve(
            first.T @ moments.xx @ first, first.T @ moments.xy[:, outputs]
        )
        fitted[:, outputs] = first @ filter[column]
    return {"axes": axes.reshape(n, i, n * r), "filter": filter}, fitted
