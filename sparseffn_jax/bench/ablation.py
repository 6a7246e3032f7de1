"""A plain start for a layer, against which the demo shows what the closed forms are worth."""

import dataclasses
from typing import Any

import jax
import numpy as np

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.sparsify import closed_form
from sparseffn_jax.sparsify.dense import DenseFFN, Linear
from sparseffn_jax.sparsify.selection import choose_units, score_units
from sparseffn_jax.sparsify.streams import LayerActivations


def select_layer(
    dense: DenseFFN, config: SparseFFNConfig, activations: LayerActivations
) -> tuple[SparseFFNConfig, dict[str, Any]]:
    """Starts a layer plainly, to show what the closed forms are worth: no weight is refitted.

    The most important units stay as they are, the others' weights are cut to their largest singular
    values, and the polynomial is fitted to the activation itself.

    Args:
      dense: the FFN to stand in for.
      config: configuration of a layer with an unmasked core, a low-rank branch and a polynomial.
      activations: inputs of the FFN on calibration text.

    Returns:
      The configuration with the polynomial's fitted radius, and float32 parameters.

    Raises:
      ValueError: if the layer lacks one of the three parts.
    """
    branch, core = config.spectral, config.micro and config.micro.core
    if branch is None or core is None or config.polynomial is None:
        raise ValueError("plain selection is for layers with all three parts")
    scores = score_units(dense, activations, centred=config.bias)
    units = choose_units(scores, core.width, branch.width)

    def biased(weights: dict[str, Any], linear: Linear) -> dict[str, Any]:
        return weights | ({"bias": linear.bias} if config.bias else {})

    leaves = biased({"core": {}, "spectral": {}}, dense.down)
    us, x = [], activations.sample(4096)[0]
    for name, full in zip(config.up_maps, dense.up_maps, strict=True):
        kept, thinned = full.outputs(units.core), full.outputs(units.spectral)
        leaves["core"][name] = biased({"kernel": kept.weight}, kept)
        axes, filter = closed_form.truncated_svd(thinned.weight, branch.rank)
        leaves["spectral"][name] = biased({"axes": axes, "filter": filter}, thinned)
        us.append(np.asarray(dataclasses.replace(thinned, weight=axes @ filter)(x)))
    weights = np.linalg.norm(dense.down.weight[units.spectral], axis=1) ** 2
    fitted, coefficients = closed_form.fit_polynomial(
        config.polynomial, us, np.asarray(dense.hidden(us)[0]), weights
    )
    leaves["spectral"]["polynomial"] = coefficients
    axes, filter = closed_form.truncated_svd(
        dense.down.weight[units.spectral], branch.down_rank or branch.rank
    )
    leaves["spectral"]["down"] = {"axes": axes, "filter": filter}
    leaves["core"]["down"] = {"kernel": dense.down.weight[units.core]}
    config = dataclasses.replace(config, polynomial=fitted)
    return config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), leaves)
