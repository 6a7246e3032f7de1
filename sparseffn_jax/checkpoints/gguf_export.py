"""Writes models as GGUF files, as llama.cpp reads them.

What the format calls a family's tensors and settings is said once, for reading and for writing, by
the family's :class:`~sparseffn_jax.models.gguf.GGUFLayout`.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np

from sparseffn_jax.checkpoints.errors import CheckpointError, one_line
from sparseffn_jax.checkpoints.export import DenseLayers, dense_layers
from sparseffn_jax.checkpoints.folders import PathLike, check_new_file, replacing_file
from sparseffn_jax.checkpoints.gguf_model import import_gguf
from sparseffn_jax.checkpoints.gguf_vocabulary import vocabulary
from sparseffn_jax.checkpoints.layout import to_pytorch
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer, load_tokenizer
from sparseffn_jax.checkpoints.weights import Tensor, in_memory
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.models.families import FAMILIES, gguf_layout
from sparseffn_jax.models.gguf import WIDTH, GGUFExtras, GGUFLayout, GGUFModule, pair_neighbours

GGUFType = Literal["float32", "float16", "bfloat16", "q8_0"]
# Each type under gguf's names: of a tensor, and of a file of such tensors.
_TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}
# Beside all vectors, llama.cpp's converter keeps it in float32.
_EXACT = "position_embd"
# What has one value for each layer in files whose layers differ.
_PER_LAYER = (WIDTH, "attention.head_count", "attention.head_count_kv")


def export_gguf(
    path: PathLike,
    model: Decoder,
    params: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    dtype: GGUFType = "float16",
    overwrite: bool = False,
) -> None:
    """Writes a model as a GGUF file, which llama.cpp and what is built on it can run.

    Every layer must be dense, or a SparseFFN of a core whose masks, if any, are whole rows and
    columns, alone or beside a low-rank bypass. A component of the bypass becomes one hidden unit of
    LLaMA's FFN, whose gate gets a bias, and two units of GPT-2's. Layers of LLaMA and Mistral may
    differ in width: the file is then of the architecture ``deci``. :func:`load_pretrained` reads
    the file back. Beside the parameters, memory holds one tensor, or one layer's FFN.

    Args:
      path: the file to write, named ``*.gguf``; parent folders are made, and the file appears under
        its name only when it is complete.
      model: a GPT-2, a LLaMA or a Mistral whose layers are dense in this sense. The format knows no
        sliding window: a Mistral with one gets it as its longest context.
      params: the model's parameter tree, in memory or loaded on demand.
      tokenizer: a fast transformers tokenizer, or a folder or GGUF file that has one; without one
        the file serves programs that work on token ids.
      dtype: how matrices are stored, ``"float32"``, ``"float16"``, ``"bfloat16"`` or ``"q8_0"``,
        blocks of 32 values of eight bits with one scale, which rows of other lengths are not cut
        into: they are stored as float16. Vectors are float32.
      overwrite: whether a file of that name is replaced.

    Raises:
      CheckpointError: if the package ``gguf`` is not installed, a layer is not dense in this sense,
        llama.cpp has no such model or tokenizer, the file is there, or it cannot be written.

    Example:
      >>> import tempfile
      >>> import sparseffn_jax as sf
      >>> pretrained = sf.load_pretrained(sf.EMBEDDED_MODEL)
      >>> file = tempfile.mkdtemp() + "/model.gguf"
      >>> sf.export_gguf(
      ...     file, pretrained.model(), pretrained.params, tokenizer=sf.EMBEDDED_MODEL
      ... )
      >>> sf.load_pretrained(file).spec == pretrained.spec
      True
    """
    gguf, file = import_gguf(), Path(path).expanduser()
    check_gguf(file, overwrite=overwrite)
    if dtype not in get_args(GGUFType):
        raise CheckpointError(f"dtype={dtype!r}: expected one of {', '.join(get_args(GGUFType))}")
    layout = _layout(model)
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.config)
    dense = dense_layers(model, params, takes_biases=layout.ffn_bias)
    architecture = _architecture(layout, dense)
    settings, extra = _settings(layout, architecture, model.config, dense)
    kind, file_type = _TYPES[dtype]
    general = {"file_type": int(gguf.LlamaFileType[file_type])}
    if dtype == "q8_0":
        general["quantization_version"] = gguf.GGML_QUANT_VERSION
    tensors = list(_tensors(model, layout, dense, extra, gguf.GGMLQuantizationType[kind], gguf))
    try:
        with replacing_file(file) as staging:
            writer = gguf.GGUFWriter(staging, architecture)
            try:
                for scope, values in (
                    ("general", general),
                    (architecture, settings),
                    ("tokenizer", vocabulary(tokenizer, model.config.vocab_size)),
                ):
                    for key, value in values.items():
                        _add(writer, f"{scope}.{key}", value)
                _write(writer, tensors, gguf)
            finally:
                writer.close()
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {one_line(error)}") from error


def check_gguf(file: Path, *, overwrite: bool, sources: tuple[str, ...] = ()) -> None:
    """Checks that a GGUF file may be written; arguments and errors are :func:`check_new_file`'s."""
    if file.suffix.lower() != ".gguf":
        raise CheckpointError(f"{file}: expected a name that ends in .gguf")
    check_new_file(file, overwrite, sources)


@dataclasses.dataclass(frozen=True)
class _Written:
    """A tensor to write.

    Attributes:
      name: its name in the file.
      shape: its shape, in NumPy's order.
      kind: gguf's type of its values.
      read: returns it in float32.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    read: Callable[[], np.ndarray]


def _layout(model: Decoder) -> GGUFLayout:
    layout = gguf_layout(type(model))
    if layout is None or layout.describe is None:
        written = [
            name
            for name, decoder in FAMILIES.items()
            if (known := gguf_layout(decoder)) is not None and known.describe is not None
        ]
        raise CheckpointError(
            f"model_type={model.config.model_type!r}: written as GGUF are {', '.join(written)}; "
            "export_dense writes a folder for other programs"
        )
    return layout


def _architecture(layout: GGUFLayout, dense: DenseLayers) -> str:
    if len(set(dense.widths)) == 1:
        return layout.architecture
    if layout.per_layer is None:
        raise CheckpointError(
            f"layers of {min(dense.widths)} to {max(dense.widths)} hidden units: llama.cpp's "
            f"{layout.architecture} has one number for all; convert with --servable, which makes "
            "all layers alike for this family"
        )
    return layout.per_layer


def _settings(
    layout: GGUFLayout, architecture: str, config: Any, dense: DenseLayers
) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """Returns the settings by the key after the architecture, and the tensors that go with them."""
    assert layout.describe is not None
    try:
        extras: GGUFExtras = layout.describe(config)
    except ValueError as error:
        raise CheckpointError(f"the model's config has {error}") from error
    settings: dict[str, Any] = {
        key: int(getattr(config, name)) for key, name in layout.sizes.items() if key != WIDTH
    }
    settings |= {key: float(getattr(config, name)) for key, name in layout.numbers.items()}
    settings |= {"vocab_size": config.vocab_size, WIDTH: dense.widths[0], **extras.settings}
    if architecture == layout.per_layer:
        for key in _PER_LAYER:
            settings[key] = [settings[key]] * len(dense.widths)
        settings[WIDTH] = list(dense.widths)
    return settings, extras.tensors


def _tensors(
    model: Decoder,
    layout: GGUFLayout,
    dense: DenseLayers,
    extra: Mapping[str, np.ndarray],
    kind: Any,
    gguf: ModuleType,
) -> Iterator[_Written]:
    kinds, (block, _) = gguf.GGMLQuantizationType, gguf.GGML_QUANT_SIZES[kind]
    for name, array in extra.items():
        yield _Written(name, array.shape, kinds.F32, lambda array=array: array)
    for target, tensor in to_pytorch(in_memory(dense.params), model.names).items():
        found = layout.name_of(target)
        assert found is not None, target
        name, module = found
        flipped = module.transposed and len(tensor.shape) == 2
        shape = tensor.shape[::-1] if flipped else tensor.shape
        stored = kinds.F16 if shape[-1] % block else kind
        if len(shape) < 2 or module.name == _EXACT:
            stored = kinds.F32
        yield _Written(name, shape, stored, _reader(tensor, module, model.config))


def _reader(tensor: Tensor, module: GGUFModule, config: Any) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = np.asarray(tensor.read()).astype(np.float32)
        if module.transposed:
            array = array.T
        if module.heads is not None:
            array = pair_neighbours(array, getattr(config, module.heads))
        return np.ascontiguousarray(array)

    return read


def _write(writer: Any, tensors: list[_Written], gguf: ModuleType) -> None:
    """Writes header, settings and then tensor by tensor."""
    for tensor in tensors:
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        size = math.prod(tensor.shape) // block * block_bytes
        read_as = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, read_as, size, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        array = tensor.read()
        largest = float(np.abs(array).max())
        if not largest <= _LARGEST.get(tensor.kind.name, np.inf):
            raise CheckpointError(
                f"{tensor.name} has values up to {largest:.3g}, which do not fit into "
                f"{tensor.kind.name}: write the model as bfloat16"
            )
        writer.write_tensor_data(gguf.quantize(array, tensor.kind))


def _add(writer: Any, key: str, value: Any) -> None:
    adds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adds[type(value)](key, value)
