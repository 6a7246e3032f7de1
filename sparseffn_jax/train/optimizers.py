"""The transforms that make updates out of gradients, by name, with the defaults that suit each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import optax

from sparseffn_jax.models.paths import is_decayed, is_hidden_matrix

OptimizerName = Literal["adamw", "lion", "muon"]


class Defaults(NamedTuple):
    """What suits an optimizer where nothing else is asked for.

    Attributes:
      learning_rate: the peak learning rate.
      weight_decay: the decoupled weight decay, which is multiplied by the rate.
    """

    learning_rate: float
    weight_decay: float


# Every entry of Lion's update is as large as the rate: it takes a smaller rate than AdamW, and as
# much more decay (Chen et al. 2023, 2302.06675, section 5). Muon's updates are scaled to the size
# of AdamW's, so that one rate and one decay suit both (Liu et al. 2025, 2502.16982, section 2.2).
DEFAULTS: Mapping[OptimizerName, Defaults] = MappingProxyType(
    {
        "adamw": Defaults(5e-4, 0.1),
        "lion": Defaults(5e-5, 1.0),
        "muon": Defaults(5e-4, 0.1),
    }
)
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
