"""What a parameter is, told by its path: the one place that knows what the names in a path mean.

A path is a tuple of names such as ``("transformer", "h", "0", "mlp", "c_fc", "kernel")``. It may
begin with more names than the model's own, as it does in a tree of LoRA adapters or in the state of
an optimizer. A feed-forward layer has one name in all model families. What a family calls its
attention and its norms is said by its class, and a name counts if any registered family has it.
"""

import itertools
from collections.abc import Iterable

from sparseffn_jax.models.decoder import FFN_NAME
from sparseffn_jax.models.families import FAMILIES
from sparseffn_jax.nn.lora import LORA_SHARDING
from sparseffn_jax.nn.paths import POLYNOMIAL, SPARSE_FFN_PARTS, SPARSE_FFN_SHARDING, ShardingRule

Path = tuple[str, ...]


def is_ffn(path: Path) -> bool:
    """Says whether a path leads into a feed-forward layer."""
    return FFN_NAME in path


def in_sparse_ffns(paths: Iterable[Path]) -> set[Path]:
    """Returns those of a tree's paths that lead into a SparseFFN."""
    in_ffns = [(path, path.index(FFN_NAME) + 1) for path in paths if is_ffn(path)]
    sparse = {path[:end] for path, end in in_ffns if path[end] in SPARSE_FFN_PARTS}
    return {path for path, end in in_ffns if path[:end] in sparse}


def is_attention_kernel(path: Path) -> bool:
    """Says whether a path is an attention projection's kernel, which Hu et al. 2021 adapt."""
    return path[-1] == "kernel" and _has_any(path, _attention_names())


def is_attention_or_norm(path: Path) -> bool:
    """Says whether a path leads into an attention layer or a norm."""
    norms = {name for family in FAMILIES.values() for name in family.norms}
    return _has_any(path, _attention_names() | norms)


def is_decayed(path: Path, ndim: int) -> bool:
    """Says whether weight decay is for a parameter of ``ndim`` dimensions.

    It is for all matrices but embeddings and the polynomials' coefficients.
    """
    return ndim >= 2 and path[-1] not in ("embedding", POLYNOMIAL)


def sharding_rules() -> tuple[ShardingRule, ...]:
    """Returns how all parameters are dealt out on a mesh; the first rule that fits a leaf counts.

    The rules of the families come in the order in which they were registered. If two families
    have leaves of one name, both are laid out as the first says: that is right for both, and at
    worst slower for the second.
    """
    by_family = (family.sharding for family in FAMILIES.values())
    # Families that share modules share rules.
    own = dict.fromkeys(itertools.chain.from_iterable(by_family))
    return (*own, *SPARSE_FFN_SHARDING, *LORA_SHARDING)


def _attention_names() -> set[str]:
    return {family.attention for family in FAMILIES.values()}


def _has_any(path: Path, names: set[str]) -> bool:
    return not names.isdisjoint(path)
