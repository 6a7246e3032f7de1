"""Reads the fields of frozen dataclasses, given in JSON or in Python, as their annotations say.

Pydantic 2.14 would do this in as many lines, because strict types, NumPy values, masks written as
digits and errors of one line, in Python as from JSON, each need code beside it. It would also add
a compiled dependency and 0.1 to 0.2 s to the import, and its messages do not list the known keys.
"""

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, Self

import numpy as np

_UNIONS = (typing.Union, types.UnionType)
_ACCEPTED = {bool: bool, int: int, float: (int, float), str: str}
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


class NamedFields:
    """A dataclass whose constructor says of a field that it lacks where it belongs."""

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Checks the names of the fields that are given.

        Raises:
          TypeError: if a field is unknown; the message names those that there are.
        """
        fields = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
        for name in values.keys() - set(fields):
            raise TypeError(
                f"{cls.__name__} has no {name}{_home_of(name, cls)}: it has {', '.join(fields)}"
            )
        return super().__new__(cls)


def check_fields(config: Any) -> None:
    """Checks the fields of a dataclass that is being built against their annotations.

    Lists become tuples, and NumPy's values become Python's.

    Raises:
      ValueError: if a field holds a value of another type; the message names field and value.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        object.__setattr__(config, name, _parse(hint, getattr(config, name), name))


def parse_dataclass(cls: type, values: Any, where: str) -> Any:
    """Builds a dataclass, and the dataclasses in it, from a JSON object.

    Args:
      cls: the dataclass.
      values: what ``json.loads`` returned.
      where: what messages call the object, such as ``"config"``; they append the path within it.

    Raises:
      ValueError: if a key is unknown or missing, if a value has another type than its field, or
        if the dataclass refuses the values itself.
    """
    if not isinstance(values, Mapping):
        _refuse(where, values, _describe(cls))
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := set(values) - set(fields):
        raise ValueError(
            f"{where} has unknown keys {', '.join(sorted(map(str, unknown)))}: expected some of "
            f"{', '.join(fields)}"
        )
    hints = typing.get_type_hints(cls)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ValueError(f"{where} lacks {name}: expected {_describe(hints[name])}")
    parsed = {name: _parse(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**parsed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _parse(hint: Any, value: Any, where: str) -> Any:
    """Reads one value as the type that a field, or an entry of one, is annotated with."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    options = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    if value is None and type(None) in options:
        return None
    (hint,) = (option for option in options if option is not type(None))
    if dataclasses.is_dataclass(hint):
        hint = typing.cast(type, hint)
        return value if isinstance(value, hint) else parse_dataclass(hint, value, where)
    if typing.get_origin(hint) is tuple:
        return _parse_tuple(hint, value, where)
    if typing.get_origin(hint) is Literal:
        is_accepted = value in typing.get_args(hint)
    else:
        # Python takes True for 1; a config does not.
        is_boolean = isinstance(value, bool)
        is_accepted = isinstance(value, _ACCEPTED[hint]) and is_boolean is (hint is bool)
    if not is_accepted:
        _refuse(where, value, _describe(hint))
    try:
        return hint(value) if hint in _ACCEPTED else value
    except OverflowError:
        _refuse(where, value, "a number of at most 1.8e308")


def _parse_tuple(hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    item = typing.get_args(hint)[0]
    if isinstance(value, str) and item is bool:
        if set(value) - {"0", "1"}:
            _refuse(where, value, "a row of a mask, written with 0 and 1")
        return tuple(digit == "1" for digit in value)
    if not isinstance(value, list | tuple):
        _refuse(where, value, _describe(hint))
    return tuple(_parse(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))


def _describe(hint: Any) -> str:
    """Says what a field expects, in the words of JSON."""
    if dataclasses.is_dataclass(hint):
        return f"a {typing.cast(type, hint).__name__}, or a JSON object with its fields"
    if typing.get_origin(hint) is tuple:
        return "a list"
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    return _NAMES[hint]


def _home_of(name: str, cls: type) -> str:
    """Says which of the dataclasses in a dataclass has a field, if any does."""
    for outer, hint in typing.get_type_hints(cls).items():
        for part in typing.get_args(hint):
            if dataclasses.is_dataclass(part) and name in part.__dataclass_fields__:
                part = typing.cast(type, part)
                return f", which belongs into {outer}={part.__name__}({name}=...)"
    return ""


def _refuse(where: str, value: Any, expected: str) -> NoReturn:
    # A value may be long, such as all rows of a mask: its beginning is enough to find it.
    given = "null" if value is None else reprlib.repr(value)
    raise ValueError(f"{where}={given}: expected {expected}") from None
