"""Ways to thin an FFN as others have published them, where they do not follow from our own fit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.evaluate.losses import make_evaluator
from sparseffn_jax.models.decoder import (
    FFN_NAME,
    Decoder,
    Dtype,
    layers_of,
    replace_ffns,
)
from sparseffn_jax.sparsify.closed_form import Moments
from sparseffn_jax.sparsify.dense import DenseFFN
from sparseffn_jax.sparsify.fit import as_float32, fit_core, fit_outputs
from sparseffn_jax.sparsify.selection import score_units
from sparseffn_jax.sparsify.streams import LayerActivations


def magnitude(dense: DenseFFN, activations: LayerActivations) -> Float[np.ndarray, " m"]:
    """Scores each hidden unit of a dense FFN by its mean absolute value over all tokens.

    After Minitron (Muralidharan et al. 2024, 2407.14679).

    Args:
      dense: the dense FFN.
      activations: inputs of the FFN on calibration text.
    """
    return _unit_means(dense, activations, jnp.abs)


def fluctuation(dense: DenseFFN, activations: LayerActivations) -> Float[np.ndarray, " m"]:
    """Scores each hidden unit of a dense FFN by its variance and the norm of its output weights.

    As in FLAP (An et al. 2023, 2312.11983), whose bias then takes over the mean of what leaves.

    Args:
      dense: the dense FFN.
      activations: inputs of the FFN on calibration text.
    """
    return score_units(dense, activations, centred=True).importance


@dataclasses.dataclass(frozen=True)
class KeepUnits:
    """A fit that keeps the hidden units of the highest score, in a layer that is a core alone.

    Attributes:
      score: returns the score of each unit.
      refit: whether the output weights of the units that stay are fitted to the targets; otherwise
        they are those of the dense FFN.
      keep_means: whether the bias takes over the mean of the units that leave, which the layer's
        config must allow.
    """

    score: Callable[[DenseFFN, LayerActivations], Float[np.ndarray, " m"]]
    refit: bool = False
    keep_means: bool = False

    def __call__(
        self, dense: DenseFFN, config: SparseFFNConfig, activations: LayerActivations
    ) -> tuple[SparseFFNConfig, dict[str, Any]]:
        """Fits one layer, as :func:`sparseffn_jax.sparsify.fit.fit_layer` does."""
        assert config.micro is not None
        core = config.micro.core
        assert core is not None
        ranking = np.argsort(-self.score(dense, activations), kind="stable")
        units, lost = np.sort(ranking[: core.width]), ranking[core.width :]
        kept = fit_core(dense, config, core, None, units)
        if self.refit:
            features = ((kept.features(x), target) for x, target in activations.chunks())
            outputs = fit_outputs(config, Moments.of(features, centred=config.bias), None, kept)
            weight, bias = outputs.core, outputs.bias
        else:
            weight, bias = dense.down.weight[units], dense.down.bias
            if self.keep_means:
                mean = _unit_means(dense, activations, lambda hidden: hidden)
                bias = bias + mean[lost] @ dense.down.weight[lost]
        leaves: dict[str, Any] = {"core": kept.leaves | {"down": {"kernel": weight}}}
        leaves |= {"bias": bias} if config.bias else {}
        return config, jax.tree.map(as_float32, leaves)


class NoFFN(nn.Module):
    """What is left of an FFN that has been dropped: the residual stream gets nothing.

    Attributes:
      dtype: dtype of the zeros.
      param_dtype: not used; there are no parameters.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return jnp.zeros_like(x, self.dtype)


def rank_layers(
    model: Decoder, params: Any, windows: Int[np.ndarray, "n w"], *, batch_size: int
) -> list[int]:
    """Returns the numbers of the layers, those first whose FFN's loss costs least.

    The cost is the rise of the cross-entropy on the text when that one FFN returns nothing, as
    whole blocks are ranked in Shortened LLaMA (Kim et al. 2024, 2402.02834).

    Args:
      model: a dense model.
      params: its parameters.
      windows: token ids (n, w); the last of each window is a target only.
      batch_size: number of windows in one forward pass.
    """
    evaluate, down = make_evaluator(model), model.ffn_layout.down
    losses = []
    for i, layer in enumerate(layers_of(model, params)):
        # One program serves all layers: an FFN without output weights returns nothing.
        ffn = layer[FFN_NAME]
        silent = ffn | {down: jax.tree.map(np.zeros_like, ffn[down])}
        losses.append(evaluate(replace_ffns(model, params, {i: silent}), windows, batch_size))
    return list(np.argsort(losses, kind="stable"))


def _unit_means(
    dense: DenseFFN, activations: LayerActivations, function: Callable[[Array], Array]
) -> Float[np.ndarray, " m"]:
    """Returns the mean of a function of each hidden unit over the calibration text."""
    total = np.zeros(dense.width)
    for x, _ in activations.chunks():
        hidden = dense.hidden([up(x) for up in dense.up_maps])
        total += np.asarray(jnp.sum(function(hidden), 0), np.float64)
    return total / len(activations.x)
