"""The sparse feed-forward layer: spectral map, learned polynomial, micro-refinement.

Each branch is a module that owns its weights. Its operator picks a plan for the platform that the
program is compiled for. Weights are packed for that plan in every call, unless
:meth:`SparseFFN.pack` has packed them once into the collection ``packed``, where calls with the
same plan find them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from sparseffn_jax.config import CoreConfig, PolynomialConfig, SparseFFNConfig, SpectralConfig
from sparseffn_jax.nn.maps import BlockSparseMap, CirculantMap, LowRankMap, bias_of
from sparseffn_jax.nn.padding import warn_of_padding
from sparseffn_jax.ops import block_circulant, block_sparse, core_and_bypass, filters, low_rank
from sparseffn_jax.ops.hidden import Activate, Channels, HiddenMaps, Packed
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.ops.plans.choice import platform_of
from sparseffn_jax.ops.plans.costs import Platform
from sparseffn_jax.ops.plans.kernels import is_for_a_gpu

Dtype = Any
# The collection of weights that are packed for their plans.
PACKED = "packed"
# The layout of a dense core's weights.
_DENSE = "dense"
# A core and a bypass, which are one operator, among packed weights.
_CORE_AND_BYPASS = "core_and_bypass"


class _Part(nn.Module):
    """Base class of the parts that add up to a layer's output.

    Attributes:
      config: configuration of the whole layer.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    config: SparseFFNConfig
    dtype: Dtype
    param_dtype: Dtype

    def _packed(self) -> Packed:
        return self.variables.get(PACKED, {})


class _Branch(_Part):
    """Base class of a branch with maps into its hidden units and a map out of them.

    The maps are the submodules ``gate``, in a gated layer only, ``up`` and ``down``.
    """

    def weights(self) -> HiddenMaps:
        """Returns the weights of all maps in ``dtype``."""
        up = tuple(getattr(self, name).weights() for name in self.config.up_maps)
        return HiddenMaps(up, self.down.weights())

    def biases(self) -> tuple[Array, ...]:
        """Returns the biases of the maps into the hidden units, if they have any, in ``dtype``."""
        if not self.config.bias:
            return ()
        biases = [getattr(self, name).bias for name in self.config.up_maps]
        return tuple(promote_dtype(*biases, dtype=self.dtype))


class _Spectral(_Part):
    """Base class of the spectral branch, with or without hidden units."""

    @property
    def branch(self) -> SpectralConfig:
        """The part of the configuration that describes this branch."""
        assert self.config.spectral is not None
        return self.config.spectral

    @property
    def blocks(self) -> filters.Blocks:
        """Block size and kept frequencies of the branch's block-circulant maps."""
        return filters.Blocks(self.branch.block_size, self.branch.frequencies)


class SpectralBranch(_Spectral, _Branch):
    """The spectral branch and its polynomial: ``down(poly(up(x) + bias))``."""

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

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        config, branch = self.config, self.branch
        activate, coefficients = self.activate(), None
        if (polynomial := config.polynomial) is not None:
            by_group = self.polynomial
            if polynomial.groups > 1:
                by_group = jnp.repeat(by_group, branch.width // polynomial.groups, axis=0)
            coefficients = by_group.T
        channels = Channels(self.biases(), coefficients)
        settings: Any = {"implementation": branch.implementation, "packed": self._packed()}
        if branch.transform == "low_rank":
            return low_rank.hidden_layer(x, self.weights(), activate, channels, **settings)
        return block_circulant.hidden_layer(
            x, self.weights(), self.blocks, activate, channels, **settings
        )

    def activate(self) -> Activate:
        """Returns the elementwise function of the hidden units."""
        polynomial = self.config.polynomial
        if polynomial is None:
            return Activate(self.config.activation)
        return Activate(self.config.activation, polynomial.degrees, polynomial.radius)

    def packed(self, tokens: int, platform: Platform) -> Packed:
        """Returns the weights packed for calls of some tokens, by the name of their layout."""
        weights, forced = self.weights(), self.branch.implementation
        if self.branch.transform == "low_rank":
            plan = low_rank.choose(tokens, weights, self.activate(), platform, forced)
            return {plan.layout: low_rank.pack(weights, plan)}
        plan = block_circulant.choose(
            tokens, weights, self.blocks, self.activate(), platform, forced
        )
        return {plan.layout: block_circulant.pack(weights, plan, self.blocks)}

    def _coefficients(self, polynomial: PolynomialConfig) -> Any:
        # T_1 alone: the identity until a warm start or training says otherwise.
        start = jnp.array([polynomial.radius * (k == 1) for k in polynomial.degrees])
        return self.param(
            "polynomial",
            lambda _, shape, dtype: jnp.broadcast_to(start, shape).astype(dtype),
            (polynomial.groups, len(polynomial.degrees)),
            self.param_dtype,
        )


class Bypass(_Spectral):
    """The spectral branch without hidden units: one linear map of the layer's inputs."""

    def setup(self):
        sides = (self.config.d_model, self.config.d_model)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.branch.transform == "low_rank":
            self.bypass = LowRankMap(*sides, rank=self.branch.rank, **dtypes)
        else:
            self.bypass = CirculantMap(*sides, blocks=self.blocks, **dtypes)

    def weights(self) -> Any:
        """Returns the weights of the map in ``dtype``."""
        return self.bypass.weights()

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        settings: Any = {"implementation": self.branch.implementation, "packed": self._packed()}
        with jax.named_scope("spectral_bypass"):
            weights = self.weights()
            if self.branch.transform == "low_rank":
                return low_rank.low_rank_matmul(x, weights, **settings)
            return block_circulant.block_circulant_matmul(x, weights, self.blocks, **settings)

    def packed(self, tokens: int, platform: Platform) -> Packed:
        """Returns the weights packed for calls of some tokens, by the name of their layout."""
        weights = self.weights()
        forced = self.branch.implementation
        if self.branch.transform == "low_rank":
            plan = low_rank.choose_map(tokens, weights, platform, forced)
            return {plan.layout: low_rank.pack_map(weights, plan.name)}
        plan = block_circulant.choose_map(tokens, weights, self.blocks, platform, forced)
        return {plan.layout: block_circulant.pack_map(weights, plan.name, self.blocks)}


class Core(_Branch):
    """The core, which is a narrower FFN, dense or with block masks."""

    @property
    def core(self) -> CoreConfig:
        """The configuration of the core, without units that no output depends on."""
        assert self.config.micro is not None
        assert self.config.micro.core is not None
        return self.config.micro.core.without_dead_units()

    @property
    def masks(self) -> HiddenMaps:
        """The masks of all maps; ``None`` stands for a dense map."""
        return HiddenMaps((self.core.up_mask,) * len(self.config.up_maps), self.core.down_mask)

    @property
    def is_dense(self) -> bool:
        """Whether no map has a mask."""
        return self.core.up_mask is None and self.core.down_mask is None

    def setup(self):
        config, core = self.config, self.core
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        up = partial(
            BlockSparseMap,
            *(config.d_model, core.width, core.up_mask),
            use_bias=config.bias,
            **dtypes,
        )
        if config.gated:
            self.gate = up()
        self.up = up()
        self.down = BlockSparseMap(core.width, config.d_model, core.down_mask, **dtypes)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        weights, activate = self.weights(), Activate(self.config.activation)
        channels, packed = Channels(self.biases()), self._packed()
        if self.is_dense:
            up, down = packed.get(_DENSE, weights)
            return activate([x @ kernel for kernel in up], channels) @ down
        return block_sparse.hidden_layer(
            *(x, weights, self.masks, activate, channels),
            implementation=self.core.implementation,
            packed=packed,
        )

    def packed(self, tokens: int, platform: Platform) -> Packed:
        """Returns the kernels packed for calls of some tokens, by the name of their layout."""
        weights, masks = self.weights(), self.masks
        if self.is_dense:
            return {_DENSE: weights}
        plan = block_sparse.choose(tokens, weights, masks, platform, self.core.implementation)
        return {plan.layout: block_sparse.pack(weights, plan, masks)}


class Correction(nn.Module):
    """One linear correction ``y B``, with a block-sparse matrix B that is initialised to zero.

    Attributes:
      mask: mask of B, over ``(d_model, d_model)``.
      implementation: name of the plan to force, or ``None`` to take the cheapest.
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

    def __call__(self, y: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return block_sparse.block_sparse_matmul(
            *(y, self.weights(), self.mask),
            implementation=self.implementation,
            packed=self.variables.get(PACKED, {}),
        )

    def weights(self) -> Float[Array, "..."]:
        """Returns the kernel in ``dtype``."""
        return promote_dtype(self.kernel, dtype=self.dtype)[0]

    def packed(self, tokens: int, platform: Platform) -> Packed:
        """Returns the kernel packed for calls of some tokens, by the name of its layout."""
        kernel = self.weights()
        plan = block_sparse.choose_map(tokens, kernel, self.mask, platform, self.implementation)
        return {plan.layout: block_sparse.pack_map(kernel, plan.name, self.mask)}


class SparseFFN(nn.Module):
    """A sparse feed-forward layer that takes the place of a transformer's dense FFN.

    It maps ``x`` of shape (..., d_model) to ``y`` of the same shape:
    ``y = down(poly(up(x) + bias)) + core(x) + bias``, followed by ``y = y + y B_k`` for every
    linear correction. In a gated layer, hidden units are products of two maps of x:
    ``poly(gate(x)) * up(x)``. A spectral branch without hidden units adds one linear map of x in
    their place. Each part is optional; see :class:`SparseFFNConfig`. A layer that
    consists of a dense core with all hidden units is the dense FFN itself.

    Every call packs the weights for the plans that it runs, unless :meth:`pack` has packed them
    once.

    Backward passes are written out, so that forward mode alone (``jax.jvp``, ``jax.jacfwd``) is not
    supported; forward over reverse is, except in kernels for GPUs.

    Attributes:
      config: the parts of the layer and their static masks.
      dtype: dtype of the computation and of ``y``; products accumulate in float32, and the
        polynomial is evaluated in float32.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: on a call, if the last axis of ``x`` has not ``d_model`` channels.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> layer = sf.SparseFFN(sf.size_ffn(d_model=64, d_ff=256, flops_ratio=0.5))
      >>> x = jnp.ones((2, 16, 64))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(variables, x).shape
      (2, 16, 64)
      >>> packed = layer.pack(variables, 1)  # Packs the weights for calls of one token.
      >>> layer.apply(packed, x[:1, :1]).shape
      (1, 1, 64)
    """

    config: SparseFFNConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        config = self.config
        if config.spectral is not None:
            branch = Bypass if config.spectral.is_bypass else SpectralBranch
            self.spectral = branch(config, self.dtype, self.param_dtype)
        if config.micro is not None:
            if config.micro.core is not None:
                self.core = Core(config, self.dtype, self.param_dtype)
            self.correction = [
                Correction(mask, config.micro.implementation, self.dtype, self.param_dtype)
                for mask in config.micro.corrections
            ]
        if config.bias:
            self.bias = bias_of(self, config.d_model)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        config = self.config
        if x.shape[-1] != config.d_model:
            raise ValueError(f"x has {x.shape[-1]} channels, but d_model={config.d_model}")
        if is_for_a_gpu():
            warn_of_padding(config)
        (x,) = promote_dtype(x, dtype=self.dtype)
        if self._core_is_beside_bypass:
            y = self._core_and_bypass(x)
        else:
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
        return y

    def pack(
        self, variables: Mapping[str, Any], *tokens: int, platform: Platform | None = None
    ) -> dict[str, Any]:
        """Packs the weights once, in ``dtype``, for calls that do not change them.

        Args:
          variables: variables of the layer, with the collection ``params``.
          *tokens: number of tokens of a call, all its sequences together; give one number for each
            kind of call, such as 1 for decoding one sequence. Plans depend on this number: a call
            that runs by another plan packs its weights itself.
          platform: the platform that the calls are compiled for; ``None`` takes the platform that
            ``variables`` lie on.

        Returns:
          ``variables`` with a collection ``packed`` beside ``params``. The collection takes memory
          of its own, and must be packed again when ``params`` change.
        """
        platform = platform_of(variables) if platform is None else platform

        @jax.jit
        def packed(variables: Mapping[str, Any]) -> Any:
            return self.apply(variables, tokens, platform, method=SparseFFN.packed)

        return {**variables, PACKED: packed(variables)}

    def packed(self, tokens: Sequence[int], platform: Platform) -> dict[str, Any]:
        """Returns the collection ``packed`` of a bound layer, as :meth:`pack` describes it."""
        branches: dict[str, Callable[[int, Platform], Packed]] = {}
        if self._core_is_beside_bypass:
            branches[_CORE_AND_BYPASS] = self._packed_core_and_bypass
        else:
            if self.config.spectral is not None:
                branches["spectral"] = self.spectral.packed
            if self.config.micro is not None and self.config.micro.core is not None:
                branches["core"] = self.core.packed
        for i, correction in enumerate(self._corrections()):
            branches[f"correction_{i}"] = correction.packed
        collection: dict[str, Any] = {name: {} for name in branches}
        for name, packed in branches.items():
            for count in tokens:
                collection[name] |= packed(count, platform)
        return collection

    @property
    def _core_is_beside_bypass(self) -> bool:
        """Whether there are a dense core and a low-rank bypass, which then run as one operator."""
        branch, micro = self.config.spectral, self.config.micro
        return (
            branch is not None
            and branch.is_bypass
            and branch.transform == "low_rank"
            and micro is not None
            and micro.core is not None
            and micro.core.up_mask is None
            and micro.core.down_mask is None
        )

    def _core_and_bypass(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        assert self.config.spectral is not None
        return core_and_bypass.layer(
            *(x, self._weights(), Activate(self.config.activation), Channels(self.core.biases())),
            implementation=self.config.spectral.implementation,
            packed=self.variables.get(PACKED, {}).get(_CORE_AND_BYPASS),
        )

    def _packed_core_and_bypass(self, tokens: int, platform: Platform) -> Packed:
        assert self.config.spectral is not None
        weights, forced = self._weights(), self.config.spectral.implementation
        plan = core_and_bypass.choose(tokens, weights, platform, forced, is_packed=True)
        return {plan.layout: core_and_bypass.pack(weights, plan)}

    def _weights(self) -> core_and_bypass.Weights:
        return core_and_bypass.Weights(self.core.weights(), self.spectral.weights())

    def _corrections(self) -> Sequence[Correction]:
        return self.correction if self.config.micro is not None else ()
