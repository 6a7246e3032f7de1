"""The fit of one layer in closed form, on calibration activations.

The units whose loss would cost most go to the core as they are. The spectral branch approximates
the input weights of other units in the transform domain, and its polynomial is fitted to the true
outputs of these units. The output weights of all branches are then regressed jointly on the dense
FFN's outputs, and the corrections on the error that is left. Each step is a function of the results
of earlier steps.

A core of whole units beside a bypass, or alone, needs the calibration text once: all that it could
be made of, the layer's inputs and the dense FFN's units, is known before anything is chosen.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseffn_jax.config import CoreConfig, PolynomialConfig, SparseFFNConfig, SpectralConfig
from sparseffn_jax.measure.memory import trim_heap
from sparseffn_jax.ops import polynomial
from sparseffn_jax.ops.fourier import circulant_matrix
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.sparsify import closed_form
from sparseffn_jax.sparsify.closed_form import Moments
from sparseffn_jax.sparsify.dense import DenseFFN, Linear
from sparseffn_jax.sparsify.selection import (
    Scores,
    Units,
    choose_units,
    eliminate,
    score_units,
)
from sparseffn_jax.sparsify.streams import LayerActivations

Leaves = dict[str, Any]
Chunks = Iterator[tuple[Float[Array, "c i"], Float[Array, "c o"]]]
_BACKFITTING_TURNS = 4
# A sample of tokens is plenty for a handful of coefficients.
_POLYNOMIAL_TOKENS = 4096


class Calibration(NamedTuple):
    """What a dense FFN does on calibration text.

    Attributes:
      activations: inputs of the layer, and the outputs that it should have.
      moments: moments of the inputs; their means are zero if the layer has no bias.
      scores: scores of the hidden units.
    """

    activations: LayerActivations
    moments: Moments
    scores: Scores


class Branch(NamedTuple):
    """One branch up to its hidden units.

    Attributes:
      leaves: parameters of the maps into the hidden units.
      features: function from inputs (c, d_model) to hidden units (c, width), which are the inputs
        of the map out of them.
      width: number of hidden units.
    """

    leaves: Leaves
    features: Callable[[Float[Array, "c d"]], Float[Array, "c m"]]
    width: int


class Outputs(NamedTuple):
    """The map out of the hidden units of all branches.

    Attributes:
      spectral: leaves of the spectral branch's map; ``None`` if there is no such branch.
      weight: the map as one matrix, (spectral width + core width, d_model).
      core: the rows of ``weight`` that are the core's; ``None`` if there is no core.
      bias: bias of the layer, (d_model,).
    """

    spectral: Leaves | None
    weight: Float[np.ndarray, "m d"]
    core: Float[np.ndarray, "c d"] | None
    bias: Float[np.ndarray, " d"]


def fit_layer(
    dense: DenseFFN, config: SparseFFNConfig, activations: LayerActivations
) -> tuple[SparseFFNConfig, Leaves]:
    """Fits one SparseFFN to the outputs that a layer should have.

    Args:
      dense: the dense FFN that the layer replaces.
      config: configuration of the layer; the polynomial's radius is overwritten.
      activations: inputs of the layer, and the outputs that it should have.

    Returns:
      The config with the polynomial's fitted radius, and float32 parameters.
    """
    if is_whole(config):
        return config, jax.tree.map(as_float32, _whole(dense, config))
    core, branch = _core_of(config), config.spectral
    leaves: Leaves = {}
    spectral = kept = None
    if (core is None or core.up_mask is None) and (branch is None or branch.is_bypass):
        spectral, kept, moments = _choose_features(dense, config, activations)
    else:
        calibration = calibrate(dense, config, activations)
        units = _choose_units(dense, config, calibration)
        if branch is not None and branch.is_bypass:
            spectral = _bypass(config)
        elif branch is not None:
            config, spectral = fit_spectral(dense, config, branch, calibration, units)
        if core is not None:
            kept = fit_core(dense, config, core, calibration.moments, units.core)
        moments = _moments_of_branches(config, activations, spectral, kept)
    branches = [part for part in (spectral, kept) if part is not None]
    outputs = fit_outputs(config, moments, spectral, kept)
    if spectral is not None:
        name = "bypass" if branch is not None and branch.is_bypass else "down"
        leaves["spectral"] = spectral.leaves | {name: outputs.spectral}
    if kept is not None and core is not None:
        down_kernel = stored(outputs.core, core.down_mask)
        leaves["core"] = kept.leaves | {"down": {"kernel": down_kernel}}
    if config.bias:
        leaves["bias"] = outputs.bias
    masks = config.micro.corrections if config.micro is not None else ()
    down = Linear(outputs.weight, outputs.bias)
    for i, weight in enumerate(
        fit_corrections(masks, activations, lambda x: down(_features(branches, x)))
    ):
        leaves[f"correction_{i}"] = {"kernel": stored(weight, masks[i])}
    return config, jax.tree.map(as_float32, leaves)


def is_whole(config: SparseFFNConfig | None) -> bool:
    """Returns whether the config describes the dense FFN itself: a dense core with all units."""
    if config is None or config.spectral is not None or config.micro is None:
        return False
    core = config.micro.core
    return (
        core is not None
        and not config.micro.corrections
        and core.width == config.d_ff
        and core.up_mask is None
        and core.down_mask is None
    )


def calibrate(
    dense: DenseFFN, config: SparseFFNConfig, activations: LayerActivations
) -> Calibration:
    """Measures the inputs' moments and scores the hidden units."""
    inputs = ((x, x[:, :0]) for x, _ in activations.chunks())
    return Calibration(
        activations,
        Moments.of(inputs, centred=config.bias),
        score_units(dense, activations, centred=config.bias),
    )


def fit_spectral(
    dense: DenseFFN,
    config: SparseFFNConfig,
    branch: SpectralConfig,
    calibration: Calibration,
    units: Units,
) -> tuple[SparseFFNConfig, Branch]:
    """Fits the spectral branch's maps into the hidden units, and its polynomial.

    Returns:
      The config with the polynomial's fitted radius, and the branch.
    """
    leaves, mapped = {}, []
    maps = zip(config.up_maps, dense.up_maps, calibration.scores.sensitivities, strict=True)
    for name, full, sensitivity in maps:
        linear = full.outputs(units.spectral)
        moments = _moments_of(calibration.moments, linear.weight)
        factors, weight = _fit_up(branch, linear.weight, moments, sensitivity[units.spectral])
        mapped.append(_with_mean_kept(linear, weight, calibration.moments, config.bias))
        leaves[name] = factors | ({"bias": mapped[-1].bias} if config.bias else {})
    if config.polynomial is None:
        return config, Branch(leaves, _dense_features(dense, mapped), branch.width)
    # What a channel should say: the true unit's output, of which its pre-activation knows a part.
    x, _ = calibration.activations.sample(_POLYNOMIAL_TOKENS)
    target = np.asarray(dense.hidden([up.outputs(units.spectral)(x) for up in dense.up_maps]))
    us = [np.asarray(linear(x)) for linear in mapped]
    weights = np.linalg.norm(dense.down.weight[units.spectral], axis=1) ** 2
    fitted, coefficients = closed_form.fit_polynomial(config.polynomial, us, target, weights)
    leaves["polynomial"] = coefficients
    features = _polynomial_features(mapped, coefficients, fitted)
    config = dataclasses.replace(config, polynomial=fitted)
    return config, Branch(leaves, features, branch.width)


def fit_core(
    dense: DenseFFN,
    config: SparseFFNConfig,
    core: CoreConfig,
    inputs: Moments | None,
    units: Int[np.ndarray, " c"],
) -> Branch:
    """Copies the core units' input weights from the dense FFN, or regresses them if masked.

    Args:
      dense: the dense FFN that the layer replaces.
      config: configuration of the layer.
      core: configuration of the core.
      inputs: moments of the inputs, which a mask needs.
      units: numbers of the units that the core keeps.
    """
    leaves, maps = {}, []
    for name, full in zip(config.up_maps, dense.up_maps, strict=True):
        mapped = full.outputs(units)
        if (mask := core.up_mask) is not None:
            assert inputs is not None
            weight = closed_form.masked_regression(_moments_of(inputs, mapped.weight), mask)
            mapped = _with_mean_kept(mapped, weight, inputs, config.bias)
        maps.append(mapped)
        bias = {"bias": mapped.bias} if config.bias else {}
        leaves[name] = {"kernel": stored(mapped.weight, mask)} | bias
    return Branch(leaves, _dense_features(dense, maps), core.width)


def fit_outputs(
    config: SparseFFNConfig,
    moments: Moments,
    spectral: Branch | None,
    core: Branch | None,
) -> Outputs:
    """Regresses the layer's outputs jointly on what the branches give.

    Args:
      config: configuration of the layer.
      moments: moments of the branches' features, the spectral branch's first, and the outputs that
        the layer should have.
      spectral: the spectral branch; ``None`` if there is no such branch.
      core: the core; ``None`` if there is no core.
    """
    ours = slice(0, 0 if spectral is None else spectral.width)
    cores = slice(ours.stop, None)
    weight = np.zeros((len(moments.xx), config.d_model))
    core_config = _core_of(config)
    mask = core_config.down_mask if core_config is not None else None
    factors = None
    # Unmasked, the core's weights can be solved for exactly at any spectral part; masked, the two
    # take turns.
    for _ in range(1 if mask is None or spectral is None else _BACKFITTING_TURNS):
        if config.spectral is not None:
            left = moments
            if core is not None and mask is None:
                left = moments.without(ours, cores)
            elif core is not None:
                left = moments.residual(ours, cores, weight[cores])
            factors, weight[ours] = _fit_down(config.spectral, left)
        if core is not None:
            left = moments.residual(cores, ours, weight[ours])
            weight[cores] = closed_form.masked_regression(left, mask)
    bias = moments.y_mean - moments.x_mean @ weight
    return Outputs(factors, weight, None if core is None else weight[cores], bias)


def fit_corrections(
    masks: tuple[BlockMask, ...],
    activations: LayerActivations,
    layer: Callable[[Float[Array, "c d"]], Float[Array, "c d"]],
) -> list[Float[np.ndarray, "d d"]]:
    """Regresses the remaining error on the layer's output, one correction after the other.

    Args:
      masks: mask of each correction, over (d_model, d_model).
      activations: inputs of the layer, and the outputs that it should have.
      layer: the layer without corrections.

    Returns:
      The dense matrix (d_model, d_model) of each correction, which is zero where it is masked.
    """
    corrections: list[Linear] = []

    def outputs_and_errors() -> Chunks:
        for x, target in activations.chunks():
            output = layer(x)
            for correction in corrections:
                output += correction(output)
            yield output, target - output

    for mask in masks:
        # Not centred: a correction sees the output with its mean and adds no bias.
        moments = Moments.of(outputs_and_errors(), centred=False)
        weight = closed_form.masked_regression(moments, mask)
        corrections.append(Linear(weight, np.zeros(mask.shape[1])))
    return [correction.weight for correction in corrections]


def stored(weight: Any, mask: BlockMask | None) -> Any:
    """Returns a dense weight in the form in which a layer stores it."""
    return weight if mask is None else mask.compress(weight)


def as_float32(x: Any) -> np.ndarray:
    """Returns a NumPy array in float32."""
    return np.asarray(x, np.float32)


def _bypass(config: SparseFFNConfig) -> Branch:
    """Returns a bypass as a branch: the inputs themselves are its features."""
    return Branch({}, lambda x: x, config.d_model)


def _choose_features(
    dense: DenseFFN, config: SparseFFNConfig, activations: LayerActivations
) -> tuple[Branch | None, Branch | None, Moments]:
    """Chooses the core's units, given what a bypass explains.

    Returns:
      The bypass and the core, each ``None`` where the layer has none, and the moments of what they
      give.
    """
    core, branch = _core_of(config), config.spectral
    bypass = None if branch is None else _bypass(config)
    given = 0 if bypass is None else bypass.width

    def features(x: Array) -> Array:
        hidden = _hidden(dense, dense.up_maps, x) if core is not None else x[:, :0]
        return jnp.concatenate([x[:, :given], hidden], axis=1)

    moments = Moments.of(
        ((features(x), target) for x, target in activations.chunks()), centred=config.bias
    )
    if core is None:
        return bypass, None, moments
    # The choice needs no more of the text, and blocks of other sizes than its chunks.
    dense.release()
    trim_heap()
    units = _units_beside(branch, moments, given, core.width)
    kept = fit_core(dense, config, core, None, units)
    return bypass, kept, moments.select(np.append(np.arange(given), given + units))


def _units_beside(
    branch: SpectralConfig | None, moments: Moments, given: int, kept: int
) -> Int[np.ndarray, " k"]:
    """Chooses the units that serve best beside a bypass of the first ``given`` features.

    The bypass is first taken to be any linear map; it explains too much then. Its own form, fitted
    beside the units chosen so, is what they are chosen by in the end.
    """
    inputs, hidden = slice(0, given), slice(given, None)
    if len(moments.xx) - given == kept:
        return np.arange(kept)
    if branch is None:
        return eliminate(moments, kept)
    units = eliminate(moments.without(hidden, inputs), kept, overwrite=True)
    beside = moments.select(np.append(np.arange(given), given + units)).without(inputs, hidden)
    factors, weight = _fit_down(branch, beside)
    if branch.transform != "low_rank":
        return eliminate(moments.residual(hidden, inputs, weight), kept)
    # The next path needs as much again as this one did.
    del beside, weight
    trim_heap()
    return eliminate(moments.without(hidden, inputs, factors["axes"]), kept, overwrite=True)


def _moments_of_branches(
    config: SparseFFNConfig,
    activations: LayerActivations,
    spectral: Branch | None,
    core: Branch | None,
) -> Moments:
    branches = [part for part in (spectral, core) if part is not None]
    return Moments.of(
        ((_features(branches, x), target) for x, target in activations.chunks()),
        centred=config.bias,
    )


def _features(branches: Sequence[Branch], x: Float[Array, "c d"]) -> Float[Array, "c m"]:
    return jnp.concatenate([x[:, :0], *(branch.features(x) for branch in branches)], axis=1)


def _hidden(dense: DenseFFN, maps: Sequence[Linear], x: Array) -> Array:
    return dense.hidden([linear(x) for linear in maps])


def _dense_features(dense: DenseFFN, maps: Sequence[Linear]) -> Callable[[Array], Array]:
    return lambda x: _hidden(dense, maps, x)


def _polynomial_features(
    maps: Sequence[Linear], coefficients: Any, polynomial_config: PolynomialConfig
) -> Callable[[Array], Array]:
    degrees, radius = polynomial_config.degrees, polynomial_config.radius
    coefficients = jnp.asarray(coefficients, jnp.float32)

    def features(x: Array) -> Array:
        u, *up = (linear(x) for linear in maps)
        value = polynomial.chebyshev(u, coefficients, degrees=degrees, radius=radius)
        return value * up[0] if up else value

    return features


def _core_of(config: SparseFFNConfig) -> CoreConfig | None:
    core = config.micro.core if config.micro is not None else None
    return None if core is None else core.without_dead_units()


def _whole(dense: DenseFFN, config: SparseFFNConfig) -> Leaves:
    """Returns the dense FFN's own weights, bit for bit."""
    core: Leaves = {"down": {"kernel": dense.down.weight}}
    for name, linear in zip(config.up_maps, dense.up_maps, strict=True):
        core[name] = {"kernel": linear.weight} | ({"bias": linear.bias} if config.bias else {})
    return {"core": core} | ({"bias": dense.down.bias} if config.bias else {})


def _choose_units(dense: DenseFFN, config: SparseFFNConfig, calibration: Calibration) -> Units:
    core, branch, scores = _core_of(config), config.spectral, calibration.scores
    chosen: Any = 0 if core is None else core.width
    if core is not None and core.width < dense.width:
        activations = calibration.activations
        chosen = eliminate(
            Moments.of(
                ((_hidden(dense, dense.up_maps, x), target) for x, target in activations.chunks()),
                centred=config.bias,
            ),
            core.width,
            overwrite=True,
        )
    return choose_units(scores, chosen, 0 if branch is None else branch.width)


def _moments_of(inputs: Moments, weight: Float[np.ndarray, "i o"]) -> Moments:
    """Returns the moments of regressing a linear map of the inputs on the inputs."""
    return Moments(inputs.xx, inputs.xx @ weight, inputs.x_mean, inputs.x_mean @ weight)


def _with_mean_kept(
    linear: Linear, weight: Float[np.ndarray, "i o"], inputs: Moments, has_bias: bool
) -> Linear:
    """Returns the map with another weight, and with a bias that keeps the outputs' means."""
    if not has_bias:
        return Linear(weight, np.zeros(weight.shape[1]))
    lost = inputs.x_mean @ (linear.weight - weight)
    return Linear(weight, linear.bias + lost)


def _fit_up(branch, weight, moments, sensitivity) -> tuple[Leaves, Float[np.ndarray, "i o"]]:
    """Returns the leaves of a map into the hidden units, and the matrix that they stand for."""
    if branch.transform == "low_rank":
        axes, filter = closed_form.whitened_svd(weight, moments.xx, branch.rank, sensitivity)
        return {"axes": axes, "filter": filter}, axes @ filter
    return _fit_circulant(branch, moments)


def _fit_down(branch, moments) -> tuple[Leaves, Float[np.ndarray, "i o"]]:
    """Returns the leaves of a map out of the hidden units, and the matrix that they stand for."""
    if branch.transform == "low_rank":
        rank = branch.down_rank or branch.rank
        axes, filter = closed_form.reduced_rank_regression(moments, rank)
        return {"axes": axes, "filter": filter}, axes @ filter
    return _fit_circulant(branch, moments)


def _fit_circulant(branch, moments) -> tuple[Leaves, Float[np.ndarray, "i o"]]:
    b, frequencies = branch.block_size, branch.frequencies
    real, imag = closed_form.block_circulant_regression(moments, b, frequencies)
    weight = circulant_matrix(
        jnp.asarray(real, jnp.float32), jnp.asarray(imag, jnp.float32), b, frequencies
    )
    # As the module has it: no leaf where no frequency has an imaginary part.
    leaves = {"real": real} | ({"imag": imag} if len(imag) else {})
    return leaves, np.asarray(weight, np.float64)
