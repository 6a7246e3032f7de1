"""Low-rank adapters (LoRA; Hu et al. 2021, 2106.09685), which lie in a parameter tree of their own.

A model itself does not change: the adapters are merged into a copy of its parameters before each
forward pass, so every model family and every wrapper around ``apply`` works as it is.
"""

import dataclasses
from collections.abc import Callable, Mapping
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


@dataclasses.dataclass(frozen=True)
class LoraAdapter:
    """Adapters of one model, apart from it.

    Attributes:
      factors: a tree in which the path of each adapted kernel, (m, n), holds ``{"a": (m, rank),
        "b": (rank, n)}``.
      scales: what the product of the factors is multiplied with, by the kernel's path.
      replaced: leaves of the model's own tree that trained in full beside the adapters, such as
        those of its SparseFFNs, in a tree that holds nothing else.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> factors = {"q_proj": {"kernel": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 3))}}}
      >>> adapter = sf.LoraAdapter(factors, scales={("q_proj", "kernel"): 0.5})
      >>> adapter.merge({"q_proj": {"kernel": jnp.zeros((2, 3))}})["q_proj"]["kernel"].tolist()
      [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    factors: Params
    scales: Mapping[Path, float]
    replaced: Params = dataclasses.field(default_factory=dict)

    def merge(self, params: Params) -> Params:
        """Returns a model's parameters with the adapters merged in; ``params`` does not change."""
        replaced = unflatten_dict({**flatten_dict(params), **flatten_dict(self.replaced)})
        with jax.default_matmul_precision("highest"):
            return merge_lora(replaced, self.factors, self.scales)


def init_lora(
    key: PRNGKeyArray,
    params: Params,
    rank: int | Callable[[Path], int],
    is_target: Callable[[Path], bool],
    is_out_in: Callable[[Path], bool] = lambda path: False,
) -> Params:
    """Returns adapters ``a`` (m, rank) and ``b`` (rank, n) for every target kernel (m, n).

    The factor on the side of the outputs is zero, so that merging them changes nothing at first;
    the other one is Gaussian.

    Args:
      key: the random key that adapters are drawn with.
      params: a model's parameters, or their shapes.
      rank: the rank of the update, at most the smaller side of every target; or a function that
        gives it for a path.
      is_target: says whether a leaf gets an adapter, given its path, such as ``("transformer", "h",
        "0", "attn", "c_attn", "kernel")``;
        :func:`sparseffn_jax.models.paths.is_attention_kernel` takes Hu et al.'s targets.
      is_out_in: says whether a target is stored as (outputs, inputs), given its path.

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
        r = rank(path) if callable(rank) else rank
        if len(kernel.shape) != 2 or not 1 <= r <= min(kernel.shape):
            raise ValueError(
                f"LoRA rank={r} does not fit {'/'.join(path)} of shape {kernel.shape}: it needs "
                "a matrix, and a rank between 1 and its smaller side"
            )
        key, subkey = jax.random.split(key)
        m, n = kernel.shape
        if is_out_in(path):
            a, b = jnp.zeros((m, r)), jax.random.normal(subkey, (r, n)) * n**-0.5
        else:
            a, b = jax.random.normal(subkey, (m, r)) * m**-0.5, jnp.zeros((r, n))
        adapters |= {(*path, "a"): a, (*path, "b"): b}
    return unflatten_dict(adapters)


def merge_lora(params: Params, adapters: Params, scales: Mapping[Path, float]) -> Params:
    """Returns ``params`` with ``W + scale * a b`` in place of every adapted kernel W.

    Args:
      params: the parameters that :func:`init_lora` saw; they are not changed.
      adapters: the adapters that :func:`init_lora` returned, or what training made of them.
      scales: the scale of each update, by the path of its kernel.
    """
    merged: dict[Path, Any] = flatten_dict(params)
    factors: dict[Path, Any] = flatten_dict(adapters)
    for path in {path[:-1] for path in factors}:
        a, b = factors[(*path, "a")], factors[(*path, "b")]
        merged[path] = merged[path] + (scales[path] * (a @ b)).astype(merged[path].dtype)
    return unflatten_dict(merged)
