"""What trains, and at which rate: each recipe gives an optax transform and a tree of labels.

Every parameter has a label: ``"ffn"`` if it is part of a SparseFFN, which is new and has a rate of
its own, ``"rest"`` if it trains otherwise, and ``"frozen"`` if it does not train. The transform is
for the trainable part alone:

    optimizer, labels = ffn_only(params, 1e-3, 5e-4)
    trainable, frozen = partition(params, labels)
    state = optimizer.init(trainable)

Gradients are taken with respect to ``trainable``, so that what is frozen has neither a gradient
nor an optimizer slot.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from sparseffn_jax.models.decoder import FFN_NAME
from sparseffn_jax.models.paths import (
    ffn_of,
    in_sparse_ffns,
    is_attention_or_norm,
    is_ffn,
)
from sparseffn_jax.train.choices import OptimizerName
from sparseffn_jax.train.optimizers import make_optimizer

Params = dict[str, Any]
Labels = dict[str, Any]
Recipe = Callable[..., tuple[optax.GradientTransformation, Labels]]


def full(
    params: Params,
    learning_rate: optax.ScalarOrSchedule,
    ffn_learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    optimizer: OptimizerName = "adamw",
) -> tuple[optax.GradientTransformation, Labels]:
    """Trains every parameter.

    Args:
      params: the model's parameters, or their shapes.
      learning_rate: the learning rate of what is labelled ``"rest"``.
      ffn_learning_rate: the learning rate of what is labelled ``"ffn"``.
      weight_decay: the decoupled weight decay of matrices; embeddings, polynomial coefficients and
        vectors have none.
      clip_norm: the global norm that a larger gradient is scaled down to.
      optimizer: what makes the updates, see :mod:`.optimizers`.

    Returns:
      The optimizer after clipping, for the trainable part of ``params``; and the labels, a tree
      like ``params``.

    Raises:
      ValueError: if no parameter trains.
    """
    return _recipe(
        params,
        lambda _: True,
        learning_rate,
        ffn_learning_rate,
        weight_decay,
        clip_norm,
        optimizer,
    )


def ffn_only(
    params: Params,
    learning_rate: optax.ScalarOrSchedule,
    ffn_learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    optimizer: OptimizerName = "adamw",
) -> tuple[optax.GradientTransformation, Labels]:
    """Trains the feed-forward layers, sparse and dense.

    The arguments, what is returned and what is raised are those of :func:`full`.
    """
    return _recipe(
        params, is_ffn, learning_rate, ffn_learning_rate, weight_decay, clip_norm, optimizer
    )


def lora(
    params: Params,
    learning_rate: optax.ScalarOrSchedule,
    ffn_learning_rate: optax.ScalarOrSchedule,
    *,
    train_ffns: bool = True,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    optimizer: OptimizerName = "adamw",
) -> tuple[optax.GradientTransformation, Labels]:
    """Trains the LoRA adapters and, in full, the feed-forward layers without adapters.

    The arguments and what is returned are those of :func:`full`; ``params`` holds the adapters of
    :func:`sparseffn_jax.nn.lora.init_lora` under ``"lora"``, and ``train_ffns=False`` trains them
    alone.

    Raises:
      ValueError: if there are no adapters.
    """
    if "lora" not in params:
        raise ValueError("the lora recipe trains adapters: add them as params['lora']")
    adapted = {ffn_of(path) for path in flatten_dict(params["lora"]) if is_ffn(path)}

    def trains(path):
        if path[0] == "lora":
            return True
        return train_ffns and is_ffn(path) and ffn_of(path) not in adapted

    return _recipe(
        params, trains, learning_rate, ffn_learning_rate, weight_decay, clip_norm, optimizer
    )


def stepwise(
    params: Params,
    learning_rate: optax.ScalarOrSchedule,
    ffn_learning_rate: optax.ScalarOrSchedule,
    *,
    stage: Literal[1, 2],
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    optimizer: OptimizerName = "adamw",
) -> tuple[optax.GradientTransformation, Labels]:
    """Unfreezes in two stages: first the feed-forward layers, then attention and LayerNorm too.

    Gradual unfreezing is from Howard & Ruder 2018 (1801.06146). Embeddings never train. ``stage``
    says which stage it is; the other arguments, what is returned and what is raised are those of
    :func:`full`.
    """
    trains = is_ffn if stage == 1 else lambda path: is_ffn(path) or is_attention_or_norm(path)
    return _recipe(
        params, trains, learning_rate, ffn_learning_rate, weight_decay, clip_norm, optimizer
    )


# The stages of each recipe, one after the other.
RECIPES: Mapping[str, tuple[Recipe, ...]] = MappingProxyType(
    {
        "full": (full,),
        "ffn_only": (ffn_only,),
        "lora": (lora,),
        "stepwise": (partial(stepwise, stage=1), partial(stepwise, stage=2)),
    }
)


def partition(params: Params, labels: Labels) -> tuple[Params, Params]:
    """Splits a tree by its labels into (trainable, frozen); each lacks the other's leaves."""
    flat_labels = flatten_dict(labels)
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in flatten_dict(params).items():
        parts[flat_labels[path] == "frozen"][path] = leaf
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def split_ffn(params: Params) -> tuple[Params, Params]:
    """Splits a tree by its paths into (feed-forward layers, rest); :func:`combine` undoes it."""
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in flatten_dict(params).items():
        parts[not is_ffn(path)][path] = leaf
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def combine(trainable: Params, frozen: Params) -> Params:
    """Joins two trees without common leaves, as :func:`partition` and :func:`split_ffn` give."""
    return unflatten_dict({**flatten_dict(trainable), **flatten_dict(frozen)})


def _recipe(params, trains, learning_rate, ffn_learning_rate, weight_decay, clip_norm, optimizer):
    paths = flatten_dict(params).keys()
    if not any(map(trains, paths)):
        found = ", ".join(sorted({"/".join(path[:-1]) for path in paths})[:3])
        raise ValueError(
            "this recipe trains none of the model's parameters: it finds feed-forward layers by "
            f"the name {FFN_NAME}, and the model has {found}. Name its layers so, or take "
            "recipe='full'"
        )
    new = in_sparse_ffns(paths)
    labels = unflatten_dict(
        {path: "frozen" if not trains(path) else "ffn" if path in new else "rest" for path in paths}
    )
    trainable_labels, _ = partition(labels, labels)
    by_label: dict[Hashable, Any] = {
        "ffn": make_optimizer(optimizer, ffn_learning_rate, weight_decay),
        "rest": make_optimizer(optimizer, learning_rate, weight_decay),
    }
    clipped = optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.multi_transform(by_label, trainable_labels)
    )
    return clipped, labels
