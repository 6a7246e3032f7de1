"""Writes sparse models that narrower dense FFNs can stand for as standard checkpoints."""

import copy
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from sparseffn_jax.checkpoints.dense_ffn import (
    Maps,
    dense_leaves,
    dense_maps,
    dense_width,
    needs_biases,
    why_not_dense,
)
from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.folders import PathLike
from sparseffn_jax.checkpoints.matching import match
from sparseffn_jax.checkpoints.pretrained import save_pretrained
from sparseffn_jax.checkpoints.weights import in_memory, read_leaves
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.decoder import FFN_NAME, Decoder, Dtype, layers_of, replace_ffns


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

    Every layer must be dense, or a SparseFFN of a core whose masks, if any, are whole rows and
    columns, alone or beside a low-rank bypass; and all must have one width, which the config then
    names (``n_inner``, ``intermediate_size``). Units that a mask of the output weights drops are
    left out. A component of a bypass becomes a unit of a gated FFN, which needs biases
    (``mlp_bias``), and two units of another.

    Args:
      folder: the folder to write, whose parents are made.
      model: a model whose layers are dense in this sense.
      params: the model's parameter tree.
      tokenizer: a transformers tokenizer, or a folder to copy tokenizer files from.
      dtype: the dtype that the parameters are cast to; ``None`` keeps theirs.
      overwrite: whether a model folder of that name is replaced, with all that is in it.
      max_shard_size: the most bytes of one file; a larger model is written in shards with an index.

    Raises:
      CheckpointError: if a layer is not dense in this sense (the message says which, and why), if
        the parameters do not fit ``dtype``, or the folder cannot be written.

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
    biased = copy.deepcopy(model.config)
    if model.ffn_bias_key is not None:
        setattr(biased, model.ffn_bias_key, True)
    # What inherits the key need not heed it.
    dense = dense_layers(model, params, takes_biases=model.spec_of(biased).ffn_bias)
    if len(set(dense.widths)) > 1:
        raise CheckpointError(
            "this model cannot be written as a dense one, whose layers all have one width: "
            + ", ".join(f"layer {i} has {width} units" for i, width in enumerate(dense.widths))
        )
    config = biased if dense.biased[0] else copy.deepcopy(model.config)
    setattr(config, model.d_ff_key, dense.widths[0])
    return model.clone(config=config, ffns=()), dense.params


class DenseLayers(NamedTuple):
    """A model whose FFNs are all dense, but need not be alike.

    Attributes:
      widths: the number of hidden units of each layer.
      biased: whether its FFN has biases, for each layer.
      params: the parameter tree. FFNs that were not there before are computed when they are read.
    """

    widths: tuple[int, ...]
    biased: tuple[bool, ...]
    params: dict[str, Any]


def dense_layers(model: Decoder, params: Mapping[str, Any], *, takes_biases: bool) -> DenseLayers:
    """Returns the dense layers that compute the same as a model's.

    If they have one width, all have biases as soon as one needs them.

    Args:
      model: a model whose layers are dense as :func:`export_dense` asks, of any widths.
      params: its parameters, in memory or loaded on demand.
      takes_biases: whether FFNs may have biases although the family's own have none.

    Raises:
      CheckpointError: if a layer is not dense in this sense, or ``params`` are not the model's.
    """
    match(in_memory(params), model, "the model's config", are_leaves=True)
    spec = model.spec
    ffns = model.ffns or (None,) * spec.n_layer
    may = takes_biases or spec.ffn_bias
    reasons = {i: why for i, ffn in enumerate(ffns) if (why := why_not_dense(ffn, spec, may))}
    if reasons:
        raise CheckpointError(
            "this model cannot be written as a dense one: "
            + "; ".join(f"layer {i} has {why}" for i, why in reasons.items())
            + ". Save it with save_pretrained instead, or make one with convert --servable"
        )
    configs = [ffn if isinstance(ffn, SparseFFNConfig) else None for ffn in ffns]
    widths = tuple(spec.d_ff if ffn is None else dense_width(ffn) for ffn in configs)
    biased = [spec.ffn_bias if ffn is None else needs_biases(ffn) for ffn in configs]
    if len(set(widths)) == 1:
        biased = [any(biased)] * len(biased)
    unread = [layer[FFN_NAME] for layer in layers_of(model, params)]

    # The parameters of a layer are asked for one after the other; those of all layers would be a
    # second copy of them.
    @functools.lru_cache(maxsize=1)
    def maps(layer: int) -> Maps:
        config, leaves = configs[layer], read_leaves(unread[layer])
        return leaves if config is None else dense_maps(config, leaves, model.ffn_layout)

    dense = {
        i: dense_leaves(
            functools.partial(maps, i),
            model.ffn_layout,
            (spec.d_model, widths[i]),
            biased[i],
            jax.tree.leaves(unread[i])[0].dtype,
        )
        for i, ffn in enumerate(configs)
        if ffn is not None or biased[i] != spec.ffn_bias
    }
    return DenseLayers(widths, tuple(biased), replace_ffns(model, params, dense))
