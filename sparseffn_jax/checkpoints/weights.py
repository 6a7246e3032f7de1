"""Reads and writes tensors: safetensors and msgpack files, whole or in shards, and live arrays.

A file is opened without reading its tensors. What describes them is known at once, and each is read
by itself when its turn comes.
"""

import dataclasses
import functools
import json
import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparseffn_jax.checkpoints.errors import CheckpointError, one_line, some
from sparseffn_jax.checkpoints.folders import MSGPACK, SAFETENSORS
from sparseffn_jax.checkpoints.untrusted import (
    check_finite,
    open_safetensors,
    read_flax_msgpack,
    read_json,
)
from sparseffn_jax.models.decoder import Dtype

_DTYPES_BY_CODE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The dtypes that a model's parameters can be stored in.
DTYPES = tuple(_DTYPES_BY_CODE.values())


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is not read yet.

    Attributes:
      where: the file that holds it, or what else to call its holder in an error.
      shape: its shape as stored.
      dtype: NumPy's name of its dtype, or safetensors' if NumPy has none.
      read: reads it.
    """

    where: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray | jax.Array]


@dataclasses.dataclass(frozen=True)
class Weights:
    """All tensors of a checkpoint.

    Attributes:
      where: the file that holds or lists them, or what else to call it in an error.
      tensors: the tensors by name; a name's parts are joined by dots.
    """

    where: str
    tensors: dict[str, Tensor]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The tensors' shapes."""
        return [tensor.shape for tensor in self.tensors.values()]


def open_weights(folder: Path) -> Weights:
    """Opens a folder's safetensors or else msgpack weights, in one file or in shards.

    Raises:
      CheckpointError: if there are none, or a file is damaged.
    """
    for name, read in ((SAFETENSORS, open_file), (MSGPACK, _open_msgpack)):
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return Weights(str(file), read(file))
        if index.is_file():
            return _open_shards(index, read)
    pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    found = (
        f"only {pickles[0]}, a pickle file, which could run any code and is never opened. "
        if pickles
        else "neither of them. If they exist only as pytorch_model.bin, "
    )
    raise CheckpointError(
        f"{folder} must hold its weights as {SAFETENSORS} or {MSGPACK}, and has {found}"
        "Convert it once, with PyTorch: transformers.AutoModelForCausalLM.from_pretrained(folder)"
        ".save_pretrained(folder, safe_serialization=True)"
    )


def open_file(file: Path) -> dict[str, Tensor]:
    """Opens one safetensors file, whose tensors are read on demand.

    Raises:
      CheckpointError: if it is damaged.
    """
    handle = open_safetensors(file)
    tensors = {}
    for name in handle.keys():  # noqa: SIM118 (the handle itself cannot be iterated)
        header = handle.get_slice(name)
        read = functools.partial(_read_finite, name, str(file), _read_tensor(name), file)
        code = str(header.get_dtype())
        dtype = _DTYPES_BY_CODE.get(code, code)
        tensors[name] = Tensor(str(file), tuple(header.get_shape()), dtype, read)
    return tensors


def in_memory(params: Mapping[str, Any]) -> Weights:
    """Returns the leaves of a parameter tree, by path, as tensors.

    Raises:
      CheckpointError: if a leaf is neither an array nor a :class:`Tensor`.
    """
    where, tensors = "params", {}
    leaves: dict[Any, Any] = flatten_dict(dict(params), sep=".")
    for path, leaf in leaves.items():
        if isinstance(leaf, Tensor):
            tensors[path] = leaf
            continue
        if not isinstance(leaf, np.ndarray | jax.Array):
            raise CheckpointError(f"{where} holds a {type(leaf).__name__} as {path}, not an array")
        tensors[path] = Tensor(where, leaf.shape, leaf.dtype.name, lambda leaf=leaf: leaf)
    return Weights(where, tensors)


def read_leaves(tree: Any) -> Any:
    """Returns a tree in which every :class:`Tensor` is read, and every other leaf as it is."""
    return jax.tree.map(lambda leaf: leaf.read() if isinstance(leaf, Tensor) else leaf, tree)


def write_safetensors(
    folder: Path, tensors: Mapping[str, Tensor], dtype: Dtype | None, max_shard_size: int
) -> None:
    """Writes tensors, each read when its turn comes.

    Args:
      folder: where the files go.
      tensors: the tensors, under PyTorch's names and in its layouts.
      dtype: what they are cast to; ``None`` keeps their dtypes.
      max_shard_size: the most bytes of one file; more are written in shards with an index.

    Raises:
      CheckpointError: if a tensor has a value that does not fit ``dtype``.
    """

    def stored_bytes(tensor: Tensor) -> int:
        return math.prod(tensor.shape) * np.dtype(dtype or tensor.dtype).itemsize

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=stored_bytes,
        filename_pattern=SAFETENSORS.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    for file, shard in split.filename_to_tensors.items():
        arrays = {name: _cast(name, np.asarray(tensors[name].read()), dtype) for name in shard}
        # transformers refuses a file that does not say whose layout it has.
        save_file(arrays, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{SAFETENSORS}.index.json").write_text(text, encoding="utf-8")


def check_dtype(dtype: Dtype | None) -> None:
    """Checks what tensors are to be cast to, before the work that leads there.

    Raises:
      CheckpointError: if it is no dtype that parameters can be stored in.
    """
    if dtype is None:
        return
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in DTYPES:
        raise CheckpointError(f"dtype={name}: expected one of {', '.join(DTYPES)}, or None")


def _cast(name: str, array: np.ndarray, dtype: Dtype | None) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.asarray(array, dtype, order="C")
    if _largest(cast.dtype) < _largest(array.dtype):
        overflowed = np.isinf(cast) & np.isfinite(array)
        if overflowed.any():
            value = float(np.abs(array[overflowed]).max())
            wider = next(x for x in ("bfloat16", "float32", "float64") if value <= _largest(x))
            raise CheckpointError(
                f"{name} has a value of magnitude {value:g}, which does not fit "
                f"{cast.dtype.name}: take {wider}"
            )
    return cast


def _largest(dtype: Dtype) -> float:
    return float(jnp.finfo(dtype).max)


def _open_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    weight_map = {name.replace("/", "."): shard for name, shard in weight_map.items()}
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or "\\" in shard:
            raise CheckpointError(
                f"{index} places {name} in {shard!r}: expected the name of a file beside the index"
            )
        shards.setdefault(shard, set()).add(name)
    for shard, names in shards.items():
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                f"{index} places {len(names)} tensors, among them {min(names)}, in {shard}, which "
                f"is not in {index.parent}: copy or download it too"
            )

    def open_shard(shard: str, names: set[str]) -> dict[str, Tensor]:
        file = index.parent / shard
        tensors = read(file)
        if wrong := names.symmetric_difference(tensors):
            raise CheckpointError(
                f"{file} does not hold what {index.name} says: {some(wrong)} in one of them only. "
                "Copy or download both again"
            )
        return tensors

    files = (open_shard(shard, names) for shard, names in shards.items())
    tensors = {name: tensor for shard in files for name, tensor in shard.items()}
    return Weights(str(index), tensors)


def _read_tensor(name: str) -> Callable[[Path], np.ndarray]:
    def read(file):
        # Mapped anew for each tensor: pages of a mapping that were read stay resident until then.
        with safe_open(file, framework="numpy") as handle:
            return handle.get_tensor(name)

    return read


def _open_msgpack(file: Path) -> dict[str, Tensor]:
    try:
        if not file.stat().st_size:
            raise CheckpointError(f"{file} is not a whole msgpack file of Flax: it is empty")
        with (
            file.open("rb") as f,
            mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            arrays = read_flax_msgpack(file, view)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    tensors = {}
    for path, array in arrays.items():
        # Sharded msgpack files join a path's parts by slashes.
        name = path.replace("/", ".")
        read = functools.partial(_read_finite, name, str(file), array.read, file)
        tensors[name] = Tensor(str(file), array.shape, array.dtype.name, read)
    return tensors


def _read_finite(
    name: str, where: str, read: Callable[[Path], np.ndarray], file: Path
) -> np.ndarray:
    try:
        return check_finite(read(file), name, where)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {name} from {where}: {one_line(error)}") from error
