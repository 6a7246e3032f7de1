"""Translates between what checkpoints call their tensors and paths in our parameter trees.

Our trees are those of transformers' Flax models, so that a family's table lists only what PyTorch
calls or lays out differently. A name without a rule is the same on both sides: those are biases,
the leaves of a sparse FFN, and all names in a checkpoint that Flax itself has written.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

# What the names of every family's language-model head begin with.
_HEAD = "lm_head."
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one tensor is called, or one in each layer, whose number ``*`` stands for.

    Attributes:
      path: the tensor's place in the parameter tree, joined by dots.
      name: the tensor's name in PyTorch.
      transposed: whether PyTorch stores the transpose.
    """

    path: str
    name: str
    transposed: bool = False


def linear_rules(scope: str, names: tuple[str, ...]) -> tuple[Rule, ...]:
    """Returns the rules of linear maps, by the path that they lie under and their names.

    PyTorch's Linear keeps its weight as (out, in), the transpose of a Flax Dense's kernel.
    """
    return tuple(Rule(f"{scope}.{name}.kernel", f"{scope}.{name}.weight", True) for name in names)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Weights of linear maps that checkpoints hold as one, and the parameter tree apart.

    Attributes:
      name: PyTorch's name of the one, with ``*`` as in :class:`Rule`.
      parts: what PyTorch's names of the weights would be if they lay apart, in their order.
      rows: a function of a model's config that returns how many rows (outputs) each part has.
    """

    name: str
    parts: tuple[str, ...]
    rows: Callable[[Any], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Translates the names of one model family, both ways.

    Attributes:
      rules: the tensors whose name or layout differs.
      prefix: what all names begin with but the head's, and what checkpoints of the model without
        its head leave out.
      buffers: the tensors in old checkpoints that are not parameters, with ``*`` as in
        :class:`Rule`.
      tied: the paths that a model with tied embeddings does not have, although its checkpoint may.
      fusions: the weights that checkpoints hold as one; rules are of their parts.
    """

    rules: tuple[Rule, ...]
    prefix: str
    buffers: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    fusions: tuple[Fusion, ...] = ()

    def to_path(self, name: str) -> tuple[str, bool]:
        """Returns a checkpoint's name as a path, and whether its tensor must be transposed."""
        if not name.startswith((self.prefix, _HEAD)):
            name = self.prefix + name
        pattern, numbers = generalise(name)
        rule = self._by_name.get(pattern)
        return (fill(rule.path, numbers), rule.transposed) if rule else (name, False)

    def to_name(self, path: str) -> tuple[str, bool]:
        """Returns a path as PyTorch's name, and whether its tensor must be transposed."""
        pattern, numbers = generalise(path)
        rule = self._by_path.get(pattern)
        return (fill(rule.name, numbers), rule.transposed) if rule else (path, False)

    def is_optional(self, path: str) -> bool:
        """Says whether a checkpoint may hold ``path`` although the model has no such parameter."""
        return path in self.tied or generalise(path)[0] in self.buffers

    @functools.cached_property
    def _by_name(self) -> dict[str, Rule]:
        return {rule.name: rule for rule in self.rules}

    @functools.cached_property
    def _by_path(self) -> dict[str, Rule]:
        return {rule.path: rule for rule in self.rules}


def generalise(dotted: str) -> tuple[str, list[str]]:
    """Returns a name with ``*`` for the numbers between dots, and these numbers."""
    return _NUMBER.sub("*", dotted), _NUMBER.findall(dotted)


def fill(pattern: str, numbers: list[str]) -> str:
    """Returns a pattern with numbers, in order, in place of its ``*``."""
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern
