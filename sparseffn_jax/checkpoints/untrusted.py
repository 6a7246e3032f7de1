"""Reads what a checkpoint's files claim, and checks it before anything is built on it.

A file from elsewhere may be damaged or made to harm. Sizes that it states are compared with its
own before memory is taken for them, nothing in it is run, and names stay within its folder. Every
fault is a :class:`CheckpointError`.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sparseffn_jax.checkpoints.errors import CheckpointError, one_line

# A checkpoint of 100 billion parameters has some thousands of tensors, described in under a
# megabyte.
_MOST_TENSORS = 100_000
_MOST_JSON_BYTES = 2**25
_MOST_NESTING = 32
_LONGEST_NAME = 1024
_CHECKED_AT_ONCE = 2**20


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """Describes an array that lies in a file.

    Attributes:
      shape: the array's shape.
      dtype: the array's dtype.
      parts: where its contents lie, row by row, as pairs of an offset in the file and a number of
        bytes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[tuple[int, int], ...]

    def read(self, file: Path) -> np.ndarray:
        """Returns the array, read from the file."""
        array = np.empty(self.shape, self.dtype)
        flat, start = array.reshape(-1).view(np.uint8), 0
        with file.open("rb") as f:
            for offset, size in self.parts:
                f.seek(offset)
                f.readinto(flat[start : start + size].data)
                start += size
        return array


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object that a file holds.

    Raises:
      CheckpointError: if it cannot be read, is far too large, or holds something else.
    """
    try:
        size = file.stat().st_size
        if size > _MOST_JSON_BYTES:
            raise CheckpointError(
                f"{file} has {size:,} bytes, too many for a description of a model: at most "
                f"{_MOST_JSON_BYTES:,} are read"
            )
        return _parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def open_safetensors(file: Path) -> Any:
    """Opens a safetensors file whose header is what it should be.

    safetensors itself refuses a header that is cut short, has more than 100 MB, or is not UTF-8 or
    not JSON; an entry that lacks a key or has one twice, or whose dtype is not known; a size that
    overflows or differs from the offsets'; and offsets that overlap, leave bytes out or end before
    or after the file does. What it lets pass is refused here: a header that describes far too much,
    several tensors of one name, of which it would take the last, and a name of any length.

    Returns:
      What ``safetensors.safe_open`` gives for NumPy.

    Raises:
      CheckpointError: if the file cannot be read, or something does not hold.
    """
    where = f"the header of {file}"
    try:
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))
            if length > _MOST_JSON_BYTES:
                raise _not_whole(file, f"it announces a header of {length:,} bytes")
            header = f.read(length)
        _check_extent(header, where)
        opened = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise _not_whole(file, one_line(error)) from error
    longest = max(map(len, _parse_json(header, where)), default=0)
    if longest > _LONGEST_NAME:
        raise CheckpointError(
            f"{where} has a name of {longest:,} characters: at most {_LONGEST_NAME:,} are read"
        )
    return opened


def read_flax_msgpack(file: Path, data: memoryview) -> dict[str, StoredArray]:
    """Finds the arrays in a msgpack file of Flax, without reading their contents.

    The format is that of ``flax.serialization``, written as
    https://github.com/msgpack/msgpack/blob/master/spec.md says.

    Args:
      file: the file, for the errors to name.
      data: the file's contents.

    Returns:
      The arrays by path, whose parts are joined by dots.

    Raises:
      CheckpointError: if the file holds anything else than nested dictionaries of arrays.
    """
    try:
        arrays = dict(_Msgpack(data).tree("", 0))
    except (_Malformed, struct.error, UnicodeDecodeError, IndexError) as error:
        raise CheckpointError(
            f"{file} is not a whole msgpack file of Flax ({error}): it is damaged, cut short, or a "
            "Git LFS pointer; copy or download it again"
        ) from error
    return arrays


def check_finite(array: np.ndarray, name: str, where: str) -> np.ndarray:
    """Returns ``array`` as it is, once its values are known to be finite.

    Args:
      array: a floating-point array; a float64 must be finite in float32 too.
      name: what the error calls the array.
      where: what the error calls the array's holder.

    Raises:
      CheckpointError: if a value is not finite; the message names the first.
    """
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHECKED_AT_ONCE):
        chunk = flat[start : start + _CHECKED_AT_ONCE]
        if chunk.dtype == np.float64:
            with np.errstate(over="ignore"):
                chunk = chunk.astype(np.float32)
        wrong = ~np.isfinite(chunk)
        if wrong.any():
            first = start + int(wrong.argmax())
            place = tuple(map(int, np.unravel_index(first, array.shape)))
            raise CheckpointError(
                f"{where} holds {name} with the value {flat[first]} at {place}: weights must be "
                "finite; the file is damaged, or of a run that diverged"
            )
    return array


def check_sizes(
    layers: int, sides: Mapping[str, int], shapes: Collection[tuple[int, ...]], where: str
) -> None:
    """Checks that a config's sizes can be those of a checkpoint, before a model is built of them.

    Args:
      layers: the config's number of layers, each of which has a tensor at least.
      sides: the config's sizes, by name, that are the length of some tensor's side.
      shapes: the shapes of the checkpoint's tensors.
      where: what the error calls the config.

    Raises:
      CheckpointError: if a size is beyond what is stored.
    """
    if layers > len(shapes):
        raise CheckpointError(
            f"{where} has {layers} layers, but the checkpoint has {len(shapes)} tensors: they "
            "belong to different models, or the config is damaged"
        )
    longest = max((max(shape, default=0) for shape in shapes), default=0)
    for name, size in sides.items():
        if size > longest:
            raise CheckpointError(
                f"{where} has {name}={size}, but no stored tensor has a side longer than "
                f"{longest}: they belong to different models, or the config is damaged"
            )


def _not_whole(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is not a whole safetensors file ({why}): it is damaged, cut short, or a Git LFS "
        "pointer; copy or download it again"
    )


def _check_extent(data: bytes, where: str) -> None:
    # What these characters part becomes an object in memory, many times their size.
    if sum(data.count(mark) for mark in (b"{", b"[", b",")) > 16 * _MOST_TENSORS:
        raise CheckpointError(f"{where} describes more than {_MOST_TENSORS:,} tensors")


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    _check_extent(data, where)
    try:
        values = json.loads(data, object_pairs_hook=_unique)
    except RecursionError as error:
        raise CheckpointError(f"{where} is not JSON: it is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} must hold a JSON object, not a {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice[:_LONGEST_NAME]!r} twice")
    return values


class _Malformed(Exception):
    """The bytes are not those of a parameter tree that Flax has written."""


class _Msgpack:
    """Walks a parameter tree in msgpack, and keeps in memory only what describes its arrays."""

    _EXT_NDARRAY = 1

    def __init__(self, data: memoryview, offset: int = 0, end: int | None = None):
        self._data, self._at = data, offset
        self._end = len(data) if end is None else end
        self._entries = 0

    def tree(self, path: str, depth: int) -> Iterator[tuple[str, StoredArray]]:
        """Yields the arrays of the map that comes next; after the outermost the data must end."""
        count = self._header("map", {0x80: 0x0F}, {0xDE: ">H", 0xDF: ">I"})
        if depth > _MOST_NESTING:
            raise _Malformed("it is nested too deeply")
        seen: set[str] = set()
        for _ in range(count):
            key = self._string()
            if key in seen:
                raise _Malformed(f"it names {path}{key} twice")
            seen.add(key)
            if key == "__msgpack_chunked_array__":
                yield path.removesuffix("."), self._chunked(count)
                return
            self._entries += 1
            if self._entries > _MOST_TENSORS:
                raise _Malformed(f"it has more than {_MOST_TENSORS:,} entries")
            name = f"{path}{key}"
            if len(name) > _LONGEST_NAME:
                raise _Malformed("it has a name that is too long")
            code = self._peek()
            if 0x80 <= code <= 0x8F or code in (0xDE, 0xDF):
                yield from self.tree(f"{name}.", depth + 1)
            else:
                yield name, self._array(name)
        if depth == 0 and self._at != self._end:
            raise _Malformed("more follows after its end")

    def _array(self, name: str) -> StoredArray:
        code = self._peek()
        if code not in (0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8):
            raise _Malformed(f"it holds something else than an array as {name}")
        self._at += 1
        # Fixed sizes of 1, 2, 4, 8 and 16 bytes, or a length of one, two or four.
        if code >= 0xD4:
            size = 1 << (code - 0xD4)
        else:
            size = self._unpack({0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}[code])
        kind = self._unpack(">b")
        if kind != self._EXT_NDARRAY:
            raise _Malformed(f"it holds something else than an array as {name}")
        start = self._at
        self._skip(size)
        return _Msgpack(self._data, start, self._at)._ndarray()

    def _ndarray(self) -> StoredArray:
        """Reads an array, which is written as its shape, its dtype's name and its contents."""
        if self._header("array", {0x90: 0x0F}, {}) != 3:
            raise _Malformed("an array is not described by three values")
        shape = tuple(
            self._integer() for _ in range(self._header("array", {0x90: 0x0F}, {0xDC: ">H"}))
        )
        dtype = _dtype(self._string())
        size = self._header("bytes", {}, {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"})
        start = self._at
        self._skip(size)
        if self._at != self._end or size != math.prod(shape) * dtype.itemsize:
            raise _Malformed(f"an array of shape {shape} and {dtype} has {size} bytes")
        return StoredArray(shape, dtype, ((start, size),))

    def _chunked(self, count: int) -> StoredArray:
        """Reads an array that Flax has cut into pieces, after the key that says so."""
        if count != 3 or self._take(1) != b"\xc3":
            raise _Malformed("a cut array is not described by three values")
        shape, chunks = (), []
        for _ in range(2):
            key = self._string()
            entries = self._header("map", {0x80: 0x0F}, {0xDE: ">H"})
            if key == "shape":
                named = [(self._string(), self._integer()) for _ in range(entries)]
                shape = tuple(size for _, size in sorted(named, key=lambda pair: int(pair[0])))
            elif key == "chunks":
                arrays = [(self._string(), self._array("a chunk")) for _ in range(entries)]
                chunks = [array for _, array in sorted(arrays, key=lambda pair: int(pair[0]))]
            else:
                raise _Malformed(f"a cut array has the key {key}")
        parts = tuple(part for chunk in chunks for part in chunk.parts)
        dtypes = {chunk.dtype for chunk in chunks}
        if len(dtypes) != 1:
            raise _Malformed("a cut array has pieces of several dtypes, or none")
        (dtype,) = dtypes
        if sum(size for _, size in parts) != math.prod(shape) * dtype.itemsize:
            raise _Malformed(f"the pieces of an array of shape {shape} have another size")
        return StoredArray(shape, dtype, parts)

    def _string(self) -> str:
        size = self._header("string", {0xA0: 0x1F}, {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"})
        if size > _LONGEST_NAME:
            raise _Malformed("it has a name that is too long")
        return str(self._take(size), "utf-8")

    def _integer(self) -> int:
        code = self._unpack(">B")
        if code < 0x80:
            return code
        formats = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
        if code not in formats:
            raise _Malformed("a shape has something else than sizes")
        return self._unpack(formats[code])

    def _header(self, what: str, short: dict[int, int], long: dict[int, str]) -> int:
        """Reads the size of a map, array, string or bytes; each entry takes a byte at least."""
        code = self._unpack(">B")
        size = next((code & mask for base, mask in short.items() if code & ~mask == base), None)
        if size is None:
            if code not in long:
                raise _Malformed(f"byte {self._at - 1} begins no {what}")
            size = self._unpack(long[code])
        if size > self._end - self._at:
            raise _Malformed(f"byte {self._at} announces a {what} beyond the end")
        return size

    def _peek(self) -> int:
        if self._at >= self._end:
            raise _Malformed("it ends too soon")
        return self._data[self._at]

    def _unpack(self, format: str) -> int:
        (value,) = struct.unpack(format, self._take(struct.calcsize(format)))
        return value

    def _take(self, size: int) -> memoryview:
        start = self._at
        self._skip(size)
        return self._data[start : self._at]

    def _skip(self, size: int) -> None:
        if size > self._end - self._at:
            raise _Malformed("it ends too soon")
        self._at += size


def _dtype(name: str) -> np.dtype:
    # jax.numpy knows bfloat16 and its like by name; only numbers can come of it.
    scalar: Any = getattr(jnp, name, None) if name.isidentifier() else None
    if scalar is None or not hasattr(scalar, "dtype"):
        raise _Malformed(f"an array has the dtype {name}")
    return np.dtype(scalar.dtype)
