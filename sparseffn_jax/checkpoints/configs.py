"""Reads and writes ``config.json``.

It holds transformers' keys and, for a sparse model, ``sparse_ffn``: a list with ``null`` or a
``SparseFFNConfig`` for each layer. A sparse model has a ``model_type`` of its own, so that
transformers does not take it for a dense one and make up its FFNs. The file beside it that
``auto_map`` names has the classes by which transformers loads it, if its user lets it run code.
"""

import json
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sparseffn_jax.checkpoints.errors import CheckpointError, one_line
from sparseffn_jax.checkpoints.untrusted import read_json
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.models.families import family

# The file in a sparse model's folder by which transformers loads it.
MODELING = "modeling_sparseffn.py"
_CODE = resources.files("sparseffn_jax") / "assets" / MODELING
_PREFIX = "sparseffn_"
_SIZES = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")


def read_config(folder: Path) -> tuple[Any, tuple[SparseFFNConfig | None, ...]]:
    """Reads a folder's config, of the family's class, and the configs of its sparse FFNs.

    Returns:
      The config; and one entry a layer, ``None`` where it is dense, or nothing if all layers are.

    Raises:
      CheckpointError: if the file is not there or not such a config.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json: give a model folder as transformers'")
    values = read_json(file)
    if is_sparse(values):
        values["model_type"] = values["model_type"].removeprefix(_PREFIX)
        values.pop("auto_map", None)
    decoder = known_family(values.get("model_type"), str(file))
    sparse_ffn = values.pop("sparse_ffn", None)
    config = make_config(decoder, values, str(file))
    return config, _read_ffns(sparse_ffn, config.num_hidden_layers, file)


def is_sparse(values: Mapping[str, Any]) -> bool:
    """Tells whether a config has the ``model_type`` of a sparse model.

    Args:
      values: what ``config.json`` holds.
    """
    model_type = values.get("model_type")
    return isinstance(model_type, str) and model_type.startswith(_PREFIX)


def modeling_code(model: Decoder) -> str | None:
    """Returns the Python file by which transformers loads a sparse model of this family, if any."""
    code = _CODE.read_text(encoding="utf-8")
    return code if f"class {_sparse_class(model)}(" in code else None


def make_config(decoder: type[Decoder], values: dict[str, Any], where: str) -> Any:
    """Returns a config of a family's class, whose sizes are positive integers.

    Args:
      decoder: the family.
      values: the config's values, under transformers' keys.
      where: what names their file in an error.

    Raises:
      CheckpointError: if they are not such a config's.
    """
    try:
        config = decoder.config_class.from_dict(values)
    # What transformers raises for a wrong field differs from version to version.
    except Exception as error:
        raise CheckpointError(
            f"{where} is not a config for transformers: {one_line(error)}"
        ) from error
    optional = (decoder.d_ff_key, *_OPTIONAL_SIZES)
    for name in (*_SIZES, *optional):
        size = getattr(config, name, None)
        if size is None and name in optional:
            continue
        if not isinstance(size, int) or size < 1:
            name = config.attribute_map.get(name, name)
            raise CheckpointError(f"{where} has {name}={size!r}: expected a positive integer")
    return config


def known_family(model_type: Any, where: str) -> type[Decoder]:
    """Returns the class of a model family.

    Raises:
      CheckpointError: if it is not known; the message says that ``where`` names it.
    """
    try:
        return family(model_type)
    except ValueError as error:
        raise CheckpointError(f"{where} has {error}") from error


def config_json(model: Decoder, dtypes: Collection[str]) -> str:
    """Returns a model's ``config.json``.

    Args:
      model: the model, whose FFNs are dense or ``SparseFFNConfig``s.
      dtypes: the names of its parameters' dtypes; if it is one, the file names it.

    Raises:
      CheckpointError: if an FFN is of another kind.
    """
    values = json.loads(model.config.to_json_string())
    for key in ("architectures", "dtype", "torch_dtype"):
        values.pop(key, None)
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
        values["model_type"] = _PREFIX + model.config.model_type
        if modeling_code(model) is not None:
            module, name = MODELING.removesuffix(".py"), _sparse_class(model)
            values["architectures"] = [name]
            values["auto_map"] = {
                "AutoConfig": f"{module}.Sparse{type(model.config).__name__}",
                "AutoModelForCausalLM": f"{module}.{name}",
            }
    else:
        values["architectures"] = [type(model).__name__]
    return json.dumps(values, indent=2) + "\n"


def _sparse_class(model: Decoder) -> str:
    return f"Sparse{type(model).__name__}"


def _read_ffns(entries: Any, n_layer: int, file: Path) -> tuple[SparseFFNConfig | None, ...]:
    if entries is None:
        return ()
    if not isinstance(entries, list) or len(entries) != n_layer:
        raise CheckpointError(
            f"{file}: sparse_ffn must be a list with one entry for each of n_layer={n_layer}"
        )
    ffns = []
    for i, entry in enumerate(entries):
        try:
            ffns.append(None if entry is None else SparseFFNConfig.from_dict(entry))
        except ValueError as error:
            raise CheckpointError(f"{file}: sparse_ffn[{i}]: {error}") from error
    return tuple(ffns)
