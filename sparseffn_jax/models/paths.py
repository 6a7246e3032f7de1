"""What a parameter is, told by its path: the one place that knows what the names in a path mean.

A path is a tuple of names such as ``("transformer", "h", "0", "mlp", "c_fc", "kernel")``. It may
begin with more names than the model's own, as it does in a tree of LoRA adapters or in the state of
an optimizer. A feed-forward layer has one name in all model families. What a family calls its
attention and its norms is said by its class, and a name counts if any registered family has it.
"""

import itertools
from collections.abc import Iterable, Sequence

from sparseffn_jax.models.decoder import FFN_NAME
from sparseffn_jax.models.families import FAMILIES
from sparseffn_jax.models.names import generalise
from sparseffn_jax.nn.lora import LORA_SHARDING
from sparseffn_jax.nn.paths import POLYNOMIAL, SPARSE_FFN_PARTS, SPARSE_FFN_SHARDING, ShardingRule

Path = tuple[str, ...]


def is_ffn(path: Path) -> bool:
    """Says whether a path leads into a feed-forward layer."""
    return FFN_NAME in path


def ffn_of(path: Path) -> Path:
    """Returns the path of the feed-forward layer that a path leads into."""
    return path[: path.index(FFN_NAME) + 1]


def in_sparse_ffns(paths: Iterable[Path]) -> set[Path]:
    """Returns those of a tree's paths that lead into a SparseFFN."""
    in_ffns = [(path, path.index(FFN_NAME) + 1) for path in paths if is_ffn(path)]
    sparse = {path[:end] for path, end in in_ffns if path[end] in SPARSE_FFN_PARTS}
    return {path for path, end in in_ffns if path[:end] in sparse}


def is_attention_kernel(path: Path) -> bool:
    """Says whether a path is an attention projection's kernel, which Hu et al. 2021 adapt."""
    return path[-1] == "kernel" and _has_any(path, _attention_names())


def lora_targets(paths: Iterable[Path], names: Sequence[str]) -> dict[str, set[Path]]:
    """Returns the kernels that get LoRA adapters, by the name that asks for them.

    There are the projections of attention and the linear maps of dense feed-forward layers.

    Args:
      paths: the paths of a model's parameters.
      names: names of modules as peft takes them, ``"q_proj"`` or, where two maps share a name,
        ``"attn.c_proj"``; ``"attention"``, all projections of attention; or ``"all-linear"``.

    Raises:
      ValueError: if a name matches nothing; the message lists what there is.
    """
    paths = list(paths)
    in_sparse = in_sparse_ffns(paths)
    attention = {path for path in paths if is_attention_kernel(path)}
    dense = {path for path in paths if is_ffn(path) and path[-1] == "kernel"} - in_sparse
    groups = {"attention": attention, "all-linear": attention | dense}
    linear = groups["all-linear"]
    found = {
        name: groups.get(name, {path for path in linear if is_module(".".join(path[:-1]), name)})
        for name in names
    }
    if missing := [name for name in names if not found[name]]:
        there = sorted({".".join(path[-3:-1]) for path in linear})
        sparse = "; SparseFFNs have none" if in_sparse else ""
        raise ValueError(
            f"no linear map is called {', '.join(map(repr, missing))}: adapters can be on "
            f"{', '.join(there)} (or the last part of these names), on attention or on "
            f"all-linear{sparse}"
        )
    return found


def is_module(module: str, name: str) -> bool:
    """Says whether a module, by its whole name, is one of those that peft takes a name for."""
    return f".{module}".endswith(f".{name}")


def is_out_in(path: Path) -> bool:
    """Says whether a kernel is stored as (outputs, inputs), as GPT-2's are."""
    return generalise(".".join(path))[0] in _out_in_kernels()


def is_attention_or_norm(path: Path) -> bool:
    """Says whether a path leads into an attention layer or a norm."""
    norms = {name for family in FAMILIES.values() for name in family.norms}
    return _has_any(path, _attention_names() | norms)


def is_decayed(path: Path, ndim: int) -> bool:
    """Says whether weight decay is for a parameter of ``ndim`` dimensions.

    It is for all matrices but embeddings and the polynomials' coefficients.
    """
    return ndim >= 2 and path[-1] not in ("embedding", POLYNOMIAL)


def is_hidden_matrix(path: Path, ndim: int) -> bool:
    """Says whether a parameter is a matrix of a block, of its weights themselves.

    Embeddings, heads, LoRA adapters and stacks of matrices are none.
    """
    in_block = any(name.isdigit() for name in path)
    return ndim == 2 and in_block and "lora" not in path and is_decayed(path, ndim)


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


def _out_in_kernels() -> set[str]:
    return {
        rule.path
        for family in FAMILIES.values()
        if family.ffn_layout.transposed
        for rule in family.names.rules
        if rule.path.startswith(".".join(family.layer_path))
    }


def _attention_names() -> set[str]:
    return {family.attention for family in FAMILIES.values()}


def _has_any(path: Path, names: set[str]) -> bool:
    return not names.isdisjoint(path)
