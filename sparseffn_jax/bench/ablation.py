"""A plain start for a layer, against which the demo shows what the closed forms are worth."""

from typing import Any

import jax
import numpy as np

from sparseffn_jax.config import CoreConfig, MicroRefinementConfig, SparseFFNConfig
from sparseffn_jax.sparsify.dense import DenseFFN
from sparseffn_jax.sparsify.fit import as_float32, fit_core
from sparseffn_jax.sparsify.selection import choose_units, score_units
from sparseffn_jax.sparsify.streams import LayerActivations


def select_layer(
    dense: DenseFFN, config: SparseFFNConfig, activations: LayerActivations
) -> tuple[SparseFFNConfig, dict[str, Any]]:
    """Starts a layer plainly, to show what the closed forms are worth: no weight is refitted.

    The most important units, each judged by itself, stay as they are, and the bypass gives nothing.

    Args:
      dense: the FFN to stand in for.
      config: configuration of a layer of an unmasked core, alone or beside a low-rank bypass.
      activations: inputs of the FFN on calibration text.

    Returns:
      The configuration as it was given, and float32 parameters.

    Raises:
      ValueError: if the layer has other parts.
    """
    bypass, core = config.spectral, config.micro and config.micro.core
    whole_units = core is not None and config.micro == MicroRefinementConfig(CoreConfig(core.width))
    thin = bypass is None or (bypass.is_bypass and bypass.transform == "low_rank")
    if core is None or not (whole_units and thin):
        raise ValueError(
            "plain selection is for an unmasked core, alone or beside a low-rank bypass"
        )
    scores = score_units(dense, activations, centred=config.bias)
    units = choose_units(scores, core.width, 0).core
    kept = fit_core(dense, config, core, None, units)
    leaves: dict[str, Any] = {"core": kept.leaves | {"down": {"kernel": dense.down.weight[units]}}}
    if bypass is not None:
        zeros = np.zeros((config.d_model, bypass.rank))
        leaves["spectral"] = {"bypass": {"axes": zeros, "filter": zeros.T}}
    if config.bias:
        leaves["bias"] = dense.down.bias
    return config, jax.tree.map(as_float32, leaves)
