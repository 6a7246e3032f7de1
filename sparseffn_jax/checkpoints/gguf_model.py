"""Opens GGUF files as a config and tensors in PyTorch's names and layouts.

What is stored in blocks of few bits is dequantised by the package ``gguf``, some rows at a time.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from sparseffn_jax.checkpoints.configs import make_config
from sparseffn_jax.checkpoints.errors import CheckpointError, one_line, some
from sparseffn_jax.checkpoints.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from sparseffn_jax.checkpoints.untrusted import check_finite
from sparseffn_jax.checkpoints.weights import Tensor, Weights
from sparseffn_jax.config import CoreConfig, MicroRefinementConfig, SparseFFNConfig
from sparseffn_jax.models.decoder import FFN_NAME, Decoder
from sparseffn_jax.models.families import gguf_family, gguf_layout
from sparseffn_jax.models.gguf import GGUFModule, GGUFSettings, pair_halves

_FLOATS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BYTES_AT_ONCE = 2**20
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor of a GGUF file, whose type is known.

    Attributes:
      shape: its shape, in NumPy's order.
      dtype: the dtype that it is read as.
      offset: where in the file it begins.
      row_bytes: how many bytes its last axis takes.
      type: gguf's type of its blocks; ``None`` if it is stored as ``dtype``.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    row_bytes: int
    type: Any

    @property
    def end(self) -> int:
        """Where in the file it ends."""
        return self.offset + math.prod(self.shape[:-1]) * self.row_bytes


def open_gguf(file: Path) -> tuple[Any, tuple[SparseFFNConfig | None, ...], Weights]:
    """Opens a GGUF file without reading its tensors.

    Returns:
      A config of the class of the file's family; one entry a layer where layers differ, ``None``
      for one with as many units as any and a ``SparseFFNConfig`` for a narrower one, or nothing if
      all are alike; and the tensors by PyTorch's names.

    Raises:
      CheckpointError: if the package ``gguf`` is not installed, or if the file is damaged, one of
        several parts, or of an architecture, a kind of quantisation or a setting that is not read.
    """
    gguf = import_gguf()
    header = read_gguf_header(file)
    parts = header.settings.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointError(
            f"{file} is one of {str(parts)[:80]} parts of a model: join them with llama.cpp's "
            "llama-gguf-split --merge"
        )
    try:
        architecture = header.settings.get("general.architecture")
        decoder = gguf_family(architecture)
    except ValueError as error:
        raise CheckpointError(f"{file} has {error}") from error
    stored = _locate(header, gguf)

    def read(name: str) -> np.ndarray:
        return _read_finite(file, name, stored[name])

    shapes = {name: tensor.shape for name, tensor in stored.items()}
    settings = GGUFSettings(str(architecture), header.settings, shapes, read)
    config = _config(settings, decoder, file)
    ffns = _ffns(settings, decoder, config, file)
    return config, ffns, Weights(str(file), _tensors(file, stored, decoder, config, ffns))


def import_gguf() -> ModuleType:
    """Returns the package ``gguf``.

    Raises:
      CheckpointError: if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "GGUF files are read and written by the package gguf, which is not installed: "
            "pip install 'sparseffn_jax[gguf]'"
        ) from error
    return gguf


def _locate(header: GGUFHeader, gguf: ModuleType) -> dict[str, _Stored]:
    """Finds where the tensors lie, and checks that each has bytes of its own in the file."""
    stored = {
        name: _describe(header.file, name, tensor, gguf) for name, tensor in header.tensors.items()
    }
    _check_types(header.file, {tensor.type for tensor in stored.values()}, gguf)
    end = 0
    for name, tensor in sorted(stored.items(), key=lambda item: item[1].offset):
        if tensor.end > header.size or tensor.offset < end:
            why = "beyond its end" if tensor.end > header.size else "over another tensor"
            raise CheckpointError(
                f"{header.file} places {name}, of shape {tensor.shape}, {why}: it is damaged or "
                "cut short; copy or download it again"
            )
        end = tensor.end
    return stored


def _describe(file: Path, name: str, tensor: GGUFTensor, gguf: ModuleType) -> _Stored:
    width = tensor.shape[-1] if tensor.shape else 1
    try:
        kind = gguf.GGMLQuantizationType(tensor.type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file} holds {name} in the type {tensor.type}, which the installed version of gguf "
            "does not know: pip install --upgrade gguf, or copy the file again if it is damaged"
        ) from error
    if width % block:
        raise CheckpointError(
            f"{file} holds {name} with rows of {width} values as {kind.name}, whose blocks have "
            f"{block}: it is damaged; copy or download it again"
        )
    dtype = _FLOATS.get(kind.name)
    row_bytes = width // block * block_bytes
    return _Stored(
        tensor.shape,
        dtype or np.dtype(np.float32),
        tensor.offset,
        row_bytes,
        None if dtype else kind,
    )


def _check_types(file: Path, kinds: set[Any], gguf: ModuleType) -> None:
    """Checks that all kinds of blocks can be dequantised, before any is read."""
    for kind in kinds - {None}:
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{file} holds tensors as {kind.name}, which gguf does not dequantise: take the "
                "model in another quantisation, such as Q8_0"
            ) from error


def _config(settings: GGUFSettings, decoder: type[Decoder], file: Path) -> Any:
    layout = gguf_layout(decoder)
    assert layout is not None
    try:
        values = layout.config_values(settings)
        values["vocab_size"] = settings.integer("vocab_size", _rows(settings.shapes, file))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file} has {error}") from error
    # Without a head of its own a model's head is its embedding.
    values["tie_word_embeddings"] = "output.weight" not in settings.shapes
    for name, key in _IDS.items():
        token = settings.values.get(f"tokenizer.ggml.{name}_token_id")
        is_token = isinstance(token, int) and 0 <= token < values["vocab_size"]
        values[key] = token if is_token else None
    return make_config(decoder, values, str(file))


def _rows(shapes: Mapping[str, tuple[int, ...]], file: Path) -> int:
    shape = shapes.get("token_embd.weight", ())
    if len(shape) != 2:
        raise CheckpointError(
            f"{file} has no matrix token_embd.weight: it is not a language model, or incomplete"
        )
    return shape[0]


def _ffns(
    settings: GGUFSettings, decoder: type[Decoder], config: Any, file: Path
) -> tuple[SparseFFNConfig | None, ...]:
    try:
        spec, widths = decoder.spec_of(config), settings.widths()
    except ValueError as error:
        raise CheckpointError(f"{file} has {error}") from error
    # Every layer has tensors: more are announced by a file that is refused when they are missed.
    if not isinstance(widths, list) or len(widths) > len(settings.shapes):
        return ()

    def ffn(layer: int, width: int) -> SparseFFNConfig | None:
        bias = f"blk.{layer}.ffn_up.bias" in settings.shapes
        if (width, bias) == (spec.d_ff, spec.ffn_bias):
            return None
        micro, sizes = MicroRefinementConfig(CoreConfig(width)), (spec.d_model, spec.d_ff)
        return SparseFFNConfig(*sizes, spec.activation, micro=micro, gated=spec.gated, bias=bias)

    ffns = tuple(ffn(layer, width) for layer, width in enumerate(widths))
    return ffns if any(ffns) else ()


def _tensors(
    file: Path,
    stored: Mapping[str, _Stored],
    decoder: type[Decoder],
    config: Any,
    ffns: tuple[SparseFFNConfig | None, ...],
) -> dict[str, Tensor]:
    layout = gguf_layout(decoder)
    assert layout is not None
    tensors, unknown = {}, []
    for name, tensor in stored.items():
        if name in layout.derived:
            continue
        if (found := layout.find(name)) is None:
            unknown.append(name)
            continue
        target, module = found
        if (core := _core_name(target, decoder, ffns)) is not None:
            # A core's kernel is stored as (in, out), the file's tensor as (out, in).
            target, module = core, dataclasses.replace(module, transposed=True)
        flipped = module.transposed and len(tensor.shape) == 2
        shape = tensor.shape[::-1] if flipped else tensor.shape
        read = functools.partial(_read_module, file, name, tensor, module, config)
        tensors[target] = Tensor(str(file), shape, tensor.dtype.name, read)
    if unknown:
        raise CheckpointError(
            f"{file} holds {len(unknown)} tensors that no {layout.architecture} has: "
            f"{some(unknown)}. It is of a variant that is not read"
        )
    return tensors


def _core_name(
    target: str, decoder: type[Decoder], ffns: tuple[SparseFFNConfig | None, ...]
) -> str | None:
    """Returns what a dense FFN's tensor is called in a sparse layer; ``None`` in another place."""
    path, _ = decoder.names.to_path(target)
    layer = re.fullmatch(rf"(.*\.(\d+)\.{FFN_NAME})\.(\w+)\.(\w+)", path)
    if layer is None or int(layer[2]) >= len(ffns) or ffns[int(layer[2])] is None:
        return None
    _, _, name, leaf = layer.groups()
    layout = decoder.ffn_layout
    if name == layout.down and leaf == "bias":
        return f"{layer[1]}.bias"
    core = {layout.down: "down", layout.up: "up", layout.gate: "gate"}[name]
    return f"{layer[1]}.core.{core}.{leaf}"


def _read_module(
    file: Path, name: str, tensor: _Stored, module: GGUFModule, config: Any
) -> np.ndarray:
    array = _read_finite(file, name, tensor)
    if module.heads is not None:
        array = pair_halves(array, getattr(config, module.heads))
    if module.offset and name.endswith(".weight"):
        array = array - np.asarray(module.offset, array.dtype)
    return array.T if module.transposed else array


def _read_finite(file: Path, name: str, tensor: _Stored) -> np.ndarray:
    try:
        return check_finite(_read(file, tensor), name, str(file))
    except OSError as error:
        raise CheckpointError(f"cannot read {name} from {file}: {one_line(error)}") from error


def _read(file: Path, tensor: _Stored) -> np.ndarray:
    rows = math.prod(tensor.shape[:-1])
    array = np.empty((rows, math.prod(tensor.shape[-1:])), tensor.dtype)
    step = max(1, _BYTES_AT_ONCE // tensor.row_bytes)
    with file.open("rb") as f:
        f.seek(tensor.offset)
        for start in range(0, rows, step):
            chunk = array[start : start + step]
            data = np.frombuffer(f.read(len(chunk) * tensor.row_bytes), np.uint8)
            if data.size != len(chunk) * tensor.row_bytes:
                raise OSError("it ends too soon")
            chunk[:] = _decode(data.reshape(len(chunk), -1), tensor)
    return array.reshape(tensor.shape)


def _decode(data: np.ndarray, tensor: _Stored) -> np.ndarray:
    if tensor.type is None:
        return data.view(tensor.dtype)
    import gguf

    # Scales that are not finite give values that are not, which are refused.
    with np.errstate(all="ignore"):
        return gguf.dequantize(data, tensor.type)
