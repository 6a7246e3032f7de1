"""Low-rank adapters (LoRA; Hu et al. 2021, 2106.09685), which lie in a parameter tree of their own.

A model itself does not change: the adapters are merged into a copy of its parameters before each
forward pass, so every model family and every wrapper around ``apply`` works as it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray

from sparseffn_jax.nn.paths import ShardingRule

Params = dict[str, Any]
Path = tuple[str, ...]

# How the adapters are dealt out on a mesh: the rank, which is small, stays whole.
LORA_SHARDING: tuple[ShardingRule, ...] = (
    (r"kernel/a", ("fsdp", None)),
    (r"kernel/b", (None, "tensor")),
)


def init_lora(
    key: PRNGKeyArray, params: Params, rank: int, is_target: Callable[[Path], bool]
) -> Params:
    """Returns adapters ``a`` (m, rank) and ``b`` (rank, n) for every target kernel (m, n).

    ``b`` is zero, so that merging them changes nothing at first; ``a`` is Gaussian.

    Args:
      key: the random key that ``a`` is drawn with.
      params: a model's parameters, or their shapes.
      rank: the rank of the update, at most the smaller side of every target.
      is_target: says whether a leaf gets an adapter, given its path, such as ``("transformer", "h",
        "0", "attn", "c_attn", "kernel")``;
        :func:`sparseffn_jax.models.paths.is_attention_kernel` takes Hu et al.'s targets.

    Returns:
      A float32 tree in which each target's path holds ``{"a": ..., "b": ...}``.

    Raises:
      ValueError: if there is no target, or one is not a matrix of at least that rank.
    """
    flat: dict[Path, Any] = flatten_dict(params)
    targets = {path: leaf for path, leaf in flat.items() if is_target(path)}
    if not targets:
        raise ValueError("no parameter is a LoRA target: check is_target against the tree's paths")
    adapters = {}
    for path, kernel in targets.items():
        if len(kernel.shape) != 2 or not 1 <= rank <= min(kernel.shape):
            raise ValueError(
                f"LoRA rank={rank} does not fit {'/'.join(path)} of shape {kernel.shape}: it needs "
                "a matrix, and a rank between 1 and its smaller side"
            )
        key, subkey = jax.random.split(key)
        m, n = kernel.shape
        adapters[(*path, "a")] = jax.random.normal(subkey, (m, rank)) * m**-0.5
        adapters[(*path, "b")] = jnp.zeros((rank, n))
    return unflatten_dict(adapters)


def merge_lora(params: Params, adapters: Params, alpha: float) -> Params:
    """Returns ``params`` with ``W + alpha / rank * a b`` in place of every adapted kernel W.

    Args:
      params: the parameters that :func:`init_lora` saw; they are not changed.
      adapters: the adapters that :func:`init_lora` returned, or what training made of them.
      alpha: the scale of the update, which is divided by the rank so that one learning rate suits
        all ranks.
    """
    merged: dict[Path, Any] = flatten_dict(params)
    factors: dict[Path, Any] = flatten_dict(adapters)
    for path in {path[:-1] for path in factors}:
        a, b = factors[(*path, "a")], factors[(*path, "b")]
        update = (alpha / a.shape[1]) * (a @ b)
        merged[path] = merged[path] + update.astype(merged[path].dtype)
    return unflatten_dict(merged)
