"""Loads and saves models: Hugging Face folders, names on the Hub, GGUF files and live Flax models.

Models are read from safetensors (https://huggingface.co/docs/safetensors) and from Flax's msgpack
(``flax.serialization``), in one file or in shards with an index, and from GGUF files
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). They are written as safetensors in
PyTorch's names and layouts, so that transformers loads a dense model as its own. Pickle files are
never opened.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError

from sparseffn_jax.checkpoints.adapters import adapted, load_adapter
from sparseffn_jax.checkpoints.configs import (
    MODELING,
    config_json,
    known_family,
    modeling_code,
    read_config,
)
from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.folders import (
    CARD,
    PathLike,
    check_replaceable,
    find_folder,
    find_gguf,
    replacing,
)
from sparseffn_jax.checkpoints.gguf_model import open_gguf
from sparseffn_jax.checkpoints.layout import split_fused, to_pytorch
from sparseffn_jax.checkpoints.matching import Match, match
from sparseffn_jax.checkpoints.tokenizers import write_tokenizer
from sparseffn_jax.checkpoints.untrusted import check_sizes
from sparseffn_jax.checkpoints.weights import (
    Tensor,
    Weights,
    check_dtype,
    in_memory,
    open_weights,
    write_safetensors,
)
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.decoder import Decoder, Dtype
from sparseffn_jax.models.families import family
from sparseffn_jax.models.spec import DecoderSpec

# Says for a leaf's path, such as ("model", "norm", "weight"), and shape where it is to lie.
Placement = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding | None]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that was loaded.

    Attributes:
      config: the model's config, of transformers' class.
      params: the parameter tree, which is that of transformers' Flax class but for the ``mlp`` of
        sparse layers.
      ffns: one entry for each layer, ``None`` where it is dense; empty if every layer is dense.
      folder: the folder that it was read from, where tokenizer files may be too; ``None`` for a
        GGUF file or a live model.

    Example:
      >>> import sparseffn_jax as sf
      >>> pretrained = sf.load_pretrained(sf.EMBEDDED_MODEL)
      >>> type(pretrained.model()).__name__, pretrained.spec.n_layer, pretrained.ffns
      ('GPT2LMHeadModel', 3, ())
    """

    config: Any
    params: dict[str, Any]
    ffns: tuple[SparseFFNConfig | None, ...] = ()
    folder: Path | None = None

    def __repr__(self) -> str:
        spec, sparse = self.spec, sum(ffn is not None for ffn in self.ffns)
        where = "" if self.folder is None else f", from {self.folder}"
        return (
            f"Pretrained({self.config.model_type}, {spec.n_layer} layers of d_model="
            f"{spec.d_model} and d_ff={spec.d_ff}, {sparse} of them sparse{where})"
        )

    @property
    def spec(self) -> DecoderSpec:
        """What the config says, under names that are the same in all model families."""
        return family(self.config.model_type).spec_of(self.config)

    def model(self, dtype: Dtype = jnp.float32, remat: bool = False) -> Decoder:
        """Returns the :class:`Decoder` that ``params`` belong to, which computes in ``dtype``.

        ``remat`` makes it compute each block again in the backward pass, to save memory.
        """
        return family(self.config.model_type)(self.config, self.ffns, dtype=dtype, remat=remat)


def load_pretrained(
    source: Any,
    *,
    param_dtype: Dtype | None = jnp.float32,
    sharding: Placement | None = None,
    on_demand: bool = False,
    adapter: PathLike | None = None,
) -> Pretrained:
    """Loads a model's config and parameters.

    Tensors stream in one by one, each straight into its dtype and place, so that host memory
    holds little more than what is kept. Every name and shape is checked against the config, and
    every size against the files', before the first tensor is read; no weight may be NaN or
    infinite.

    Args:
      source: a folder with ``config.json`` and ``model.safetensors`` or ``flax_model.msgpack``,
        either in one file or in shards with a ``.index.json``; the name of such a model on the
        Hugging Face Hub; a GGUF file, named ``*.gguf``, of any family but GPT-J (a Mistral is read
        as a LLaMA, without a sliding window), whole or quantised, for which the extra ``gguf`` must
        be installed, and in which layers that are narrower than others are read as sparse ones; a
        live ``FlaxPreTrainedModel``; or a pair ``(config, params)``. Arrays of live models are
        shared, not copied, where their dtype stays.
      param_dtype: the dtype of the parameters; ``None`` keeps the checkpoint's, which is float32
        for what is quantised.
      sharding: a function of each leaf's path, such as ``("model", "norm", "weight")``, and shape
        that returns where the leaf is to lie, or ``None`` for the default device.
      on_demand: whether each leaf stays in its file until it is needed, so that a model that does
        not fit into memory can be converted: leaves are then objects that
        :func:`sparseffn_jax.sparsify` and :func:`save_pretrained` take in place of arrays, and
        nothing else does. Values are checked when they are read.
      adapter: LoRA adapters to merge into the weights in float32: a folder that peft or
        :func:`save_adapter` has written, or the name of one on the Hub.

    Raises:
      CheckpointError: if the source is not there, damaged, of another kind than its config says,
        or of a model family that is not known, if reading it needs an extra that is missing, or if
        the adapter is none for this model.

    Example:
      >>> import sparseffn_jax as sf
      >>> pretrained = sf.load_pretrained(sf.EMBEDDED_MODEL)
      >>> pretrained.params["transformer"]["wte"]["embedding"].shape
      (1024, 256)
    """
    folder, ffns, where = None, (), "the config"
    if not isinstance(source, str | os.PathLike):
        config, weights = _open_live(source)
    else:
        if (file := find_gguf(source)) is not None:
            (config, ffns, weights), where = open_gguf(file), str(file)
        else:
            folder = find_folder(source)
            config, ffns = read_config(folder)
            weights, where = open_weights(folder), str(folder / "config.json")
        sides = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}
        check_sizes(config.num_hidden_layers, sides, weights.shapes, where)
    decoder = known_family(getattr(config, "model_type", None), where)
    weights = split_fused(weights, decoder.names, config)
    matched = match(weights, model := decoder(config, ffns), where)
    if adapter is not None:
        weights = adapted(weights, matched, load_adapter(adapter, model), param_dtype)
    read = _on_demand if on_demand else _read
    return Pretrained(config, read(weights, matched, param_dtype, sharding), ffns, folder)


def save_pretrained(
    folder: PathLike,
    model: Decoder,
    params: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5_000_000_000,
    card: str | None = None,
) -> None:
    """Writes a model as a folder that :func:`load_pretrained` reads back bit for bit.

    The folder holds ``config.json``, for a sparse model with a key ``sparse_ffn`` (a list with
    ``null`` or a ``SparseFFNConfig`` for each layer), and ``model.safetensors``; for a sparse model
    also the classes by which transformers' ``AutoModelForCausalLM`` loads it with
    ``trust_remote_code=True``. It appears under its name only when it is complete.

    Args:
      folder: the folder to write, whose parents are made.
      model: the model whose config and ``ffns`` are saved.
      params: the model's parameter tree.
      tokenizer: a transformers tokenizer, or a folder to copy tokenizer files from.
      dtype: the dtype that the parameters are cast to; ``None`` keeps theirs.
      overwrite: whether a model folder of that name is replaced, with all that is in it.
      max_shard_size: the most bytes of one file; a larger model is written in shards with an index.
      card: the text of ``README.md``, which the Hugging Face Hub shows; ``None`` writes none.

    Raises:
      CheckpointError: if the folder cannot be written or holds something already, if ``params``
        are not the model's or do not fit ``dtype``, or if a layer's FFN is neither dense nor a
        ``SparseFFNConfig``.

    Example:
      >>> import tempfile
      >>> import sparseffn_jax as sf
      >>> pretrained = sf.load_pretrained(sf.EMBEDDED_MODEL)
      >>> folder = tempfile.mkdtemp() + "/model"
      >>> sf.save_pretrained(
      ...     folder, pretrained.model(), pretrained.params, tokenizer=sf.EMBEDDED_MODEL
      ... )
      >>> sf.load_pretrained(folder).spec == pretrained.spec
      True
    """
    check_dtype(dtype)
    target = Path(folder).expanduser().resolve()
    weights = in_memory(params)
    match(weights, model, "the model's config", are_leaves=True)
    stored = {np.dtype(dtype or tensor.dtype).name for tensor in weights.tensors.values()}
    config = config_json(model, stored)
    try:
        check_replaceable(target, overwrite)
        with replacing(target) as staging:
            (staging / "config.json").write_text(config, encoding="utf-8")
            if any(model.ffns) and (code := modeling_code(model)) is not None:
                (staging / MODELING).write_text(code, encoding="utf-8")
            tensors = to_pytorch(weights, model.names)
            write_safetensors(staging, tensors, dtype, max_shard_size)
            write_tokenizer(staging, tokenizer)
            if card is not None:
                (staging / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


def _open_live(source: Any) -> tuple[Any, Weights]:
    if hasattr(source, "config") and hasattr(source, "params"):
        config, params = source.config, source.params
    elif isinstance(source, tuple) and len(source) == 2:
        config, params = source
    else:
        raise CheckpointError(
            f"cannot load a model from a {type(source).__name__}: expected a folder, a hub name, "
            "a FlaxPreTrainedModel or a pair (config, params)"
        )
    return config, in_memory(params)


def _read(
    weights: Weights, matched: Match, dtype: Dtype | None, sharding: Placement | None
) -> dict[str, Any]:
    leaves: dict[str, jax.Array] = {}
    tensors = dict(weights.tensors)
    # The largest first, while there is room for its stored form too.
    for name in sorted(tensors, key=lambda name: -math.prod(tensors[name].shape)):
        # Taken out, so that a tensor's stored form is let go before the next one is read.
        tensor = tensors.pop(name)
        path, transposed = matched.places[name]
        if path in matched.leaves:
            array = tensor.read()
            where = sharding and sharding(tuple(path.split(".")), matched.leaves[path])
            leaves[path] = _place(array.T if transposed else array, dtype, where)
    return unflatten_dict({path: leaves[path] for path in matched.leaves}, sep=".")


def _on_demand(
    weights: Weights, matched: Match, dtype: Dtype | None, sharding: Placement | None
) -> dict[str, Any]:
    """Returns what :func:`_read` does, with a :class:`Tensor` for each leaf."""

    def leaf(path: str, tensor: Tensor, transposed: bool) -> Tensor:
        where = sharding and sharding(tuple(path.split(".")), matched.leaves[path])

        def read() -> jax.Array:
            array = tensor.read()
            return _place(array.T if transposed else array, dtype, where)

        name = tensor.dtype if dtype is None else np.dtype(dtype).name
        return Tensor(tensor.where, matched.leaves[path], name, read)

    leaves = {
        path: leaf(path, tensor, transposed)
        for name, tensor in weights.tensors.items()
        for path, transposed in (matched.places[name],)
        if path in matched.leaves
    }
    return unflatten_dict({path: leaves[path] for path in matched.leaves}, sep=".")


def _place(
    array: np.ndarray | jax.Array, dtype: Dtype | None, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array, dtype)
    # Not by way of the default device, which may be too small for the whole.
    return jax.device_put(array if dtype is None else array.astype(dtype), sharding)
