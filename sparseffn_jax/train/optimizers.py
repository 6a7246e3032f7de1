"""The transforms that make updates out of gradients, by name."""

from typing import Any

import jax
import optax

from sparseffn_jax.models.paths import is_decayed, is_hidden_matrix
from sparseffn_jax.train.choices import OptimizerName

_ADAMW_RMS = 0.2


def make_optimizer(
    name: OptimizerName, learning_rate: optax.ScalarOrSchedule, weight_decay: float
) -> optax.GradientTransformation:
    """Returns an optimizer.

    Args:
      name: ``"adamw"`` (Loshchilov & Hutter 2017, 1711.05101), ``"lion"`` (Chen et al. 2023,
        2302.06675) or ``"muon"`` (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon),
        which is for the matrices of blocks; AdamW has the rest there.
      learning_rate: the learning rate.
      weight_decay: the decoupled weight decay of matrices; embeddings, polynomial coefficients and
        vectors have none.
    """
    if name == "adamw":
        # b2 as in GPT-3: second moments that forget sooner ride out a spike better.
        return optax.adamw(learning_rate, b2=0.95, weight_decay=weight_decay, mask=_decayed)
    if name == "lion":
        # The authors' values for language models.
        return optax.lion(learning_rate, b1=0.95, b2=0.98, weight_decay=weight_decay, mask=_decayed)
    # Not muon's own AdamW: that decays either everything or nothing.
    return optax.multi_transform(
        {
            "muon": optax.contrib.muon(
                learning_rate, weight_decay=weight_decay, consistent_rms=_ADAMW_RMS
            ),
            "adamw": make_optimizer("adamw", learning_rate, weight_decay),
        },
        lambda params: _map_with_names(
            lambda names, leaf: "muon" if is_hidden_matrix(names, leaf.ndim) else "adamw", params
        ),
    )


def _decayed(params: Any) -> Any:
    return _map_with_names(lambda names, leaf: is_decayed(names, leaf.ndim), params)


def _map_with_names(function: Any, params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(tuple(entry.key for entry in path), leaf), params
    )
