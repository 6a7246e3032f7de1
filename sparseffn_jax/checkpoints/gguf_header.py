"""Reads what a GGUF file says of itself, and checks it before anything is built on it.

The format is specified at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package
``gguf`` has a reader too; it believes every count, and an array announced in a file of 200 bytes
keeps it busy, and its memory growing, without end. Here nothing is taken from a file that its size
does not bear out.
"""

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from sparseffn_jax.checkpoints.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# Of what no real file comes near: LLaMA 3's vocabulary has 280,000 merges, its chat template 4 kB.
_MOST_ENTRIES = 100_000
_MOST_STRINGS = 4_000_000
_LONGEST_NAME = 1024
_LONGEST_STRING = 2**20
_MOST_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Describes a tensor that lies in a GGUF file.

    Attributes:
      shape: its shape, in NumPy's order.
      type: the number of its type, as the enumeration ``ggml_type`` has it.
      offset: where in the file it begins.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself.

    Attributes:
      file: the file.
      size: its size in bytes.
      settings: its metadata: integers, floats, booleans, strings, lists of strings and NumPy
        arrays of numbers.
      tensors: its tensors, by name.
    """

    file: Path
    size: int
    settings: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_header(file: Path) -> GGUFHeader:
    """Returns a GGUF file's metadata and the description of its tensors.

    Raises:
      CheckpointError: if the file cannot be read, is not a whole GGUF file of version 2 or 3 in
        little-endian order, or describes far more than a model has.
    """
    try:
        size = file.stat().st_size
        if size < 24:
            raise _not_whole(file, f"it has {size} bytes")
        with (
            file.open("rb") as f,
            mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            settings, tensors = _Header(view).read()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (_Malformed, UnicodeDecodeError) as error:
        raise _not_whole(file, str(error)) from error
    return GGUFHeader(file, size, settings, tensors)


def _not_whole(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is not a whole GGUF file ({why}): it is damaged, cut short, or a Git LFS "
        "pointer; copy or download it again"
    )


class _Malformed(Exception):
    """The bytes are not those of a GGUF file that can be read."""


class _Header:
    """Walks a header from its first byte to the last one before the tensors' contents."""

    def __init__(self, data: memoryview):
        self._data, self._at = data, 0
        self._strings = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        """Returns metadata and tensors."""
        if bytes(self._take(4)) != _MAGIC:
            raise _Malformed("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "in big-endian order" if swapped in _VERSIONS else f"of version {version}"
            raise _Malformed(f"it is {kind}; read are versions 2 and 3 in little-endian order")
        tensor_count, count = self._scalar("Q"), self._scalar("Q")
        for what, number in (("tensors", tensor_count), ("settings", count)):
            if number > _MOST_ENTRIES:
                raise _Malformed(f"it announces {number:,} {what}: at most {_MOST_ENTRIES:,}")
        settings = {}
        for _ in range(count):
            key = self._string(_LONGEST_NAME)
            if key in settings:
                raise _Malformed(f"it has {key} twice")
            settings[key] = self._value(self._scalar("I"), key)
        alignment = settings.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in [2**i for i in range(3, 21)]:
            raise _Malformed(f"general.alignment={alignment!r} is not a power of 2 from 8")
        tensors = {}
        for _ in range(tensor_count):
            name = self._string(_LONGEST_NAME)
            if name in tensors:
                raise _Malformed(f"it has the tensor {name} twice")
            tensors[name] = self._tensor(name, alignment)
        start = -(-self._at // alignment) * alignment
        return settings, {
            name: dataclasses.replace(tensor, offset=start + tensor.offset)
            for name, tensor in tensors.items()
        }

    def _tensor(self, name: str, alignment: int) -> GGUFTensor:
        """Reads a tensor's description, with the offset from the start of all contents."""
        dimensions = self._scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise _Malformed(f"{name} has {dimensions:,} dimensions: at most {_MOST_DIMENSIONS}")
        # The fastest dimension comes first, in NumPy last.
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        kind, offset = self._scalar("I"), self._scalar("Q")
        if 0 in shape:
            raise _Malformed(f"{name} has a dimension of 0")
        if offset % alignment:
            raise _Malformed(f"{name} lies at {offset}, which {alignment} does not divide")
        return GGUFTensor(shape, kind, offset)

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string(_LONGEST_STRING)
        if kind != _ARRAY:
            raise _Malformed(f"{key} has the unknown type {kind}")
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == _STRING:
            # Each takes several times its size in memory.
            self._strings += count
            if self._strings > _MOST_STRINGS:
                raise _Malformed(
                    f"it announces {self._strings:,} strings: at most {_MOST_STRINGS:,}"
                )
            return [self._string(_LONGEST_STRING) for _ in range(count)]
        if kind not in _SCALARS:
            raise _Malformed(f"{key} is an array of the type {kind}, which is not read")
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).copy()

    def _string(self, longest: int) -> str:
        size = self._scalar("Q")
        if size > longest:
            raise _Malformed(f"byte {self._at - 8} announces a string of {size:,} bytes")
        return str(self._take(size), "utf-8")

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))
        return value

    def _take(self, size: int) -> memoryview:
        start, end = self._at, self._at + size
        if end > len(self._data):
            raise _Malformed("it ends too soon")
        self._at = end
        return self._data[start:end]
