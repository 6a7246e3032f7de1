"""The sparse feed-forward layer: spectral map, learned polynomial, micro-refinement.

Each branch is a module that owns its weights. It picks its operator's plan for the platform that
the program is compiled for, and packs its weights for that plan in every call; or once, by
:meth:`SparseFFN.pack`, into the collection ``packed``, where calls with the same plan find them.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from sparseffn_jax.config import CoreConfig, PolynomialConfig, SparseFFNConfig, SpectralConfig
from sparseffn_jax.ops import block_circulant, block_sparse, low_rank
from sparseffn_jax.ops.activations import Activation, get_activation
from sparseffn_jax.ops.elementwise import add_bias
from sparseffn_jax.ops.fourier import complex_frequencies
from sparseffn_jax.ops.gemm import matmul
from sparseffn_jax.ops.hidden import HiddenMaps, HiddenPlan, MapPlan
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.ops.plans.choice import by_platform, platform_of
from sparseffn_jax.ops.plans.costs import Platform
from sparseffn_jax.ops.polynomial import evaluate

Dtype = Any
# The collection of weights that are packed for their plans.
PACKED = "packed"
_kernel_init = nn.initializers.lecun_normal()
# The plan of a core without masks.
_DENSE = HiddenPlan((), "dense")


class LowRankMap(nn.Module):
    """The parameters of one low-rank map: ``axes`` (channels, rank) and ``filter``.

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
            self.bias = _bias(self, self.features)

    def weights(self) -> low_rank.Factors:
        """Returns the factors in ``dtype``."""
        return low_rank.Factors(*promote_dtype(self.axes, self.filter, dtype=self.dtype))


class CirculantMap(nn.Module):
    """The parameters of one block-circulant map: ``real`` and, where it has entries, ``imag``.

    Attributes:
      channels: number of input channels.
      features: number of output channels.
      blocks: block size and kept frequencies.
      band_limited: whether the inputs lie mostly in the kept frequencies already, so that at
        initialisation a mask takes nothing from them that the others must make up for.
      use_bias: whether there is a parameter ``bias`` (features,).
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    channels: int
    features: int
    blocks: block_circulant.Blocks
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
            self.bias = _bias(self, self.features)

    def weights(self) -> block_circulant.Filter:
        """Returns the filter in ``dtype``."""
        return block_circulant.Filter(*promote_dtype(self.real, self.imag, dtype=self.dtype))


class BlockSparseMap(nn.Module):
    """The parameter ``kernel`` of one block-sparse or dense map, of shape ``mask.kernel_shape``.

    Attributes:
      channels: number of input channels.
      features: number of output channels.
      mask: over ``(channels, features)``; ``None`` is a dense kernel.
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
            self.bias = _bias(self, self.features)

    def weights(self) -> Float[Array, "..."]:
        """Returns the kernel in ``dtype``."""
        return promote_dtype(self.kernel, dtype=self.dtype)[0]


class _Packable(nn.Module):
    """A branch that multiplies by weights packed for a plan.

    Subclasses give ``weights()``, ``choose(tokens, weights, platform)`` and
    ``pack_weights(weights, plan)``.
    """

    def packed(self, tokens: int, platform: Platform) -> dict[str, Any]:
        """Returns the weights packed for the plan of a call, under the name of their layout."""
        weights = self.weights()
        plan = self.choose(tokens, weights, platform)
        return {plan.layout: self.pack_weights(weights, plan)}

    def _packed_for(self, plan: HiddenPlan | MapPlan, weights: Any) -> Any:
        """Returns the weights that were packed for a plan, or packs them."""
        if self.has_variable(PACKED, plan.layout):
            return self.get_variable(PACKED, plan.layout)
        return self.pack_weights(weights, plan)


class SpectralBranch(_Packable):
    """The spectral branch and its polynomial: ``down(poly(up(x) + bias))``, tokens by channels.

    Attributes:
      config: configuration of the whole layer.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    config: SparseFFNConfig
    dtype: Dtype
    param_dtype: Dtype

    @property
    def branch(self) -> SpectralConfig:
        """The branch's own part of the configuration."""
        assert self.config.spectral is not None
        return self.config.spectral

    @property
    def blocks(self) -> block_circulant.Blocks:
        """What is static about a block-circulant map."""
        return block_circulant.Blocks(self.branch.block_size, self.branch.frequencies)

    def setup(self):
        config, branch = self.config, self.branch
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if branch.transform == "low_rank":
            up = partial(LowRankMap, rank=branch.rank, **dtypes)
            down = partial(LowRankMap, rank=branch.down_rank or branch.rank, **dtypes)
        else:
            up = partial(CirculantMap, blocks=self.blocks, **dtypes)
            down = partial(up, band_limited=True)
        if config.gated:
            self.gate = up(config.d_model, branch.width, use_bias=config.bias)
        self.up = up(config.d_model, branch.width, use_bias=config.bias)
        self.down = down(branch.width, config.d_model)
        if config.polynomial is not None:
            self.polynomial = self._coefficients(config.polynomial)

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        weights = self.weights()
        maps = [getattr(self, name) for name in self.config.up_maps]
        channel: dict[str, Any] = {}
        if self.config.bias:
            channel["bias"] = [promote_dtype(m.bias, dtype=self.dtype)[0] for m in maps]
        if (polynomial := self.config.polynomial) is not None:
            by_group = self.polynomial
            if polynomial.groups > 1:
                by_group = jnp.repeat(by_group, self.branch.width // polynomial.groups, axis=0)
            channel["coefficients"] = by_group.T

        def run(plan: HiddenPlan, x: Array, weights: HiddenMaps, channel: Any) -> Array:
            packed = self._packed_for(plan, weights)
            if self.branch.transform == "low_rank":
                return low_rank.apply(x, packed, plan, self._activate, channel)
            return block_circulant.apply(x, packed, plan, self.blocks, self._activate, channel)

        choose = partial(self.choose, len(x), weights)
        return by_platform(choose, run, x, weights, channel)

    def weights(self) -> HiddenMaps:
        """Returns the weights of all maps in ``dtype``."""
        up = tuple(getattr(self, name).weights() for name in self.config.up_maps)
        return HiddenMaps(up, self.down.weights())

    def choose(self, tokens: int, weights: HiddenMaps, platform: Platform) -> HiddenPlan:
        """Picks the plan for a number of tokens."""
        forced = self.branch.implementation
        if self.branch.transform == "low_rank":
            return low_rank.choose(tokens, weights, platform, forced)
        return block_circulant.choose(tokens, weights, self.blocks, platform, forced)

    def pack_weights(self, weights: HiddenMaps, plan: HiddenPlan) -> HiddenMaps:
        """Packs the weights for a plan."""
        if self.branch.transform == "low_rank":
            return low_rank.pack(weights, plan)
        return block_circulant.pack(weights, plan, self.blocks)

    def _activate(self, us: Sequence[Array], channel: Mapping[str, Any]) -> Array:
        if "bias" in channel:
            us = [add_bias(u, bias) for u, bias in zip(us, channel["bias"], strict=True)]
        phi = get_activation(self.config.activation)
        if (polynomial := self.config.polynomial) is not None:
            phi = partial(
                evaluate,
                coefficients=channel["coefficients"],
                degrees=polynomial.degrees,
                radius=polynomial.radius,
            )
        return _hidden(phi, us)

    def _coefficients(self, polynomial: PolynomialConfig) -> Array:
        # T_1 alone: the identity until a warm start or training says otherwise.
        start = jnp.array([polynomial.radius * (k == 1) for k in polynomial.degrees])
        return self.param(
            "polynomial",
            lambda _, shape, dtype: jnp.broadcast_to(start, shape).astype(dtype),
            (polynomial.groups, len(polynomial.degrees)),
            self.param_dtype,
        )


class Core(_Packable):
    """The core: a narrower FFN, dense or with block masks; tokens by channels.

    Attributes:
      config: configuration of the whole layer.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    config: SparseFFNConfig
    dtype: Dtype
    param_dtype: Dtype

    @property
    def core(self) -> CoreConfig:
        """The core's own part of the configuration, without units that no output reads."""
        assert self.config.micro is not None
        assert self.config.micro.core is not None
        return self.config.micro.core.without_dead_units()

    @property
    def masks(self) -> HiddenMaps:
        """The masks of all maps."""
        return HiddenMaps((self.core.up_mask,) * len(self.config.up_maps), self.core.down_mask)

    @property
    def is_dense(self) -> bool:
        """Whether no map has a mask."""
        return self.core.up_mask is None and self.core.down_mask is None

    def setup(self):
        d_model, core = self.config.d_model, self.core
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        up = partial(
            BlockSparseMap,
            d_model,
            core.width,
            core.up_mask,
            use_bias=self.config.bias,
            **dtypes,
        )
        if self.config.gated:
            self.gate = up()
        self.up = up()
        self.down = BlockSparseMap(core.width, d_model, core.down_mask, **dtypes)

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        weights, biases = self.weights(), []
        if self.config.bias:
            maps = [getattr(self, name) for name in self.config.up_maps]
            biases = [promote_dtype(m.bias, dtype=self.dtype)[0] for m in maps]
        if self.is_dense:
            up, down = self._packed_for(_DENSE, weights)
            return matmul(self._activate([matmul(x, kernel) for kernel in up], biases), down)

        def run(plan: HiddenPlan, x: Array, weights: HiddenMaps, biases: Any) -> Array:
            packed = self._packed_for(plan, weights)
            return block_sparse.apply(x, packed, plan, self.masks, self._activate, biases)

        return by_platform(partial(self.choose, len(x), weights), run, x, weights, biases)

    def weights(self) -> HiddenMaps:
        """Returns the kernels of all maps in ``dtype``."""
        up = tuple(getattr(self, name).weights() for name in self.config.up_maps)
        return HiddenMaps(up, self.down.weights())

    def choose(self, tokens: int, weights: HiddenMaps, platform: Platform) -> HiddenPlan:
        """Picks the plan for a number of tokens."""
        if self.is_dense:
            return _DENSE
        return block_sparse.choose(tokens, weights, self.masks, platform, self.core.implementation)

    def pack_weights(self, weights: HiddenMaps, plan: HiddenPlan) -> HiddenMaps:
        """Packs the kernels for a plan; those of a dense core are as they should be."""
        if self.is_dense:
            return weights
        return block_sparse.pack(weights, plan, self.masks)

    def _activate(self, us: Sequence[Array], biases: Sequence[Array]) -> Array:
        if biases:
            us = [add_bias(u, bias) for u, bias in zip(us, biases, strict=True)]
        return _hidden(get_activation(self.config.activation), us)


class Correction(_Packable):
    """One linear correction: ``y B`` with a block-sparse B that is zero at first.

    Attributes:
      mask: over ``(d_model, d_model)``.
      implementation: plan to force, or ``None``.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    mask: BlockMask
    implementation: str | None
    dtype: Dtype
    param_dtype: Dtype

    def setup(self):
        self.kernel = self.param(
            "kernel", nn.initializers.zeros, self.mask.kernel_shape, self.param_dtype
        )

    def __call__(self, y: Float[Array, "t d"]) -> Float[Array, "t d"]:
        kernel = self.weights()

        def run(plan: MapPlan, y: Array, kernel: Array) -> Array:
            return block_sparse.multiply(y, self._packed_for(plan, kernel), plan, self.mask)

        return by_platform(partial(self.choose, len(y), kernel), run, y, kernel)

    def weights(self) -> Float[Array, "..."]:
        """Returns the kernel in ``dtype``."""
        return promote_dtype(self.kernel, dtype=self.dtype)[0]

    def choose(self, tokens: int, kernel: Array, platform: Platform) -> MapPlan:
        """Picks the plan for a number of tokens."""
        return block_sparse.choose_map(tokens, kernel, self.mask, platform, self.implementation)

    def pack_weights(self, kernel: Array, plan: MapPlan) -> Any:
        """Packs the kernel for a plan."""
        return block_sparse.pack_map(kernel, plan.name, self.mask)


class SparseFFN(nn.Module):
    """Drops into the place of a transformer's dense FFN (``mlp``): ``(..., d) -> (..., d)``.

    ``y = down(poly(up(x) + bias)) + core(x) + bias``, then ``y = y + y B_k`` for every linear
    correction. Gated, hidden units are products of two maps of x: ``poly(gate(x)) * up(x)``. Each
    part is optional; see :class:`SparseFFNConfig`. With only a core of all hidden units it is the
    dense FFN itself.

    Weights are packed for the plans that run them by every call, or once by :meth:`pack`.

    Attributes:
      config: the parts and their static masks.
      dtype: dtype of the computation; products accumulate in float32, the polynomial runs in
        float32.
      param_dtype: dtype of the parameters.
    """

    config: SparseFFNConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        config = self.config
        if config.spectral is not None:
            self.spectral = SpectralBranch(config, self.dtype, self.param_dtype)
        if config.micro is not None:
            if config.micro.core is not None:
                self.core = Core(config, self.dtype, self.param_dtype)
            self.correction = [
                Correction(mask, config.micro.implementation, self.dtype, self.param_dtype)
                for mask in config.micro.corrections
            ]
        if config.bias:
            self.bias = _bias(self, config.d_model)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        config, shape = self.config, x.shape
        if shape[-1] != config.d_model:
            raise ValueError(f"x has {shape[-1]} channels, but d_model={config.d_model}")
        (x,) = promote_dtype(x, dtype=self.dtype)
        x = x.reshape(math.prod(shape[:-1]), config.d_model)
        parts = []
        if config.spectral is not None:
            parts.append(self.spectral(x))
        if config.micro is not None and config.micro.core is not None:
            with jax.named_scope("core"):
                parts.append(self.core(x))
        y = sum(parts[1:], parts[0])
        if config.bias:
            y = y + promote_dtype(self.bias, dtype=self.dtype)[0]
        for correction in self._corrections():
            with jax.named_scope("corrections"):
                y = y + correction(y)
        return y.reshape(shape)

    def pack(
        self, variables: Mapping[str, Any], *tokens: int, platform: Platform | None = None
    ) -> dict[str, Any]:
        """Packs the weights once, in ``dtype``, for calls that do not change them.

        Args:
          variables: the layer's variables.
          *tokens: how many tokens a call has, all its sequences together; one number for each
            kind of call. 1 decodes one sequence. Plans depend on it; a call whose plan is another
            packs its weights itself.
          platform: that the calls are compiled for; ``None`` takes that of ``variables``.

        Returns:
          ``variables`` with a collection ``packed`` beside ``params``; it takes memory of its own,
          and has to be made anew when ``params`` change.
        """
        platform = platform_of(variables) if platform is None else platform

        @jax.jit
        def packed(variables: Mapping[str, Any]) -> Any:
            return self.apply(variables, tokens, platform, method=SparseFFN.packed)

        return {**variables, PACKED: packed(variables)}

    def packed(self, tokens: Sequence[int], platform: Platform) -> dict[str, Any]:
        """Returns the collection ``packed`` of a bound layer; see :meth:`pack`."""
        branches: dict[str, _Packable] = {}
        if self.config.spectral is not None:
            branches["spectral"] = self.spectral
        if self.config.micro is not None and self.config.micro.core is not None:
            branches["core"] = self.core
        branches |= {f"correction_{i}": each for i, each in enumerate(self._corrections())}
        collection: dict[str, Any] = {name: {} for name in branches}
        for name, branch in branches.items():
            for count in tokens:
                collection[name] |= branch.packed(count, platform)
        return collection

    def _corrections(self) -> Sequence[Correction]:
        return self.correction if self.config.micro is not None else ()


def _hidden(phi: Activation, us: Sequence[Array]) -> Array:
    """Returns the hidden units of one pre-activation or, gated, of two."""
    return phi(us[0]) if len(us) == 1 else phi(us[0]) * us[1]


def _bias(module: Any, features: int) -> Float[Array, " o"]:
    return module.param("bias", nn.initializers.zeros, (features,), module.param_dtype)
