"""What a model family's tensors and settings are called in GGUF files.

The format is specified at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and its files
are written by llama.cpp's converters, which rename a PyTorch checkpoint's tensors and change the
layout of some. A family's :class:`GGUFLayout` says how to turn that back.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparseffn_jax.models.names import fill, generalise

_MISSING = object()


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

    def integer(self, key: str, default: Any = _MISSING) -> Any:
        """Returns a positive integer among the model's own settings, or ``default`` without one.

        Raises:
          ValueError: if it is something else, or is not there and there is no default.
        """
        return self._get(key, int, "a positive integer", default)

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
    """

    architecture: str
    modules: tuple[GGUFModule, ...]
    sizes: Mapping[str, str]
    numbers: Mapping[str, str]
    derive: Callable[[GGUFSettings], Mapping[str, Any]]
    derived: frozenset[str] = frozenset()

    def config_values(self, settings: GGUFSettings) -> dict[str, Any]:
        """Returns the values of the config that a file's settings make.

        Raises:
          ValueError: if a setting is missing or wrong, or the family's model cannot honour it.
        """
        values: dict[str, Any] = {
            name: settings.integer(key) for key, name in self.sizes.items()
        } | {name: settings.number(key) for key, name in self.numbers.items()}
        return values | dict(self.derive(settings))

    def find(self, name: str) -> tuple[str, GGUFModule] | None:
        """Returns PyTorch's name of a tensor and its module, or ``None`` if there is none."""
        stem, _, leaf = name.rpartition(".")
        pattern, numbers = generalise(f"{stem}.")
        module = self._by_name.get(pattern)
        if module is None or leaf not in ("weight", "bias"):
            return None
        return f"{fill(module.target, numbers)}.{leaf}", module

    @functools.cached_property
    def _by_name(self) -> dict[str, GGUFModule]:
        return {f"{module.name}.": module for module in self.modules}


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
