"""A plan says what each layer's FFN becomes, so that a budget costs as little loss as possible.

Every layer gets a list of candidates: cores of many widths, beside bypasses of several ranks, and
the dense FFN. One elimination path a rank gives the damage of all widths, in nats, by the Fisher
matrix of the layer's outputs. A mixed integer programme then takes one candidate a layer.

Damages that are estimated layer by layer on the dense model do not add up, because each converted
layer also repairs what those before it have lost. A trial conversion measures how much of it every
layer leaves; damages of early layers count for that much less. The idea of a library of candidates
and an integer programme is that of Puzzle (Bercovich et al. 2024, 2411.19146).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseffn_jax.checkpoints.dense_ffn import dense_width, units_of_component
from sparseffn_jax.checkpoints.weights import read_leaves
from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.models.decoder import FFN_NAME, Decoder, layers_of
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.sparsify.budget import Candidate, choose
from sparseffn_jax.sparsify.closed_form import Moments, reduced_rank_regression, ridge_solve
from sparseffn_jax.sparsify.dense import DenseFFN
from sparseffn_jax.sparsify.layers import outer_params
from sparseffn_jax.sparsify.selection import elimination_path
from sparseffn_jax.sparsify.streams import LayerActivations, Streams

# Widths are multiples of about this share of d_ff, and ranks of about this share of d_model; a plan
# needs no finer ones.
_WIDTH_SHARE, _RANK_SHARE = 1 / 24, 1 / 9
_MOST_RANKS = 5
# Directions that the loss does not feel on the text still count as much as this share of the mean.
_FISHER_FLOOR = 1e-3
# Share of the calibration text that layers are fitted on; the rest shows what they are worth.
FIT_SHARE = 0.75
# A layer that is cut much further than in the trial is repaired less than the trial shows. On
# SmolLM2 at 0.4 of the FLOPs the loss rises by 0.471 nats with a plan that expects no repair, by
# 0.490 with the shares of a trial as they are, and by 0.453 with their square roots.
_TRUST = 0.5

Size = tuple[int, int]
Configs = tuple[SparseFFNConfig | None, ...]


class Grid(NamedTuple):
    """The sizes that a layer may have beside the dense FFN.

    Attributes:
      widths: numbers of units in the core, descending; the first is all of them.
      ranks: ranks of the bypass, ascending; 0 stands for none.
    """

    widths: tuple[int, ...]
    ranks: tuple[int, ...]


def size_grid(spec: DecoderSpec) -> Grid:
    """Returns the sizes that are considered for a model's layers.

    They are multiples of a power of two, as are the sizes that machines like best: a GPU's tiles,
    and on a CPU half of 1,024 units, which take less time than the units beside it would.

    Args:
      spec: sizes of the model.
    """

    def multiples(whole: int, share: float) -> range:
        step = 2 ** max(0, round(math.log2(whole * share)))
        return range(step, whole, step)

    widths = (spec.d_ff, *reversed(multiples(spec.d_ff, _WIDTH_SHARE)))
    return Grid(widths, (0, *multiples(spec.d_model, _RANK_SHARE)[: _MOST_RANKS - 1]))


def candidates(spec: DecoderSpec, grid: Grid, *, servable: bool = False) -> list[Size]:
    """Returns the sizes among which a plan chooses; the dense FFN comes first.

    What costs as many operations as the dense FFN, or more, is left out: it would only be taken
    where the clock erred.

    Args:
      spec: sizes of the model.
      grid: widths and ranks.
      servable: whether layers are to run as dense FFNs, as :func:`as_served` makes them.
    """
    if servable:
        component = units_of_component(spec.activation, spec.gated) or math.inf
    else:
        # A component of the bypass has two vectors, a unit one for each map.
        component = 2 / (3 if spec.gated else 2)
    return [
        (width, rank)
        for rank in grid.ranks
        for width in grid.widths
        if (width, rank) == (spec.d_ff, 0) or (rank and component * rank) + width < spec.d_ff
    ]


def as_served(config: SparseFFNConfig | None, spec: DecoderSpec) -> SparseFFNConfig | None:
    """Returns the dense FFN as which :func:`sparseffn_jax.export_gguf` writes a layer of a plan.

    A bypass is hidden units there, so that it costs more than in a SparseFFN.

    Args:
      config: configuration of a core, beside a bypass or not; ``None`` stands for the dense FFN.
      spec: sizes of the model.
    """
    return None if config is None else config_of(spec, (dense_width(config), 0))


def config_of(spec: DecoderSpec, size: Size) -> SparseFFNConfig | None:
    """Returns the configuration of a core beside a bypass; ``None`` for the dense FFN.

    Args:
      spec: sizes of the model.
      size: width of the core and rank of the bypass.
    """
    width, rank = size
    if size == (spec.d_ff, 0):
        return None
    return SparseFFNConfig(
        spec.d_model,
        spec.d_ff,
        spec.activation,
        spectral=SpectralConfig("low_rank", rank=rank) if rank else None,
        micro=MicroRefinementConfig(CoreConfig(width)),
        gated=spec.gated,
        bias=spec.ffn_bias,
    )


def size_of(config: SparseFFNConfig | None, spec: DecoderSpec) -> Size:
    """Returns the size of which :func:`config_of` made a configuration."""
    if config is None:
        return spec.d_ff, 0
    assert config.micro is not None
    assert config.micro.core is not None
    return config.micro.core.width, config.spectral.rank if config.spectral else 0


def estimate_damages(
    dense: DenseFFN,
    activations: LayerActivations,
    fisher: Float[np.ndarray, "d d"],
    grid: Grid,
    *,
    centred: bool,
) -> dict[Size, float]:
    """Estimates by how much each size of one layer alone raises the loss, in nats a token.

    Units and weights are chosen on one part of the text, and their error is that on the other: on
    the text that it was fitted to, a layer looks several times as good as it is.

    Args:
      dense: the layer's dense FFN.
      activations: what it receives, and returns, on calibration text.
      fisher: Fisher matrix of its outputs.
      grid: widths and ranks.
      centred: whether the layer has a bias, which makes up for means.
    """
    root, d_model = root_of(fisher), fisher.shape[0]
    fitted, check = (
        _with_targets(Moments.of(_features_and_outputs(dense, part), centred=centred), root)
        for part in fit_and_check(activations)
    )
    # What the dense FFN returns is linear in its units.
    down, hidden = dense.down.weight @ root, check.xx[d_model:, d_model:]
    variance = float(np.sum(down * (hidden @ down)))
    every_axis, _ = reduced_rank_regression(_beside_half(fitted, d_model), grid.ranks[-1])
    damages: dict[Size, float] = {}
    for rank in grid.ranks:
        axes = every_axis[:, :rank]
        seen, unseen = _on_axes(fitted, axes), _on_axes(check, axes)
        given, units = slice(0, rank), slice(rank, None)
        left = seen.without(units, given) if rank else seen
        # What the bypass says of the targets and of every unit, once for all widths.
        both = np.hstack([seen.xy[given], seen.xx[given, units]])
        of_targets, of_units = np.hsplit(ridge_solve(seen.xx[given, given], both), [d_model])
        for kept in elimination_path(left, grid.widths):
            bypass = of_targets - of_units[:, kept.units] @ kept.weight
            rows = np.append(np.arange(rank), rank + kept.units)
            error = variance + _error(seen, unseen, rows, np.vstack([bypass, kept.weight]))
            damages[len(kept.units), rank] = 0.5 * max(error, 0.0)
    return damages | {(grid.widths[0], 0): 0.0}


def _error(
    seen: Moments, unseen: Moments, rows: Int[np.ndarray, " i"], weight: Float[np.ndarray, "i o"]
) -> float:
    """Returns the squared error on unseen text of some features' weights, fitted to seen text.

    The targets' own variance, which no weight changes, is left out.
    """
    checked = unseen.select(rows)
    products = weight * (checked.xx @ weight - 2.0 * checked.xy)
    shift = unseen.y_mean - seen.y_mean - (checked.x_mean - seen.x_mean[rows]) @ weight
    return float(np.sum(products) + np.sum(np.square(shift)))


def fit_and_check(activations: LayerActivations) -> tuple[LayerActivations, LayerActivations]:
    """Splits what is known of a layer into a part to fit on and a part to check on.

    Args:
      activations: what the layer receives, and should return, on calibration text.
    """
    split = round(FIT_SHARE * len(activations.x))
    first, second = (
        dataclasses.replace(activations, x=activations.x[rows], target=activations.target[rows])
        for rows in (slice(None, split), slice(split, None))
    )
    return first, second


def _features_and_outputs(
    dense: DenseFFN, activations: LayerActivations
) -> Iterator[tuple[Array, Array]]:
    for x, y in activations.chunks():
        hidden = dense.hidden([up(x) for up in dense.up_maps])
        yield jnp.concatenate([x, hidden], axis=1), y


def _with_targets(moments: Moments, root: Float[np.ndarray, "d d"]) -> Moments:
    """Returns the moments of other targets, ``y @ root``."""
    return dataclasses.replace(moments, xy=moments.xy @ root, y_mean=moments.y_mean @ root)


def _on_axes(moments: Moments, axes: Float[np.ndarray, "d r"]) -> Moments:
    """Returns the moments of the inputs' components and of the units behind them."""
    inputs, units = slice(0, len(axes)), slice(len(axes), None)
    across = axes.T @ moments.xx[inputs, units]
    return Moments(
        np.block(
            [
                [axes.T @ moments.xx[inputs, inputs] @ axes, across],
                [across.T, moments.xx[units, units]],
            ]
        ),
        np.vstack([axes.T @ moments.xy[inputs], moments.xy[units]]),
        np.append(moments.x_mean[inputs] @ axes, moments.x_mean[units]),
        moments.y_mean,
    )


def _beside_half(moments: Moments, given: int) -> Moments:
    """Returns the moments of a bypass beside half of the units, chosen given any linear map."""
    inputs, hidden = slice(0, given), slice(given, None)
    half = (len(moments.xx) - given) // 2
    (kept,) = elimination_path(moments.without(hidden, inputs), [half])
    both = np.append(np.arange(given), given + kept.units)
    return moments.select(both).without(inputs, hidden)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each layer of a model becomes.

    Attributes:
      layers: the chosen candidate of each layer; its damage is what is predicted to be left of it
        after the repair by later layers.
    """

    layers: tuple[Candidate, ...]

    @property
    def configs(self) -> Configs:
        """The configuration of each layer; ``None`` keeps it dense."""
        return tuple(layer.config for layer in self.layers)

    @property
    def damage(self) -> float:
        """The predicted rise of the loss, in nats a token."""
        return sum(layer.damage for layer in self.layers)


class Planner:
    """Chooses what each layer becomes, and learns from trial conversions.

    Args:
      model: a decoder whose layers are all dense.
      params: its parameters, in memory or loaded on demand.
      tokens: token ids (n, t) of calibration text.
      fisher: Fisher matrix of each layer's outputs.
      damages: what :func:`estimate_layers` yields.
      batch_size: number of windows in one forward pass; it changes the result by rounding alone.

    Attributes:
      model, params, tokens, fisher, batch_size: as they were given.
    """

    def __init__(
        self,
        model: Decoder,
        params: Mapping[str, Any],
        tokens: Int[np.ndarray, "n t"],
        fisher: Sequence[Float[np.ndarray, "d d"]],
        damages: Sequence[Mapping[Size, float]],
        *,
        batch_size: int = 4,
    ):
        self.model, self.params, self.tokens = model, params, tokens
        self.fisher, self.batch_size, self._damages = fisher, batch_size, damages
        # Until a trial says otherwise, what a layer loses is lost.
        self._left = np.ones(model.spec.n_layer)

    def plan(self, cost: Callable[[SparseFFNConfig | None], float], **limits: Any) -> Plan:
        """Chooses what each layer becomes.

        Args:
          cost: what a layer of this configuration costs.
          **limits: limits of :func:`sparseffn_jax.sparsify.budget.choose`.

        Raises:
          ValueError: if no plan keeps to the limits.
        """
        configs = [config_of(self.model.spec, size) for size in self._damages[0]]
        costs = [cost(config) for config in configs]
        layers = [
            [
                Candidate(config, price, weight * damage)
                for config, price, damage in zip(configs, costs, damages.values(), strict=True)
            ]
            for weight, damages in zip(self.weights, self._damages, strict=True)
        ]
        return Plan(tuple(choose(layers, **limits)))

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        """For each layer the share of its damage that the layers behind it leave."""
        return np.append(np.cumprod(self._left[:0:-1])[::-1], 1.0)

    def learn(self, layer: int, config: SparseFFNConfig, before: float, behind: float) -> None:
        """Notes how much of the damage before a layer it repairs, as a trial conversion shows.

        Args:
          layer: the layer's number.
          config: its configuration in the trial.
          before: the damage that the replaced layer before it leaves, in nats a token, above 0.
          behind: the damage behind the layer.
        """
        own = self._damages[layer][size_of(config, self.model.spec)]
        self._left[layer] = np.clip((behind - own) / before, 0.0, 1.0) ** _TRUST

    def without_bypasses(self) -> "Planner":
        """Returns a planner that chooses among widths alone, and has not tried anything out."""
        damages = [
            {(width, rank): x for (width, rank), x in layer.items() if not rank}
            for layer in self._damages
        ]
        args = self.model, self.params, self.tokens, self.fisher, damages
        return Planner(*args, batch_size=self.batch_size)


def estimate_layers(
    model: Decoder,
    params: Mapping[str, Any],
    tokens: Int[np.ndarray, "n t"],
    fisher: Sequence[Float[np.ndarray, "d d"]],
    grid: Grid,
    *,
    batch_size: int = 4,
    first: int = 0,
) -> Iterator[dict[Size, float]]:
    """Yields, layer by layer, what each size of it alone does to the loss, in nats a token.

    Args:
      model: a decoder whose layers are all dense.
      params: its parameters, in memory or loaded on demand.
      tokens: token ids (n, t) of calibration text.
      fisher: Fisher matrix of each layer's outputs.
      grid: the sizes.
      batch_size: number of windows in one forward pass; it changes the result by rounding alone.
      first: number of the first layer that is wanted.
    """
    spec, sizes = model.spec, candidates(model.spec, grid)
    if first == spec.n_layer:
        return
    streams = Streams(model, outer_params(model, params), tokens, batch_size=batch_size)
    for i, unread in enumerate(layers_of(model, params)):
        layer = read_leaves(unread)
        activations = streams.observe(i, layer)
        if i >= first:
            dense = DenseFFN.from_params(layer[FFN_NAME], model.ffn_layout, spec.activation)
            args = dense, activations, fisher[i], grid
            damages = estimate_damages(*args, centred=spec.ffn_bias)
            yield {size: damages[size] for size in sizes}


def root_of(fisher: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """Returns a root R of a Fisher matrix R R': errors times R are squared errors in nats.

    Directions that the loss does not feel on the text get a small weight all the same.

    Args:
      fisher: Fisher matrix of a layer's outputs.
    """
    values, vectors = np.linalg.eigh(fisher)
    return vectors * np.sqrt(np.maximum(values, _FISHER_FLOOR * values.mean()))
