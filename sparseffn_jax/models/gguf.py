"""What a model family's tensors and settings are called in GGUF files.

The format is specified at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and its files
are written by llama.cpp's converters, which rename a PyTorch checkpoint's tensors and change the
layout of some. A family's :class:`GGUFLayout` says how to turn that back, and how to do the same.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from sparseffn_jax.models.names import fill, generalise

_MISSING = object()
# How many hidden units the FFN has.
WIDTH = "feed_forward_length"


@dataclasses.dataclass(frozen=True)
class GGUFModule:
    """A module whose weight and, if it has one, bias lie in a GGUF file.

    Attributes:
      name: what the file calls the module, with ``*`` for the number of a layer.
      target: what PyTorch calls it, likewise.
      transposed: whether the file stores the transpose of PyTorch's weight.
      heads: the config's key for the number of heads, for a projection whose rows the file holds
        in the order of the original LLaMA: the two rows of each rotary pair of a head are
        neighbours there, and half a head apart in PyTorch. ``None`` if both have one order.
      offset: what the file's weight has more than PyTorch's.
    """

    name: str
    target: str
    transposed: bool = False
    heads: str | None = None
    offset: float = 0.0


class GGUFSettings:
    """Gives a GGUF file's settings, each checked when it is asked for.

    Args:
      architecture: what the keys of the model's own settings begin with.
      values: the file's settings by their whole keys.
      shapes: the shapes of the file's tensors, by name.
      read: reads a tensor, by name.
    """

    def __init__(
        self,
        architecture: str,
        values: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
    ):
        self.architecture, self.values, self.shapes = architecture, values, shapes
        self.read = read

    def has(self, key: str) -> bool:
        """Returns whether the file has this setting of the model's own."""
        return f"{self.architecture}.{key}" in self.values

    def integer(self, key: str, default: Any = _MISSING) -> Any:
        """Returns a positive integer among the model's own settings, or ``default`` without one.

        Raises:
          ValueError: if it is something else, or is not there and there is no default; and if the
            file has one for each layer, and they differ.
        """
        if isinstance(self.values.get(f"{self.architecture}.{key}"), np.ndarray):
            first, *others = self.integers(key)
            if any(other != first for other in others):
                raise self._wrong(key, [first, *others], "the same number for every layer")
            return first
        return self._get(key, int, "a positive integer", default)

    def integers(self, key: str) -> list[int]:
        """Returns the positive integers that the file has under one key, one for each layer.

        Raises:
          ValueError: if it is something else.
        """
        found = self.values.get(f"{self.architecture}.{key}")
        count = self.integer("block_count")
        if (
            not isinstance(found, np.ndarray)
            or found.dtype.kind not in "iu"
            or len(found) != count
            or not np.all(found > 0)
        ):
            raise self._wrong(key, found, f"{count} positive integers, one for each layer")
        return found.tolist()

    def widths(self) -> int | list[int]:
        """Returns the number of hidden units of every FFN, or a list of that of each layer.

        Raises:
          ValueError: if it is neither.
        """
        value = self.values.get(f"{self.architecture}.{WIDTH}")
        return self.integers(WIDTH) if isinstance(value, np.ndarray) else self.integer(WIDTH)

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """Returns a positive finite number among the model's own settings, or ``default``.

        The file holds it in float32. Returned is the shortest decimal that rounds to the same
        float32, so that 1e-5 stays 1e-5.

        Raises:
          ValueError: if it is something else, or is not there and there is no default.
        """
        value = self._get(key, int | float, "a positive finite number", default)
        return value if value is default else float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        """Returns a string among the model's own settings, or ``default`` without one.

        Raises:
          ValueError: if it is something else.
        """
        value = self.values.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def _get(self, key: str, kind: Any, expected: str, default: Any) -> Any:
        value = self.values.get(f"{self.architecture}.{key}", default)
        if value is _MISSING:
            raise ValueError(
                f"{self.architecture}.{key} is missing: expected {expected}; the file is "
                "incomplete, convert the model again"
            )
        if value is default:
            return default
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        # Beyond float32 it cannot be what a file stores, and no size is that large.
        if not is_number or not math.isfinite(value) or not 0 < value < 2**63:
            raise self._wrong(key, value, expected)
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> ValueError:
        return ValueError(
            f"{self.architecture}.{key} is {str(value)[:80]!r}: expected {expected}; the file is "
            "damaged, or of a model that this library does not know"
        )


class GGUFExtras(NamedTuple):
    """What a file holds of a config beyond what is named in its family's layout.

    Attributes:
      settings: the settings, by the key after ``architecture.``.
      tensors: the tensors, by name.
    """

    settings: Mapping[str, Any] = MappingProxyType({})
    tensors: Mapping[str, np.ndarray] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class GGUFLayout:
    """How GGUF files hold the models of one family.

    Attributes:
      architecture: the files' ``general.architecture``.
      modules: all modules that have tensors.
      sizes: the settings that are positive integers and must be there, as pairs of the key after
        ``architecture.`` and the config's key.
      numbers: the settings that are positive numbers and must be there, likewise.
      derive: returns the config values that the settings above do not name, given all of the
        file's settings; it raises ``ValueError`` if the family's model cannot honour them.
      derived: the tensors that are not parameters: those that ``derive`` may read, and buffers.
      describe: turns ``derive`` back: returns, given a config, the settings and tensors that it
        reads; it raises ``ValueError`` if llama.cpp cannot honour the config. ``None`` if such
        files are only read.
      per_layer: the architecture of the same models with FFNs that differ in width, if there is
        one: each layer has a value of its own where this one has one for all.
      ffn_bias: whether the FFN may have biases that the family's own have not.
    """

    architecture: str
    modules: tuple[GGUFModule, ...]
    sizes: Mapping[str, str]
    numbers: Mapping[str, str]
    derive: Callable[[GGUFSettings], Mapping[str, Any]]
    derived: frozenset[str] = frozenset()
    describe: Callable[[Any], GGUFExtras] | None = None
    per_layer: str | None = None
    ffn_bias: bool = False

    @property
    def architectures(self) -> tuple[str, ...]:
        """Every ``general.architecture`` that the files may have."""
        return (self.architecture, *([] if self.per_layer is None else [self.per_layer]))

    def config_values(self, settings: GGUFSettings) -> dict[str, Any]:
        """Returns the values of the config that a file's settings make.

        Raises:
          ValueError: if a setting is missing or wrong, or the family's model cannot honour it.
        """
        values: dict[str, Any] = {
            name: settings.integer(key) for key, name in self.sizes.items() if key != WIDTH
        } | {name: settings.number(key) for key, name in self.numbers.items()}
        widths = settings.widths()
        # Layers with fewer units are sparse ones.
        values[self.sizes[WIDTH]] = max(widths) if isinstance(widths, list) else widths
        return values | dict(self.derive(settings))

    def find(self, name: str) -> tuple[str, GGUFModule] | None:
        """Returns PyTorch's name of a tensor and its module, or ``None`` if there is none."""
        stem, _, leaf = name.rpartition(".")
        pattern, numbers = generalise(f"{stem}.")
        module = self._by_name.get(pattern)
        if module is None or leaf not in ("weight", "bias"):
            return None
        return f"{fill(module.target, numbers)}.{leaf}", module

    def name_of(self, target: str) -> tuple[str, GGUFModule] | None:
        """Returns the name of a tensor, given PyTorch's, and its module; ``None`` if none is."""
        stem, _, leaf = target.rpartition(".")
        pattern, numbers = generalise(f"{stem}.")
        module = self._by_target.get(pattern)
        return None if module is None else (f"{fill(module.name, numbers)}.{leaf}", module)

    @functools.cached_property
    def _by_name(self) -> dict[str, GGUFModule]:
        return {f"{module.name}.": module for module in self.modules}

    @functools.cached_property
    def _by_target(self) -> dict[str, GGUFModule]:
        return {f"{module.target}.": module for module in self.modules}


def pair_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of a query or key projection into PyTorch's order.

    Args:
      rows: the weight ``(heads * K, D)`` or bias ``(heads * K,)`` as GGUF files have it: the two
        rows that a rotary position turns together are neighbours.
      heads: how many heads there are.

    Returns:
      The same rows, where the second of each pair lies K / 2 rows after the first.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def pair_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of a query or key projection into the order of GGUF files.

    It turns :func:`pair_halves` back, and takes the same arguments.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
