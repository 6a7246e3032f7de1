"""Checkpoints in and out: Hugging Face folders, hub names and live Flax models.

Read are safetensors (https://huggingface.co/docs/safetensors) and Flax's msgpack
(``flax.serialization``), in one file or in shards with an index; written is safetensors in
PyTorch's names and layouts, so that transformers loads a dense model as its own. Pickle files
are never opened.
"""

import contextlib
import dataclasses
import functools
import json
import math
import mmap
import os
import re
import shutil
import typing
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from sparseffn_jax.checkpoints.untrusted import (
    CheckpointError,
    check_finite,
    check_safetensors,
    check_sizes,
    read_flax_msgpack,
    read_json,
)
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.decoder import Decoder, DecoderSpec, Dtype
from sparseffn_jax.models.families import family
from sparseffn_jax.models.names import NameMap

PathLike = str | os.PathLike[str]
# The folder of a small GPT-2 that writes Python; its README.md says what it was trained on.
EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "stdlib-gpt2"
# Says for a leaf's path, such as ("model", "norm", "weight"), and shape where it is to lie.
Placement = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding | None]

_SAFETENSORS = "model.safetensors"
_MSGPACK = "flax_model.msgpack"
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_SIZES = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL_SIZES = ("n_inner", "intermediate_size", "num_key_value_heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that was loaded.

    Attributes:
      config: of the model.
      params: its parameter tree, that of transformers' Flax class but for sparse layers' ``mlp``.
      ffns: one entry a layer, ``None`` where it is dense; empty if every layer is.
      folder: where it was read from, tokenizer files included; ``None`` for a live model.
    """

    config: Any
    params: dict[str, Any]
    ffns: tuple[SparseFFNConfig | None, ...] = ()
    folder: Path | None = None

    @property
    def spec(self) -> DecoderSpec:
        """What the config says, under one name in all model families."""
        return family(self.config.model_type).spec_of(self.config)

    def model(self, dtype: Dtype = jnp.float32, remat: bool = False) -> Decoder:
        """Returns the module that ``params`` belong to; see :class:`Decoder`."""
        return family(self.config.model_type)(self.config, self.ffns, dtype=dtype, remat=remat)


def load_pretrained(
    source: Any,
    *,
    param_dtype: Dtype | None = jnp.float32,
    sharding: Placement | None = None,
) -> Pretrained:
    """Loads a model's config and parameters.

    Tensors stream in one by one, each straight into its dtype and place, so that host memory
    holds little more than what is kept. Every name and shape is checked against the config, and
    every size against the files', before the first tensor is read; no weight may be NaN or
    infinite.

    Args:
      source: a folder with ``config.json`` and ``model.safetensors`` or ``flax_model.msgpack``,
        either in one file or in shards with a ``.index.json``; the name of such a model on the
        Hugging Face Hub; a live ``FlaxPreTrainedModel``; or a pair ``(config, params)``. Arrays
        of live models are shared, not copied, where their dtype stays.
      param_dtype: of the parameters; ``None`` keeps the checkpoint's.
      sharding: called with each leaf's path, such as ``("model", "norm", "weight")``, and shape;
        returns where it is to lie, or ``None`` for the default device.

    Raises:
      CheckpointError: if the source is not there, damaged, of another kind than its config says,
        or of a model family that is not known.
    """
    if isinstance(source, str | os.PathLike):
        folder = _find_folder(source)
        config, ffns = _read_config(folder)
        weights, where = _open_weights(folder), str(folder / "config.json")
        sides = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}
        check_sizes(config.num_hidden_layers, sides, weights.shapes, where)
    else:
        folder, ffns, where = None, (), "the config"
        config, weights = _open_live(source)
    model = family(config.model_type)(config, ffns)
    expected = _expected_leaves(model, where)
    params = _load(weights, expected, model.names, param_dtype, sharding)
    return Pretrained(config, params, ffns, folder)


def save_pretrained(
    folder: PathLike,
    model: Decoder,
    params: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes a model as a folder that :func:`load_pretrained` reads back bit for bit.

    The folder holds ``config.json``, for a sparse model with a key ``sparse_ffn`` (a list with
    ``null`` or a ``SparseFFNConfig`` for each layer), and ``model.safetensors``. It appears
    under its name only when it is complete.

    Args:
      folder: what to write; parents are made.
      model: whose config and ``ffns`` are saved.
      params: its parameter tree.
      tokenizer: a transformers tokenizer, or a folder to copy tokenizer files from.
      dtype: to cast the parameters to; ``None`` keeps theirs.
      overwrite: whether a model folder of that name is replaced, with all that is in it.
      max_shard_size: bytes of one file; a larger model is written in shards with an index.

    Raises:
      CheckpointError: if the folder cannot be written or holds something already, if ``params``
        are not the model's, or if a layer's FFN is neither dense nor a ``SparseFFNConfig``.
    """
    target = Path(folder).expanduser().resolve()
    tensors = _in_memory("params", flatten_dict(dict(params), sep="."))
    expected = _expected_leaves(model, "the model's config")
    placed = {path: (path, False) for path in tensors}
    _check_names("params", placed, expected, model.names)
    _check_shapes(tensors, placed, expected)
    config = _config_json(model, tensors, dtype)
    try:
        check_replaceable(target, overwrite)
        with _replacing(target) as staging:
            (staging / "config.json").write_text(config, encoding="utf-8")
            _write_safetensors(staging, tensors, model.names, dtype, max_shard_size)
            _write_tokenizer(staging, tokenizer)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


def check_replaceable(folder: PathLike, overwrite: bool) -> None:
    """Checks that :func:`save_pretrained` may write ``folder``, before the work that leads there.

    Raises:
      CheckpointError: if something is there that must not be replaced.
    """
    target = Path(folder).expanduser()
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file: name a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} is not empty, nothing was written: name another folder, or pass "
            "overwrite=True to replace it"
        )
    if not (target / "config.json").is_file():
        raise CheckpointError(
            f"{target} is not a model folder (it has no config.json) and will not be replaced: "
            "name another one"
        )


def load_tokenizer(source: PathLike) -> Any:
    """Returns the fast tokenizer of a model folder, or of a model on the Hugging Face Hub.

    Raises:
      CheckpointError: if there is none, or it cannot be read.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        # Given a folder without them, some versions of transformers make up an empty tokenizer.
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(
                f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
            )
        source = folder
    try:
        # Never the code that a folder may bring: without a word transformers would ask for leave.
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    # The tokenizers library raises bare Exceptions.
    except Exception as error:
        raise CheckpointError(
            f"no tokenizer can be read from {source}: {_one_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"the tokenizer of {source} has no fast form, tokenizer.json")
    return tokenizer


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Checks that every token that ``tokenizer`` can give has an embedding.

    Raises:
      CheckpointError: if it has more tokens than the model.
    """
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"wrong tokenizer: it has {len(tokenizer)} tokens, but the model has "
            f"vocab_size={config.vocab_size}; use the tokenizer that the model was trained with"
        )


# --- reading -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tensor:
    where: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray | jax.Array]


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Stored tensors: what describes them, and how to read each."""

    where: str
    tensors: dict[str, _Tensor]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tensor.shape for tensor in self.tensors.values()]


def _find_folder(source: PathLike) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the folder that holds it")
    name = os.fspath(source)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise CheckpointError(f"there is no folder {name}")
    try:
        folder = _download(name, _SAFETENSORS)
        if not any(folder.glob("*.safetensors")):
            folder = _download(name, _MSGPACK)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name!r} is not a folder here, and the Hugging Face Hub did not give such a model "
            f"({type(error).__name__}): check its spelling and the network, or give a local folder"
        ) from error
    return folder


def _download(name: str, weights: str) -> Path:
    stem, suffix = weights.split(".")
    files = (weights, f"{stem}-*.{suffix}", f"{weights}.index.json")
    return Path(snapshot_download(name, allow_patterns=["config.json", *_TOKENIZER_FILES, *files]))


def _read_config(folder: Path) -> tuple[Any, tuple[SparseFFNConfig | None, ...]]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json: give a model folder as transformers'")
    values = read_json(file)
    config_class = _family(values.get("model_type"), str(file)).config_class
    sparse_ffn = values.pop("sparse_ffn", None)
    try:
        config = config_class.from_dict(values)
    # What transformers raises for a wrong field differs from version to version.
    except Exception as error:
        raise CheckpointError(
            f"{file} is not a config for transformers: {_one_line(error)}"
        ) from error
    for name in (*_SIZES, *_OPTIONAL_SIZES):
        size = getattr(config, name, None)
        if size is None and name in _OPTIONAL_SIZES:
            continue
        if not isinstance(size, int) or size < 1:
            name = config_class.attribute_map.get(name, name)
            raise CheckpointError(f"{file} has {name}={size!r}: expected a positive integer")
    n_layer = config.num_hidden_layers
    if sparse_ffn is None:
        return config, ()
    if not isinstance(sparse_ffn, list) or len(sparse_ffn) != n_layer:
        raise CheckpointError(
            f"{file}: sparse_ffn must be a list with one entry for each of n_layer={n_layer}"
        )
    ffns = []
    for i, entry in enumerate(sparse_ffn):
        try:
            ffns.append(None if entry is None else SparseFFNConfig.from_dict(entry))
        except ValueError as error:
            raise CheckpointError(f"{file}: sparse_ffn[{i}]: {error}") from error
    return config, tuple(ffns)


def _family(model_type: Any, where: str) -> type[Decoder]:
    try:
        return family(model_type)
    except ValueError as error:
        raise CheckpointError(f"{where} has {error}") from error


def _open_weights(folder: Path) -> _Weights:
    for name, read in ((_SAFETENSORS, _open_safetensors), (_MSGPACK, _open_msgpack)):
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return _Weights(str(file), read(file))
        if index.is_file():
            return _open_shards(index, read)
    pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    found = (
        f"only {pickles[0]}, a pickle file, which could run any code and is never opened. "
        if pickles
        else "neither of them. If they exist only as pytorch_model.bin, "
    )
    raise CheckpointError(
        f"{folder} must hold its weights as {_SAFETENSORS} or {_MSGPACK}, and has {found}"
        "Convert it once, with PyTorch: transformers.AutoModelForCausalLM.from_pretrained(folder)"
        ".save_pretrained(folder, safe_serialization=True)"
    )


def _open_shards(index: Path, read: Callable[[Path], dict[str, _Tensor]]) -> _Weights:
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

    def open_shard(shard: str, names: set[str]) -> dict[str, _Tensor]:
        file = index.parent / shard
        tensors = read(file)
        if wrong := names.symmetric_difference(tensors):
            raise CheckpointError(
                f"{file} does not hold what {index.name} says: {_some(wrong)} in one of them only. "
                "Copy or download both again"
            )
        return tensors

    files = (open_shard(shard, names) for shard, names in shards.items())
    tensors = {name: tensor for shard in files for name, tensor in shard.items()}
    return _Weights(str(index), tensors)


def _open_safetensors(file: Path) -> dict[str, _Tensor]:
    try:
        check_safetensors(file)
        handle = safe_open(file, framework="numpy")
        tensors = {}
        for name in handle.keys():  # noqa: SIM118 (the handle itself cannot be iterated)
            header = handle.get_slice(name)
            read = functools.partial(_read_finite, name, str(file), _read_tensor(name), file)
            code = str(header.get_dtype())
            dtype = _SAFETENSORS_DTYPES.get(code, code)
            tensors[name] = _Tensor(str(file), tuple(header.get_shape()), dtype, read)
        return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}): it is damaged, cut short, or a Git "
            "LFS pointer; copy or download it again"
        ) from error


def _read_tensor(name: str) -> Callable[[Path], np.ndarray]:
    def read(file):
        # Mapped anew for each tensor: pages of a mapping that were read stay resident until then.
        with safe_open(file, framework="numpy") as handle:
            return handle.get_tensor(name)

    return read


def _open_msgpack(file: Path) -> dict[str, _Tensor]:
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
        tensors[name] = _Tensor(str(file), array.shape, array.dtype.name, read)
    return tensors


def _read_finite(name: str, where: str, read: Callable[[Any], np.ndarray], source: Any):
    try:
        return check_finite(read(source), name, where)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {name} from {where}: {error}") from error


def _open_live(source: Any) -> tuple[Any, _Weights]:
    if hasattr(source, "config") and hasattr(source, "params"):
        config, params = source.config, source.params
    elif isinstance(source, tuple) and len(source) == 2:
        config, params = source
    else:
        raise CheckpointError(
            f"cannot load a model from a {type(source).__name__}: expected a folder, a hub name, "
            "a FlaxPreTrainedModel or a pair (config, params)"
        )
    _family(getattr(config, "model_type", None), "the config")
    tensors = _in_memory("params", flatten_dict(dict(params), sep="."))
    return config, _Weights("params", tensors)


def _in_memory(where: str, leaves: Mapping[Any, Any]) -> dict[str, _Tensor]:
    tensors = {}
    for path, leaf in leaves.items():
        if not isinstance(leaf, np.ndarray | jax.Array):
            raise CheckpointError(f"{where} holds a {type(leaf).__name__} as {path}, not an array")
        tensors[path] = _Tensor(where, leaf.shape, leaf.dtype.name, lambda leaf=leaf: leaf)
    return tensors


def _expected_leaves(model: Decoder, where: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the leaves that the model's parameter tree must have, by dotted path."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    try:
        shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    # JAX has several errors for sizes beyond its own.
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {_one_line(error)}") from error
    leaves = flatten_dict(shapes["params"], sep=".")
    return typing.cast(dict[str, jax.ShapeDtypeStruct], leaves)


def _load(
    weights: _Weights,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    names: NameMap,
    param_dtype: Dtype | None,
    sharding: Placement | None,
) -> dict[str, Any]:
    placed = {name: names.to_path(name) for name in weights.tensors}
    _check_names(weights.where, placed, expected, names)
    _check_shapes(weights.tensors, placed, expected)
    leaves: dict[str, jax.Array] = {}
    tensors = dict(weights.tensors)
    # The largest first, while there is room for its stored form too.
    for name in sorted(tensors, key=lambda name: -math.prod(tensors[name].shape)):
        # Taken out, so that a tensor's stored form is let go before the next one is read.
        tensor = tensors.pop(name)
        path, transposed = placed[name]
        if path in expected:
            array = tensor.read()
            where = sharding and sharding(tuple(path.split(".")), expected[path].shape)
            leaves[path] = _place(array.T if transposed else array, param_dtype, where)
    return unflatten_dict({path: leaves[path] for path in expected}, sep=".")


def _place(
    array: np.ndarray | jax.Array, dtype: Dtype | None, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array, dtype)
    # Not by way of the default device, which may be too small for the whole.
    return jax.device_put(array if dtype is None else array.astype(dtype), sharding)


def _check_names(
    where: str,
    placed: Mapping[str, tuple[str, bool]],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    names: NameMap,
) -> None:
    found = {path: name for name, (path, _) in placed.items()}
    if twice := [name for name, (path, _) in placed.items() if found[path] != name]:
        raise CheckpointError(f"{where} holds twice, under two names: {_some(twice)}")
    if missing := [path for path in expected if path not in found]:
        both = [(path, names.to_name(path)[0]) for path in missing]
        known = [path if path == name else f"{path} ({name} in PyTorch)" for path, name in both]
        raise CheckpointError(
            f"{where} lacks {len(missing)} of the model's {len(expected)} weights: {_some(known)}. "
            "It is incomplete, or of another model than the config says"
        )
    if extra := [
        name for path, name in found.items() if path not in expected and not names.is_optional(path)
    ]:
        raise CheckpointError(
            f"{where} holds {len(extra)} weights that the model has no place for: {_some(extra)}. "
            "It is of another model than the config says"
        )


def _check_shapes(
    tensors: Mapping[str, _Tensor],
    placed: Mapping[str, tuple[str, bool]],
    expected: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    for name, tensor in tensors.items():
        path, transposed = placed[name]
        if path not in expected:
            continue
        shape = expected[path].shape[::-1] if transposed else expected[path].shape
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.where} holds {name} with shape {tensor.shape}, but the config makes it "
                f"{shape}: they belong to different models"
            )
        if tensor.dtype not in _SAFETENSORS_DTYPES.values():
            raise CheckpointError(
                f"{tensor.where} holds {name} as {tensor.dtype}: quantised checkpoints are not "
                f"read; take one in {', '.join(_SAFETENSORS_DTYPES.values())}"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _some(names: Collection[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


# --- writing -----------------------------------------------------------------------------------


def _config_json(model: Decoder, tensors: Mapping[str, _Tensor], dtype: Dtype | None) -> str:
    values = json.loads(model.config.to_json_string())
    for key in ("architectures", "dtype", "torch_dtype"):
        values.pop(key, None)
    dtypes = (
        {tensor.dtype for tensor in tensors.values()} if dtype is None else {np.dtype(dtype).name}
    )
    if len(dtypes) == 1:
        (values["dtype"],) = dtypes
    entries = []
    for i, ffn in enumerate(model.ffns):
        if not (ffn is None or isinstance(ffn, SparseFFNConfig)):
            raise CheckpointError(
                f"layer {i} has an FFN of your own, {ffn!r}: only dense ones (None) and "
                "SparseFFNConfig can be saved"
            )
        entries.append(None if ffn is None else ffn.to_dict())
    if any(entries):
        values["sparse_ffn"] = entries
    else:
        values["architectures"] = [type(model).__name__]
    return json.dumps(values, indent=2) + "\n"


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` that takes its place when the block succeeds."""
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    old = staging.with_suffix(".old")
    try:
        staging.mkdir(parents=True)
        yield staging
        if target.exists():
            target.rename(old)
        staging.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for folder in (staging, old):
            shutil.rmtree(folder, ignore_errors=True)


def _write_safetensors(
    folder: Path,
    tensors: Mapping[str, _Tensor],
    names: NameMap,
    dtype: Dtype | None,
    max_shard_size: int,
) -> None:
    stored = {}
    for path, tensor in tensors.items():
        name, transposed = names.to_name(path)
        stored[name] = (tensor, transposed)

    def stored_bytes(entry: tuple[_Tensor, bool]) -> int:
        tensor, _ = entry
        return math.prod(tensor.shape) * np.dtype(dtype or tensor.dtype).itemsize

    split = split_state_dict_into_shards_factory(
        stored,
        get_storage_size=stored_bytes,
        filename_pattern=_SAFETENSORS.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    for file, shard in split.filename_to_tensors.items():
        arrays = {}
        for name in shard:
            tensor, transposed = stored[name]
            array = np.asarray(tensor.read())
            arrays[name] = np.asarray(array.T if transposed else array, dtype, order="C")
        # transformers refuses a file that does not say whose layout it has.
        save_file(arrays, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{_SAFETENSORS}.index.json").write_text(text, encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    if tokenizer is None:
        return
    if not isinstance(tokenizer, str | os.PathLike):
        tokenizer.save_pretrained(folder)
        return
    source = Path(tokenizer).expanduser()
    files = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        raise CheckpointError(f"{source} has no tokenizer files to copy, such as tokenizer.json")
    for file in files:
        shutil.copyfile(file, folder / file.name)
