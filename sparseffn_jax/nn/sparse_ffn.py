"""The sparse feed-forward layer: spectral map, learned polynomial, micro-refinement."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from sparseffn_jax.config import CoreConfig, PolynomialConfig, SparseFFNConfig, SpectralConfig
from sparseffn_jax.ops import spectral
from sparseffn_jax.ops.activations import Activation, get_activation
from sparseffn_jax.ops.block_sparse import BlockMask, block_sparse_ffn, block_sparse_matmul
from sparseffn_jax.ops.elementwise import add_bias
from sparseffn_jax.ops.polynomial import evaluate

Dtype = Any
# The collection of weights that are laid out for their plans.
PREPARED = "prepared"
_kernel_init = nn.initializers.lecun_normal()


class SpectralMap(nn.Module):
    """One linear map in a transform domain, its parameters; see :mod:`sparseffn_jax.ops.spectral`.

    Attributes:
      channels: input channels.
      features: output channels.
      config: which transform, and what of it is kept.
      rank: components kept (klt).
      band_limited: whether the inputs lie mostly in the kept frequencies already (dft), so that
        at initialisation a mask takes nothing from them that the others must make up for.
      dtype: of the computation.
      param_dtype: of the parameters: ``axes`` and ``filter`` (klt), ``real`` and, if any kept
        frequency has an imaginary part, ``imag`` (dft).
    """

    channels: int
    features: int
    config: SpectralConfig
    rank: int = 0
    band_limited: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> spectral.KLTMap | spectral.CirculantMap:
        """Returns the map in ``dtype``."""
        config, channels = self.config, self.channels
        if config.transform == "klt":
            shapes = {"axes": (channels, self.rank), "filter": (self.rank, self.features)}
            factors = [
                self.param(name, _kernel_init, shape, self.param_dtype)
                for name, shape in shapes.items()
            ]
            return spectral.KLTMap(*promote_dtype(*factors, dtype=self.dtype))
        b, frequencies = config.block_size, config.frequencies
        blocks = (channels // b, self.features // b)
        complex_count = len(spectral.complex_frequencies(frequencies, b))
        # Outputs have the variance of inputs. By Parseval's theorem a complex frequency adds four
        # times the entries' variance (real and imaginary part, and the same at the conjugate
        # frequency), DC and Nyquist add it once.
        carried = len(frequencies) + 3 * complex_count
        if self.band_limited:
            carried = b + 2 * ((b - 1) // 2)
        init = nn.initializers.normal(b / (channels * carried) ** 0.5)
        real = self.param("real", init, (len(frequencies), *blocks), self.param_dtype)
        # No parameter without entries: Orbax refuses to save one.
        imag = jnp.zeros((0, *blocks), self.param_dtype)
        if complex_count:
            imag = self.param("imag", init, (complex_count, *blocks), self.param_dtype)
        return spectral.CirculantMap(*promote_dtype(real, imag, dtype=self.dtype))


class BlockSparseKernel(nn.Module):
    """Weights of a linear map without bias, of which a static mask keeps some blocks.

    Attributes:
      channels: input channels.
      features: output channels.
      mask: over ``(channels, features)``; ``None`` is a dense kernel.
      dtype: of the computation.
      param_dtype: of the parameter ``kernel``, whose shape is ``mask.kernel_shape``.
      kernel_init: ``None`` keeps the variance of the inputs.
    """

    channels: int
    features: int
    mask: BlockMask | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        """Returns the kernel in ``dtype``."""
        shape, fan_in = (self.channels, self.features), self.channels
        if self.mask is not None:
            shape = self.mask.kernel_shape
            # What a living output adds up, on average.
            fan_in = self.mask.size / (len(self.mask.live_columns) * self.mask.block_shape[1])
        init = self.kernel_init or nn.initializers.normal(fan_in**-0.5)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        return promote_dtype(kernel, dtype=self.dtype)[0]


def prepared(module: nn.Module, variables: Mapping[str, Any], *args: Any) -> dict[str, Any]:
    """Returns the weights that all sparse FFNs of a module lay out in a call; nothing else runs.

    Args:
      module: a :class:`SparseFFN`, or a model with some.
      variables: of the module.
      *args: of the call.
    """

    @jax.jit
    def lay_out(variables, args):
        _, changed = module.apply(variables, *args, mutable=[PREPARED, "cache"])
        return changed.get(PREPARED, {})

    return lay_out({**variables, PREPARED: {}}, args)


class SparseFFN(nn.Module):
    """Drops into the place of a transformer's dense FFN (``mlp``): ``(..., d) -> (..., d)``.

    ``y = contract(poly(expand(x) + bias)) + core(x) + bias``, then ``y = y + y B_k`` for every
    linear step. Gated, hidden units are products of two maps of x: ``poly(gate) * up``. Each part
    is optional; see :class:`SparseFFNConfig`. With only a core of all hidden units it is the
    dense FFN itself.

    Weights are laid out for the plans that run them by every call, or once by :meth:`prepare`.

    Attributes:
      config: the parts and their static masks.
      dtype: of the computation; products accumulate in float32, the polynomial runs in float32.
      param_dtype: of the parameters.
    """

    config: SparseFFNConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        config = self.config
        if x.shape[-1] != config.d_model:
            raise ValueError(f"x has {x.shape[-1]} channels, but d_model={config.d_model}")
        parts = []
        if config.spectral is not None:
            parts.append(self._spectral(x, config.spectral))
        if config.micro is not None and config.micro.core is not None:
            with jax.named_scope("core"):
                parts.append(self._core(x, config.micro.core))
        y = self._biased(reduce(jnp.add, parts), "bias")
        if config.micro is not None:
            for i, mask in enumerate(config.micro.steps):
                with jax.named_scope("steps"):
                    kernel = self._kernel(
                        f"step_{i}", config.d_model, config.d_model, mask, nn.initializers.zeros
                    )
                    y = y + block_sparse_matmul(
                        y,
                        kernel,
                        mask,
                        implementation=config.micro.implementation,
                        lay_out=partial(self._laid_out, f"step_{i}"),
                    )
        return y

    def prepare(self, variables: Mapping[str, Any], *tokens: int) -> dict[str, Any]:
        """Lays the weights out once, in ``dtype``, for calls that do not change them.

        Args:
          variables: of the layer.
          *tokens: how many in all such calls have: 1 decodes one sequence. Plans depend on it; a
            call whose plan is another lays out its weights itself.

        Returns:
          ``variables`` with a collection ``prepared`` beside ``params``; it takes memory of its
          own, and has to be made anew when ``params`` change.
        """
        laid_out: dict[str, Any] = {}
        for count in tokens:
            x = jnp.zeros((count, self.config.d_model), self.dtype)
            laid_out |= prepared(self, variables, x)
        return {**variables, PREPARED: laid_out}

    def _laid_out(self, part: str, name: str, make: Callable[[], Any]) -> Any:
        name = f"{part}_{name}"
        if self.has_variable(PREPARED, name):
            return self.get_variable(PREPARED, name)
        weights = make()
        if self.is_mutable_collection(PREPARED) and not self.is_initializing():
            self.put_variable(PREPARED, name, weights)
        return weights

    def _spectral(self, x: Array, branch: SpectralConfig):
        d_model, width, expansions = self.config.d_model, branch.width, self.config.expansions
        common = {"config": branch, "dtype": self.dtype, "param_dtype": self.param_dtype}
        expand = [
            SpectralMap(d_model, width, rank=branch.rank, name=f"expand{which}", **common)()
            for which in expansions
        ]
        contract = SpectralMap(
            width,
            d_model,
            rank=branch.contract_rank or branch.rank,
            band_limited=True,
            name="contract",
            **common,
        )()
        channel: dict[str, Any] = {}
        if self.config.bias:
            channel["bias"] = [self._bias(f"expand_bias{which}", width) for which in expansions]
        if self.config.polynomial is not None:
            channel["coefficients"] = self._coefficients(self.config.polynomial, width)
        (x,) = promote_dtype(x, dtype=self.dtype)
        settings: dict[str, Any] = {
            "implementation": branch.implementation,
            "lay_out": partial(self._laid_out, "spectral"),
        }
        operator: Any = spectral.klt_ffn
        if branch.transform == "dft":
            operator = spectral.block_circulant_ffn
            settings |= {"block_size": branch.block_size, "frequencies": branch.frequencies}
        return operator(x, expand, self._activate, channel, contract, **settings)

    def _activate(self, us: Sequence[Array], channel: Mapping[str, Any]) -> Array:
        if "bias" in channel:
            us = [add_bias(u, bias) for u, bias in zip(us, channel["bias"], strict=True)]
        polynomial = self.config.polynomial
        if polynomial is None:
            return self._hidden(get_activation(self.config.activation), us)
        phi = partial(
            evaluate,
            coefficients=channel["coefficients"],
            degrees=polynomial.degrees,
            radius=polynomial.radius,
        )
        return self._hidden(phi, us)

    def _coefficients(self, polynomial: PolynomialConfig, width: int) -> Array:
        """Returns the polynomial's coefficients, one row a degree, for every channel or for all."""
        # T_1 alone: the identity until a warm start or training says otherwise.
        start = jnp.array([polynomial.radius * (k == 1) for k in polynomial.degrees])
        by_group = self.param(
            "polynomial",
            lambda _, shape, dtype: jnp.broadcast_to(start, shape).astype(dtype),
            (polynomial.groups, len(polynomial.degrees)),
            self.param_dtype,
        )
        if polynomial.groups > 1:
            by_group = jnp.repeat(by_group, width // polynomial.groups, axis=0)
        return by_group.T

    def _core(self, x: Array, core: CoreConfig):
        core, d_model = core.without_dead_units(), self.config.d_model
        expand = [
            self._kernel(f"core_expand{which}", d_model, core.width, core.expand_mask)
            for which in self.config.expansions
        ]
        biases = []
        if self.config.bias:
            biases = [
                self._bias(f"core_bias{which}", core.width) for which in self.config.expansions
            ]
        contract = self._kernel("core_contract", core.width, d_model, core.contract_mask)
        phi = get_activation(self.config.activation)

        def activate(us: Sequence[Array], biases: Sequence[Array]) -> Array:
            if biases:
                us = [add_bias(u, bias) for u, bias in zip(us, biases, strict=True)]
            return self._hidden(phi, us)

        (x,) = promote_dtype(x, dtype=self.dtype)
        return block_sparse_ffn(
            x,
            expand,
            activate,
            biases,
            contract,
            expand_mask=core.expand_mask,
            contract_mask=core.contract_mask,
            implementation=core.implementation,
            lay_out=partial(self._laid_out, "core"),
        )

    def _hidden(self, phi: Activation, us: Sequence[Array]):
        return phi(us[0]) * us[1] if self.config.gated else phi(us[0])

    def _kernel(self, name, channels, features, mask, kernel_init=None) -> Array:
        return BlockSparseKernel(
            channels,
            features,
            mask,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel_init,
            name=name,
        )()

    def _biased(self, x: Array, name: str):
        if not self.config.bias:
            return x
        return x + self._bias(name, x.shape[-1])

    def _bias(self, name: str, features: int):
        bias = self.param(name, nn.initializers.zeros, (features,), self.param_dtype)
        return promote_dtype(bias, dtype=self.dtype)[0]
