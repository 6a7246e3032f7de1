"""Ways to spend an FFN's budget: configurations of SparseFFN, and what it competes with.

Every method has one knob, its share of the dense FFN's FLOPs, and goes through the same closed
forms, distillation and training. Most peers are corners of SparseFFN's configuration space; only
Monarch needs a module of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sparseffn_jax.bench.monarch import MonarchConfig, MonarchFFN, fit_monarch
from sparseffn_jax.bench.published import (
    KeepUnits,
    NoFFN,
    fluctuation,
    magnitude,
    rank_layers,
)
from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.defaults import REPAIR
from sparseffn_jax.measure import costs
from sparseffn_jax.models.decoder import Decoder, replace_ffns
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.sparsify.convert import Fit, sparsify
from sparseffn_jax.sparsify.dense import DenseFFN
from sparseffn_jax.sparsify.distill import distill_layer
from sparseffn_jax.sparsify.fit import fit_layer
from sparseffn_jax.sparsify.layers import convert_layers
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.sparsify.streams import LayerActivations

Params = dict[str, Any]
_BLOCK = 32
_MONARCH_BLOCKS = 4
_CORE_SHARES = (0.25, 0.5, 0.75, 0.9)
# Windows of calibration text on which FFNs to drop are chosen.
_RANKING_WINDOWS = 32


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """How every method is started, in the terms of :func:`sparsify`.

    Attributes:
      calibration: (n, t) token ids of the calibration text.
      distill_steps: steps of layer-wise distillation after the closed forms; 0 for none.
      batch_size: number of windows in one forward pass of the dense model.
      seed: seed of the distillation's batches.
    """

    calibration: Int[np.ndarray, "n t"]
    distill_steps: int = 300
    batch_size: int = 8
    seed: int = 0

    def sparsify(
        self, model: Decoder, params: Params, config: Any, **options: Any
    ) -> tuple[Decoder, Params]:
        """Calls :func:`sparsify` with these settings and other options."""
        return sparsify(
            model,
            params,
            config,
            self.calibration,
            distill_steps=self.distill_steps,
            batch_size=self.batch_size,
            seed=self.seed,
            **options,
        )


class Method(Protocol):
    """One way to replace a model's dense FFNs."""

    def size(self, spec: DecoderSpec, flops_ratio: float) -> Any:
        """Returns the largest configuration within a share of the dense FFN's FLOPs.

        Args:
          spec: sizes of the model whose FFNs are to be replaced.
          flops_ratio: the share, above 0 and at most 1.

        Returns:
          A configuration that the other functions take, with a method ``to_dict()`` for JSON.

        Raises:
          ValueError: if there is no configuration so small.
        """
        ...

    def flops_ratio(self, config: Any) -> float:
        """Returns a configuration's floating-point operations over those of the dense FFN."""
        ...

    def ffns(self, config: Any, n_layer: int) -> tuple[Any, ...]:
        """Returns what a :class:`Decoder` of ``n_layer`` layers takes as ``ffns``."""
        ...

    def convert(
        self, model: Decoder, params: Params, config: Any, start: WarmStart
    ) -> tuple[Decoder, Params]:
        """Replaces every dense FFN and fits what replaces it.

        Args:
          model: a dense model.
          params: its parameters, which are not changed.
          config: a configuration.
          start: how the replacements are fitted.

        Returns:
          The sparse model and its parameters.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SparseMethod:
    """A line through SparseFFN's configuration space.

    Attributes:
      sizes: returns the configuration for a model's sizes and a FLOPs ratio, as
        :meth:`Method.size` does.
      fit: fits one layer in closed form, as :func:`sparsify` takes it.
      repair: share of earlier losses that a layer makes up for.
    """

    sizes: Callable[[DecoderSpec, float], SparseFFNConfig]
    fit: Fit = fit_layer
    repair: float = REPAIR

    def size(self, spec: DecoderSpec, flops_ratio: float) -> SparseFFNConfig:
        """Returns the largest configuration of the line within a share of the dense FFN's FLOPs."""
        return self.sizes(spec, flops_ratio)

    def flops_ratio(self, config: SparseFFNConfig) -> float:
        """Returns a layer's floating-point operations over those of the dense FFN."""
        return costs.flops_ratio(config)

    def ffns(self, config: SparseFFNConfig, n_layer: int) -> tuple[SparseFFNConfig, ...]:
        """Returns the configuration itself, once for every layer."""
        return (config,) * n_layer

    def convert(
        self, model: Decoder, params: Params, config: SparseFFNConfig, start: WarmStart
    ) -> tuple[Decoder, Params]:
        """Calls :func:`sparsify`."""
        return start.sparsify(model, params, config, fit=self.fit, repair=self.repair)


@dataclasses.dataclass(frozen=True)
class Searched:
    """The best of several methods at each target: a search over how a budget is shared out.

    Attributes:
      candidates: the methods by their names.
    """

    candidates: Mapping[str, Method]


@dataclasses.dataclass(frozen=True)
class MonarchMethod:
    """A Monarch FFN in the place of every dense one: both maps are made of low-rank blocks.

    Attributes:
      repair: share of earlier losses that a layer makes up for.
    """

    repair: float = REPAIR

    def size(self, spec: DecoderSpec, flops_ratio: float) -> MonarchConfig:
        """Returns the Monarch FFN of the largest rank within a share of the dense FFN's FLOPs."""
        blocks = math.gcd(spec.d_model, spec.d_ff, _MONARCH_BLOCKS)
        one = MonarchConfig(
            spec.d_model, spec.d_ff, spec.activation, blocks, 1, spec.gated, spec.ffn_bias
        )
        rank = int(flops_ratio / one.flops_ratio)
        return dataclasses.replace(one, rank=_at_least_one(rank, flops_ratio))

    def flops_ratio(self, config: MonarchConfig) -> float:
        """Returns a Monarch FFN's floating-point operations over those of the dense FFN."""
        return config.flops_ratio

    def ffns(self, config: MonarchConfig, n_layer: int) -> tuple[Callable[..., MonarchFFN], ...]:
        """Returns the layers' constructor, which a :class:`Decoder` calls with its dtypes."""
        return (functools.partial(MonarchFFN, config),) * n_layer

    def convert(
        self, model: Decoder, params: Params, config: MonarchConfig, start: WarmStart
    ) -> tuple[Decoder, Params]:
        """Fits every layer in closed form and then by layer-wise distillation."""

        def fit(layer, dense, activations):
            leaves = fit_monarch(dense, config, activations)
            return ffns[layer], distill_layer(
                MonarchFFN(config), leaves, activations, steps=start.distill_steps, seed=start.seed
            )

        ffns = self.ffns(config, model.spec.n_layer)

        return convert_layers(
            model,
            params,
            range(model.spec.n_layer),
            fit,
            start.calibration,
            repair=self.repair,
            batch_size=start.batch_size,
        )


class DepthConfig(NamedTuple):
    """How many of a model's FFNs are dropped.

    Attributes:
      dropped: their number.
      n_layer: number of layers.
    """

    dropped: int
    n_layer: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dict that JSON can hold."""
        return self._asdict()


class DepthMethod:
    """Whole FFNs dropped, those first whose loss alone costs least on calibration text."""

    def size(self, spec: DecoderSpec, flops_ratio: float) -> DepthConfig:
        """Returns how many FFNs must be dropped for a share of the dense FFNs' FLOPs."""
        kept = _at_least_one(int(flops_ratio * spec.n_layer), flops_ratio)
        return DepthConfig(spec.n_layer - kept, spec.n_layer)

    def flops_ratio(self, config: DepthConfig) -> float:
        """Returns the share of the FFNs that stay."""
        return (config.n_layer - config.dropped) / config.n_layer

    def ffns(self, config: DepthConfig, n_layer: int) -> tuple[Any, ...]:
        """Returns as many dropped FFNs; which ones they are does not change the time."""
        return (NoFFN,) * config.dropped + (None,) * (n_layer - config.dropped)

    def convert(
        self, model: Decoder, params: Params, config: DepthConfig, start: WarmStart
    ) -> tuple[Decoder, Params]:
        """Drops FFNs; there is nothing to fit."""
        text, batch_size = start.calibration[:_RANKING_WINDOWS], start.batch_size
        dropped = rank_layers(model, params, text, batch_size=batch_size)[: config.dropped]
        ffns = tuple(NoFFN if i in dropped else None for i in range(config.n_layer))
        return model.clone(ffns=ffns), replace_ffns(model, params, {i: {} for i in dropped})


def all_units(
    spec: DecoderSpec, flops_ratio: float, polynomial: PolynomialConfig | None = None
) -> SparseFFNConfig:
    """Keeps all hidden units and thins both maps to low rank.

    Args:
      spec: sizes of the model whose FFNs are to be replaced.
      flops_ratio: share of the dense FFN's FLOPs that is not exceeded.
      polynomial: the activation, or ``None`` for the dense FFN's own.
    """
    return mixed(spec, flops_ratio, 0.0, polynomial=polynomial)


def mixed(
    spec: DecoderSpec,
    flops_ratio: float,
    core_share: float,
    polynomial: PolynomialConfig | None = None,
) -> SparseFFNConfig:
    """Spends a share of the budget on a core, the rest on a low-rank branch of all other units.

    Args:
      spec: sizes of the model whose FFNs are to be replaced.
      flops_ratio: share of the dense FFN's FLOPs that is not exceeded.
      core_share: the core's share of these FLOPs, from 0 to below 1.
      polynomial: the activation of the branch, or ``None`` for the dense FFN's own.
    """
    d_model, d_ff = spec.d_model, spec.d_ff
    core = int(core_share * flops_ratio * d_ff) // 16 * 16
    width = d_ff - core
    left = d_model * (flops_ratio * d_ff - core)
    rank = _affordable_rank(d_model, width, spec.gated, polynomial, left)
    return _sparse_ffn(
        spec,
        spectral=SpectralConfig("low_rank", width, _at_least_one(rank, flops_ratio)),
        polynomial=polynomial,
        micro=MicroRefinementConfig(CoreConfig(core)) if core else None,
    )


def narrow(spec: DecoderSpec, flops_ratio: float) -> SparseFFNConfig:
    """Keeps some hidden units, chosen by elimination, with output weights refitted."""
    width = _at_least_one(int(flops_ratio * spec.d_ff), flops_ratio)
    width = width // 16 * 16 or width
    micro = MicroRefinementConfig(CoreConfig(width))
    return _sparse_ffn(spec, micro=micro)


def narrow_with_bias(spec: DecoderSpec, flops_ratio: float) -> SparseFFNConfig:
    """Keeps as many hidden units as :func:`narrow`, in a layer that has biases at any rate."""
    return dataclasses.replace(narrow(spec, flops_ratio), bias=True)


def circulant(spec: DecoderSpec, flops_ratio: float, block_size: int) -> SparseFFNConfig:
    """Spends on a block-circulant branch first, and what it leaves of the budget on a core.

    Args:
      spec: sizes of the model whose FFNs are to be replaced.
      flops_ratio: share of the dense FFN's FLOPs that is not exceeded.
      block_size: side of the circulant blocks.

    Raises:
      ValueError: if the budget is too small for such blocks.
    """

    def config(width: int, core: int) -> SparseFFNConfig:
        return _sparse_ffn(
            spec,
            spectral=SpectralConfig("block_circulant", width, block_size=block_size),
            polynomial=PolynomialConfig(4),
            micro=MicroRefinementConfig(CoreConfig(core)) if core else None,
        )

    left = flops_ratio - costs.flops_ratio(config(spec.d_ff, 0))
    core = max(0, int(left * spec.d_ff)) // 16 * 16
    for width in range((spec.d_ff - core) // block_size * block_size, 0, -block_size):
        if costs.flops_ratio(found := config(width, core)) <= flops_ratio:
            return found
    raise ValueError(f"flops_ratio={flops_ratio} is too small for block_size={block_size}")


def unstructured(spec: DecoderSpec, flops_ratio: float) -> SparseFFNConfig:
    """Keeps blocks of both maps, equally many for every output block.

    Which blocks those are does not change the time: here they are random, and
    :func:`place_blocks` chooses them for a layer's weights.
    """
    # At least 8 blocks on a side, or there would be little to choose.
    side = math.gcd(spec.d_model, spec.d_ff, _BLOCK, max(1, spec.d_model // 8))
    rows, columns = spec.d_model // side, spec.d_ff // side
    maps = 2 if spec.gated else 1

    def left(up: int) -> int:
        return min(columns, int(((maps + 1) * flops_ratio - maps * up / rows) * columns))

    up = min(rows, max(1, round(flops_ratio * rows)))
    # The map out of the hidden units has the finer choice, so it takes what the others leave.
    while left(up) < 1 and up > 1:
        up -= 1
    core = CoreConfig(
        spec.d_ff,
        _balanced_mask(np.random.default_rng(0).random((rows, columns)), up, side),
        _balanced_mask(
            np.random.default_rng(1).random((columns, rows)),
            _at_least_one(left(up), flops_ratio),
            side,
        ),
    )
    return _sparse_ffn(spec, micro=MicroRefinementConfig(core))


def fit_blocks(
    dense: DenseFFN, config: SparseFFNConfig, activations: LayerActivations
) -> tuple[SparseFFNConfig, Params]:
    """Fits a layer of :func:`unstructured` after putting its blocks in their places."""
    return fit_layer(dense, place_blocks(config, dense, activations), activations)


def place_blocks(
    config: SparseFFNConfig, dense: DenseFFN, activations: LayerActivations
) -> SparseFFNConfig:
    """Puts the blocks of :func:`unstructured` where weights meet large activations.

    A weight ``w`` counts ``w^2 E[a^2]``, where ``a`` is the activation that it multiplies (Sun et
    al. 2023, Wanda, 2306.11695), and a block counts the sum of what its weights count.

    Args:
      config: configuration from :func:`unstructured`.
      dense: the layer's dense FFN. Both maps into the hidden units of a gated one share their
        mask, so that a block counts what it counts in both.
      activations: inputs of the dense FFN on calibration text.

    Returns:
      The configuration with as many blocks, in other places.
    """
    core: Any = config.micro and config.micro.core
    squares = [0.0, 0.0]
    for x, _ in activations.chunks():
        hidden = dense.hidden([up(x) for up in dense.up_maps])
        sums = [np.asarray(jnp.sum(jnp.square(a), 0), np.float64) for a in (x, hidden)]
        squares = [total + part for total, part in zip(squares, sums, strict=True)]
    masks = {}
    for name, mask, maps, square in (
        ("up_mask", core.up_mask, dense.up_maps, squares[0]),
        ("down_mask", core.down_mask, (dense.down,), squares[1]),
    ):
        energy = square.reshape(-1, 1) * sum(linear.weight**2 for linear in maps)
        (rows, columns), (bi, bo) = mask.grid, mask.block_shape
        scores = energy.reshape(rows, bi, columns, bo).sum((1, 3))
        masks[name] = _balanced_mask(scores, int(np.array(mask.blocks)[:, 0].sum()), bi)
    core = dataclasses.replace(core, **masks)
    return dataclasses.replace(config, micro=MicroRefinementConfig(core))


def _affordable_rank(
    d_model: int,
    width: int,
    gated: bool,
    polynomial: PolynomialConfig | None,
    weights: float,
) -> int:
    """Returns the largest rank of a low-rank branch that a budget pays for, or 0.

    Args:
      d_model: number of channels in and out.
      width: number of hidden units of the branch.
      gated: whether the layer is gated.
      polynomial: the branch's activation; ``None`` costs nothing.
      weights: the budget, as a number of entries of one dense ``(d_model, hidden)`` map.
    """
    each = costs.dense_flops(1, 1, gated)
    left = each * weights
    if polynomial is not None:
        left -= 3 * polynomial.degrees[-1] * width
    rank = int(left / (each * (d_model + width))) if width else 0
    return max(0, min(rank, d_model, width))


def _sparse_ffn(spec: DecoderSpec, **parts: Any) -> SparseFFNConfig:
    return SparseFFNConfig(
        spec.d_model, spec.d_ff, spec.activation, gated=spec.gated, bias=spec.ffn_bias, **parts
    )


_QUARTIC = PolynomialConfig(4)
SPARSE: Mapping[str, Method | Searched] = MappingProxyType(
    {
        "SparseFFN": SparseMethod(size_model),
        "SparseFFN-bypass": SparseMethod(functools.partial(size_model, bypass=True)),
        "SparseFFN-low-rank": SparseMethod(functools.partial(all_units, polynomial=_QUARTIC)),
        "SparseFFN-searched": Searched(
            {
                f"core {share:g}": SparseMethod(
                    functools.partial(mixed, core_share=share, polynomial=_QUARTIC)
                )
                for share in _CORE_SHARES
            }
            | {"narrow": SparseMethod(narrow)}
        ),
        "SparseFFN-circulant8": SparseMethod(functools.partial(circulant, block_size=8)),
        "SparseFFN-circulant16": SparseMethod(functools.partial(circulant, block_size=16)),
    }
)


def _peers(repair: float, refit: bool) -> dict[str, Method | Searched]:
    """Returns the peers whose layers are fitted.

    Args:
      repair: share of earlier losses that a layer makes up for.
      refit: whether those refit output weights too that do not by themselves.
    """
    method = functools.partial(SparseMethod, repair=repair)
    return {
        "magnitude": method(narrow, KeepUnits(magnitude, refit)),
        "FLAP": method(narrow_with_bias, KeepUnits(fluctuation, refit, keep_means=True)),
        "narrow": method(narrow),
        "low-rank": method(all_units),
        "SoLA": Searched(
            {
                f"core {share:g}": method(functools.partial(mixed, core_share=share))
                for share in _CORE_SHARES
            }
        ),
        "Monarch": MonarchMethod(repair),
        "block-sparse": method(unstructured, fit_blocks),
    }


# None of them repairs what the layers before have lost, as in the papers.
PEERS: Mapping[str, Method | Searched] = MappingProxyType(
    _peers(0.0, refit=False) | {"depth": DepthMethod()}
)
# The same with what helps them and is not ours alone.
HELPED: Mapping[str, Method | Searched] = MappingProxyType(
    {f"{name}+repair": method for name, method in _peers(REPAIR, refit=True).items()}
)


def _balanced_mask(scores, kept, side) -> BlockMask:
    """Keeps the ``kept`` highest scores of every column, so that one batched GEMM runs them all."""
    ranks = np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0)
    return BlockMask.from_array(ranks < kept, (side, side))


def _at_least_one(count: int, flops_ratio: float) -> int:
    if count < 1:
        raise ValueError(f"flops_ratio={flops_ratio:g} is too small: it leaves nothing")
    return count
