"""Writes sparse models that narrower dense FFNs can stand for as standard checkpoints."""

import copy
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.folders import PathLike
from sparseffn_jax.checkpoints.pretrained import save_pretrained
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.decoder import (
    FFN,
    FFN_NAME,
    Decoder,
    Dtype,
    layers_of,
    replace_ffns,
)
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.ops.masks import BlockMask, decompress


def export_dense(
    folder: PathLike,
    model: Decoder,
    params: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes a model as a checkpoint that anything can load that loads its model family.

    Every layer must be dense, or a SparseFFN of a core alone whose masks, if any, are whole rows
    and columns; and all must have one width, which the config then names (``n_inner``,
    ``intermediate_size``). Units that a mask of the output weights drops are left out.

    Args:
      folder: the folder to write, whose parents are made.
      model: a model whose layers are dense in this sense.
      params: the model's parameter tree.
      tokenizer: a transformers tokenizer, or a folder to copy tokenizer files from.
      dtype: the dtype that the parameters are cast to; ``None`` keeps theirs.
      overwrite: whether a model folder of that name is replaced, with all that is in it.
      max_shard_size: the most bytes of one file; a larger model is written in shards with an index.

    Raises:
      CheckpointError: if a layer is not dense in this sense (the message says which, and why), or
        the folder cannot be written.

    Example:
      >>> import tempfile
      >>> import sparseffn_jax as sf
      >>> pretrained = sf.load_pretrained(sf.EMBEDDED_MODEL)
      >>> folder = tempfile.mkdtemp() + "/dense"
      >>> sf.export_dense(folder, pretrained.model(), pretrained.params)
      >>> sf.load_pretrained(folder).ffns
      ()
    """
    dense_model, dense_params = to_dense(model, params)
    save_pretrained(
        folder,
        dense_model,
        dense_params,
        tokenizer=tokenizer,
        dtype=dtype,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
    )


def to_dense(model: Decoder, params: Mapping[str, Any]) -> tuple[Decoder, dict[str, Any]]:
    """Returns the dense model, of narrower FFNs if need be, that computes the same.

    Raises:
      CheckpointError: if a layer is not dense as :func:`export_dense` asks.
    """
    spec = model.spec
    ffns = model.ffns or (None,) * spec.n_layer
    reasons = {i: why for i, ffn in enumerate(ffns) if (why := _why_not_dense(ffn, spec))}
    if reasons:
        raise CheckpointError(
            "this model cannot be written as a dense one: "
            + "; ".join(f"layer {i} has {why}" for i, why in reasons.items())
            + ". Save it with save_pretrained instead"
        )
    layers = layers_of(model, params)
    narrow = {
        i: _dense_leaves(model, ffn, layers[i][FFN_NAME])
        for i, ffn in enumerate(ffns)
        if isinstance(ffn, SparseFFNConfig)
    }
    down = model.ffn_layout.down
    axis = 1 if model.ffn_layout.transposed else 0
    widths = {
        i: narrow[i][down]["kernel"].shape[axis] if i in narrow else spec.d_ff
        for i in range(spec.n_layer)
    }
    if len(set(widths.values())) > 1:
        raise CheckpointError(
            "this model cannot be written as a dense one, whose layers all have one width: "
            + ", ".join(f"layer {i} has {width} units" for i, width in widths.items())
        )
    config = copy.deepcopy(model.config)
    setattr(config, model.d_ff_key, widths[0])
    return model.clone(config=config, ffns=()), replace_ffns(model, params, narrow)


def _why_not_dense(ffn: FFN, spec: DecoderSpec) -> str | None:
    if ffn is None:
        return None
    if not isinstance(ffn, SparseFFNConfig):
        return f"an FFN of your own, {ffn!r}"
    if ffn.spectral is not None or ffn.micro is None or ffn.micro.core is None:
        return "a spectral branch"
    if ffn.micro.corrections:
        return "linear corrections"
    masks = (ffn.micro.core.up_mask, ffn.micro.core.down_mask)
    if not all(mask is None or mask.is_structured for mask in masks):
        return "a core with an unstructured mask"
    if ffn.gated != spec.gated:
        return "a gate" if ffn.gated else "no gate"
    if ffn.bias != spec.ffn_bias:
        return "biases, for which its family has no place" if ffn.bias else "no biases"
    return None


def _dense_leaves(model: Decoder, ffn: SparseFFNConfig, leaves: Mapping[str, Any]) -> Any:
    layout, core = model.ffn_layout, ffn.micro and ffn.micro.core
    assert core is not None
    core = core.without_dead_units()
    kept = np.ones(core.width, bool)
    if (mask := core.down_mask) is not None:
        kept = np.repeat(np.isin(np.arange(mask.grid[0]), mask.live_rows), mask.block_shape[0])

    def linear(weight: np.ndarray, bias: np.ndarray | None) -> dict[str, Any]:
        kernel = {"kernel": jnp.asarray(weight.T if layout.transposed else weight)}
        return kernel if bias is None else {**kernel, "bias": jnp.asarray(bias)}

    weights = leaves["core"]
    dense = {
        layout.down: linear(
            _whole(weights["down"]["kernel"], core.down_mask)[kept], leaves.get("bias")
        )
    }
    for name, theirs in zip(ffn.up_maps, layout.up_maps, strict=True):
        weight = _whole(weights[name]["kernel"], core.up_mask)
        bias = weights[name].get("bias")
        dense[theirs] = linear(weight[:, kept], bias if bias is None else np.asarray(bias)[kept])
    return dense


def _whole(kernel: Any, mask: BlockMask | None) -> np.ndarray:
    return np.asarray(kernel if mask is None else decompress(jnp.asarray(kernel), mask))
