"""What checkpoints call their tensors, and where those stand in our parameter trees.

Our trees are those of transformers' Flax models, so a table for a model family lists only what
PyTorch calls or lays out differently. A name without a rule is the same on both sides: biases,
the leaves of a sparse FFN, and every name in a checkpoint that Flax itself has written.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from types import MappingProxyType

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor, or one for each layer, where ``*`` stands for the layer's number.

    Attributes:
      path: its place in the parameter tree, joined by dots.
      name: its PyTorch name.
      transposed: whether PyTorch stores the transpose.
    """

    path: str
    name: str
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class NameMap:
    """The names of one model family, both ways.

    Attributes:
      rules: the tensors whose name or layout differs.
      prefix: what checkpoints of the model without its head leave out.
      head: what the head's names begin with.
      buffers: tensors of old checkpoints that are no parameters; ``*`` as in :class:`Rule`.
      tied: paths that a model with tied embeddings does not have, although its checkpoint may.
    """

    rules: tuple[Rule, ...]
    prefix: str
    head: str
    buffers: frozenset[str]
    tied: frozenset[str]

    def to_path(self, name: str) -> tuple[str, bool]:
        """Returns a checkpoint's name as a path, and whether its tensor must be transposed."""
        if not name.startswith((self.prefix, self.head)):
            name = self.prefix + name
        pattern, numbers = _generalise(name)
        rule = self._by_name.get(pattern)
        return (_fill(rule.path, numbers), rule.transposed) if rule else (name, False)

    def to_name(self, path: str) -> tuple[str, bool]:
        """Returns a path as PyTorch's name, and whether its tensor must be transposed."""
        pattern, numbers = _generalise(path)
        rule = self._by_path.get(pattern)
        return (_fill(rule.name, numbers), rule.transposed) if rule else (path, False)

    def is_optional(self, path: str) -> bool:
        """Whether a checkpoint may hold ``path`` although the model has no such parameter."""
        return path in self.tied or _generalise(path)[0] in self.buffers

    @functools.cached_property
    def _by_name(self) -> dict[str, Rule]:
        return {rule.name: rule for rule in self.rules}

    @functools.cached_property
    def _by_path(self) -> dict[str, Rule]:
        return {rule.path: rule for rule in self.rules}


def _generalise(dotted: str) -> tuple[str, list[str]]:
    return _NUMBER.sub("*", dotted), _NUMBER.findall(dotted)


def _fill(pattern: str, numbers: list[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def _linear(scope: str, names: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(f"{scope}.{name}.kernel", f"{scope}.{name}.weight", True) for name in names)


GPT2 = NameMap(
    # GPT-2's Conv1D keeps its weight as (in, out); FlaxConv1D, unlike other Flax layers, its
    # kernel as (out, in).
    rules=(
        Rule("transformer.wte.embedding", "transformer.wte.weight"),
        Rule("transformer.wpe.embedding", "transformer.wpe.weight"),
        Rule("transformer.h.*.ln_1.scale", "transformer.h.*.ln_1.weight"),
        Rule("transformer.h.*.attn.c_attn.kernel", "transformer.h.*.attn.c_attn.weight", True),
        Rule("transformer.h.*.attn.c_proj.kernel", "transformer.h.*.attn.c_proj.weight", True),
        Rule("transformer.h.*.ln_2.scale", "transformer.h.*.ln_2.weight"),
        Rule("transformer.h.*.mlp.c_fc.kernel", "transformer.h.*.mlp.c_fc.weight", True),
        Rule("transformer.h.*.mlp.c_proj.kernel", "transformer.h.*.mlp.c_proj.weight", True),
        Rule("transformer.ln_f.scale", "transformer.ln_f.weight"),
        Rule("lm_head.kernel", "lm_head.weight", True),
    ),
    prefix="transformer.",
    head="lm_head.",
    buffers=frozenset(("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias")),
    tied=frozenset(("lm_head.kernel",)),
)

# PyTorch's Linear keeps its weight as (out, in), the transpose of a Flax Dense's kernel.
GPTJ = NameMap(
    rules=(
        Rule("transformer.wte.embedding", "transformer.wte.weight"),
        Rule("transformer.h.*.ln_1.scale", "transformer.h.*.ln_1.weight"),
        *_linear("transformer.h.*.attn", ("q_proj", "k_proj", "v_proj", "out_proj")),
        *_linear("transformer.h.*.mlp", ("fc_in", "fc_out")),
        Rule("transformer.ln_f.scale", "transformer.ln_f.weight"),
        Rule("lm_head.kernel", "lm_head.weight", True),
    ),
    prefix="transformer.",
    head="lm_head.",
    buffers=frozenset(
        f"transformer.h.*.attn.{name}" for name in ("bias", "masked_bias", "embed_positions")
    ),
    tied=frozenset(),
)

LLAMA = NameMap(
    rules=(
        Rule("model.embed_tokens.embedding", "model.embed_tokens.weight"),
        *_linear("model.layers.*.self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        *_linear("model.layers.*.mlp", ("gate_proj", "up_proj", "down_proj")),
        Rule("lm_head.kernel", "lm_head.weight", True),
    ),
    prefix="model.",
    head="lm_head.",
    buffers=frozenset(("model.layers.*.self_attn.rotary_emb.inv_freq",)),
    tied=frozenset(("lm_head.kernel",)),
)

NAME_MAPS: Mapping[str, NameMap] = MappingProxyType(
    {"gpt2": GPT2, "gptj": GPTJ, "llama": LLAMA, "mistral": LLAMA}
)
