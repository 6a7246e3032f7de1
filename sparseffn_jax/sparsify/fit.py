"""The fit of one layer in closed form, on calibration activations.

The units whose loss would cost most go to the core as they are. The spectral branch approximates
the input weights of other units in the transform domain, and its polynomial is fitted to the true
outputs of these units. The output weights of all branches are then regressed jointly on the dense
FFN's outputs, and the corrections on the error that is left. Each step is a function of the results
of earlier steps.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sparseffn_jax.config import CoreConfig, SparseFFNConfig, SpectralConfig
from sparseffn_jax.ops import polynomial
from sparseffn_jax.ops.fourier import circulant_matrix
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.sparsify import closed_form
from sparseffn_jax.sparsify.closed_form import Moments
from sparseffn_jax.sparsify.dense import DenseFFN, Linear
from sparseffn_jax.sparsify.selection import Scores, Units, choose_units, score_units

Leaves = dict[str, Any]
Activations = Float[np.ndarray, "n c"]
_BACKFITTING_TURNS = 4


class Calibration(NamedTuple):
    """A dense FFN's inputs, hidden units and outputs on calibration activations.

    Attributes:
      x: inputs (n, d_model), float32.
      moments: moments of the inputs; their means are zero if the layer has no bias.
      hidden: hidden units (n, d_ff).
      target: outputs (n, d_model).
      scores: scores of the hidden units.
    """

    x: Activations
    moments: Moments
    hidden: Activations
    target: Activations
    scores: Scores


class Branch(NamedTuple):
    """One branch up to its hidden units.

    Attributes:
      leaves: parameters of the maps into the hidden units.
      features: hidden units (n, width) on the calibration activations, which are the inputs of the
        map out of them.
    """

    leaves: Leaves
    features: Activations


class Outputs(NamedTuple):
    """The map out of the hidden units of all branches.

    Attributes:
      spectral: leaves of the spectral branch's map; ``None`` if there is no such branch.
      core: weight of the core's map; ``None`` if there is no core.
      bias: bias of the layer, (d_model,).
      output: outputs (n, d_model) of the layer on the calibration activations, without corrections.
    """

    spectral: Leaves | None
    core: Float[np.ndarray, "c d"] | None
    bias: Float[np.ndarray, " d"]
    output: Activations


def fit_layer(
    dense: DenseFFN, config: SparseFFNConfig, x: Activations
) -> tuple[SparseFFNConfig, Leaves]:
    """Fits one SparseFFN to one dense FFN on its inputs.

    Args:
      dense: the dense FFN that the layer replaces.
      config: configuration of the layer; the polynomial's radius is overwritten.
      x: calibration activations (n, d_model), float32.

    Returns:
      The config with the polynomial's fitted radius, and float32 parameters.
    """
    if is_whole(config):
        return config, jax.tree.map(as_float32, _whole(dense, config))
    calibration = calibrate(dense, config, x)
    core, branch = _core_of(config), config.spectral
    units = _choose_units(dense, config, calibration)
    leaves: Leaves = {}
    spectral = kept = None
    if branch is not None:
        config, spectral = fit_spectral(dense, config, branch, calibration, units)
        leaves["spectral"] = spectral.leaves
    if core is not None:
        kept = fit_core(dense, config, core, calibration, units)
        leaves["core"] = kept.leaves
    outputs = fit_outputs(config, calibration.target, spectral, kept)
    if outputs.spectral is not None:
        leaves["spectral"] |= {"down": outputs.spectral}
    if core is not None:
        leaves["core"] |= {"down": {"kernel": stored(outputs.core, core.down_mask)}}
    if config.bias:
        leaves["bias"] = outputs.bias
    masks = config.micro.corrections if config.micro is not None else ()
    for i, weight in enumerate(fit_corrections(masks, outputs.output, calibration.target)):
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


def calibrate(dense: DenseFFN, config: SparseFFNConfig, x: Activations) -> Calibration:
    """Runs a dense FFN on calibration activations and scores its hidden units."""
    hidden, slopes = dense.hidden([up(x) for up in dense.up_maps])
    return Calibration(
        x,
        Moments.of(x, x[:, :0], centred=config.bias),
        hidden,
        dense.down(hidden),
        score_units(dense, hidden, slopes, centred=config.bias),
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
    leaves, us = {}, []
    maps = zip(config.up_maps, dense.up_maps, calibration.scores.sensitivities, strict=True)
    for name, full, sensitivity in maps:
        linear = full.outputs(units.spectral)
        moments = _moments_of(calibration.moments, linear.weight)
        factors, weight = _fit_up(branch, linear.weight, moments, sensitivity[units.spectral])
        mapped = _with_mean_kept(linear, weight, calibration, config.bias)
        us.append(mapped(calibration.x))
        leaves[name] = factors | ({"bias": mapped.bias} if config.bias else {})
    if config.polynomial is None:
        return config, Branch(leaves, dense.hidden(us)[0])
    # What a channel should say: the true unit's output, of which its pre-activation knows a part.
    target = calibration.hidden[:, units.spectral]
    weights = np.linalg.norm(dense.down.weight[units.spectral], axis=1) ** 2
    fitted, coefficients = closed_form.fit_polynomial(config.polynomial, us, target, weights)
    leaves["polynomial"] = coefficients
    features = polynomial.chebyshev(
        jnp.asarray(us[0]),
        jnp.asarray(coefficients, jnp.float32),
        degrees=fitted.degrees,
        radius=fitted.radius,
    )
    branch_of = Branch(leaves, np.asarray(features) * (us[1] if config.gated else 1.0))
    return dataclasses.replace(config, polynomial=fitted), branch_of


def fit_core(
    dense: DenseFFN,
    config: SparseFFNConfig,
    core: CoreConfig,
    calibration: Calibration,
    units: Units,
) -> Branch:
    """Copies the core units' input weights from the dense FFN, or regresses them if masked."""
    leaves, us = {}, []
    for name, full in zip(config.up_maps, dense.up_maps, strict=True):
        linear = full.outputs(units.core)
        weight = linear.weight
        if (mask := core.up_mask) is not None:
            moments = _moments_of(calibration.moments, weight)
            weight = closed_form.masked_regression(moments, mask)
        mapped = _with_mean_kept(linear, weight, calibration, config.bias)
        us.append(mapped(calibration.x))
        bias = {"bias": mapped.bias} if config.bias else {}
        leaves[name] = {"kernel": stored(weight, mask)} | bias
    if core.up_mask is None:
        return Branch(leaves, calibration.hidden[:, units.core])
    return Branch(leaves, dense.hidden(us)[0])


def fit_outputs(
    config: SparseFFNConfig, target: Activations, spectral: Branch | None, core: Branch | None
) -> Outputs:
    """Regresses the dense FFN's outputs jointly on the hidden units of both branches.

    Args:
      config: configuration of the layer.
      target: outputs (n, d_model) of the dense FFN.
      spectral: the spectral branch; ``None`` if there is no such branch.
      core: the core; ``None`` if there is no core.
    """
    empty = np.zeros((len(target), 0), np.float32)
    parts = [empty if part is None else part.features for part in (spectral, core)]
    features = np.concatenate(parts, axis=1)
    moments = Moments.of(features, target, centred=config.bias)
    ours = slice(0, parts[0].shape[1])
    cores = slice(ours.stop, None)
    weight = np.zeros((features.shape[1], config.d_model))
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
    output = features @ as_float32(weight) + as_float32(bias)
    return Outputs(factors, None if core is None else weight[cores], bias, output)


def fit_corrections(
    masks: tuple[BlockMask, ...], output: Activations, target: Activations
) -> list[Float[np.ndarray, "d d"]]:
    """Regresses the remaining error on the layer's output, one correction after the other.

    Args:
      masks: mask of each correction, over (d_model, d_model).
      output: outputs (n, d_model) of the layer without corrections.
      target: outputs (n, d_model) of the dense FFN.

    Returns:
      The dense matrix (d_model, d_model) of each correction, which is zero where it is masked.
    """
    weights = []
    for mask in masks:
        # Not centred: a correction sees the output with its mean and adds no bias.
        error = target - output
        n, zeros = len(error), np.zeros(mask.shape[0])
        moments = Moments(
            (output.T @ output / n).astype(np.float64),
            (output.T @ error / n).astype(np.float64),
            zeros,
            zeros,
        )
        weights.append(closed_form.masked_regression(moments, mask))
        output = output + output @ as_float32(weights[-1])
    return weights


def stored(weight: Any, mask: BlockMask | None) -> Any:
    """Returns a dense weight in the form in which a layer stores it."""
    return weight if mask is None else mask.compress(weight)


def as_float32(x: Any) -> np.ndarray:
    """Returns a NumPy array in float32."""
    return np.asarray(x, np.float32)


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

    def spectral_error() -> Float[np.ndarray, " m"]:
        error = np.zeros(dense.width)
        for linear, sensitivity in zip(dense.up_maps, scores.sensitivities, strict=True):
            moments = _moments_of(calibration.moments, linear.weight)
            _, weight = _fit_up(branch, linear.weight, moments, sensitivity)
            lost = linear.weight - weight
            variance = np.einsum("dm,de,em->m", lost, moments.xx, lost, optimize=True)
            error += variance * sensitivity**2
        return error

    return choose_units(
        scores,
        0 if core is None else core.width,
        0 if branch is None else branch.width,
        None if core is None or branch is None else spectral_error,
    )


def _moments_of(inputs: Moments, weight: Float[np.ndarray, "i o"]) -> Moments:
    """Returns the moments of regressing a linear map of the inputs on the inputs."""
    return Moments(inputs.xx, inputs.xx @ weight, inputs.x_mean, inputs.x_mean @ weight)


def _with_mean_kept(
    linear: Linear, weight: Float[np.ndarray, "i o"], calibration: Calibration, has_bias: bool
) -> Linear:
    """Returns the map with another weight, and with a bias that keeps the outputs' means."""
    if not has_bias:
        return Linear(weight, np.zeros(weight.shape[1]))
    lost = calibration.moments.x_mean @ (linear.weight - weight)
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
