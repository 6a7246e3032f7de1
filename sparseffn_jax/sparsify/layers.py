"""Replaces FFNs layer by layer, whatever they are replaced by.

It is the one place that knows in which order layers are fitted and what is in memory meanwhile;
what a layer becomes is said by the caller.
"""

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseffn_jax.checkpoints.weights import Tensor, read_leaves
from sparseffn_jax.defaults import REPAIR
from sparseffn_jax.measure.memory import trim_heap
from sparseffn_jax.models.decoder import (
    FFN_NAME,
    Decoder,
    Dtype,
    ffn_module,
    layers_of,
    replace_ffns,
)
from sparseffn_jax.sparsify.dense import DenseFFN
from sparseffn_jax.sparsify.partial import PartialConversion
from sparseffn_jax.sparsify.streams import LayerActivations, Place, Streams

# Called with a layer's number, its dense FFN and its activations; returns its entry in
# :attr:`Decoder.ffns` and float32 parameters.
LayerFit = Callable[[int, DenseFFN, LayerActivations], tuple[Any, Any]]


class ConvertedLayer(NamedTuple):
    """What became of one layer.

    Attributes:
      layer: its number.
      error: squared error of its FFN on the targets, over the targets' variance.
      seconds: time that it took.
    """

    layer: int
    error: float
    seconds: float


def convert_layers(
    model: Decoder,
    params: Mapping[str, Any],
    layers: Collection[int],
    fit: LayerFit,
    calibration: Int[np.ndarray, "n t"],
    *,
    repair: float = REPAIR,
    batch_size: int = 8,
    stream_dtype: Dtype = np.float32,
    place: Place = jnp.asarray,
    partial: PartialConversion | None = None,
    on_layer: Callable[[ConvertedLayer], None] | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """Replaces dense FFNs from the first layer to the last.

    Args:
      model: a decoder in which the layers to be replaced are dense.
      params: parameters of the decoder, in memory or loaded on demand; they are not changed.
      layers: numbers of the layers to be replaced.
      fit: function that is called with a layer's number, its dense FFN and its activations, and
        returns its entry in :attr:`Decoder.ffns` and float32 parameters.
      calibration: token ids (n, t).
      repair: share, from 0 to 1, of what the layers before have lost that a layer makes up for.
      batch_size: number of windows in one forward pass.
      stream_dtype: dtype of the residual streams in host memory.
      place: function that puts a batch of windows, or a chunk of tokens, on the devices.
      partial: the layers that an earlier, stopped call has replaced, to which this one adds; all
        of them must have become SparseFFNs.
      on_layer: function that is called after each replaced layer.

    Returns:
      The model and its parameters; the leaves of a replaced FFN have the dtype of those of the
      dense one. They are loaded on demand too if those were and ``partial`` keeps them.

    Raises:
      ValueError: if ``repair`` is not between 0 and 1, or activations or weights are not finite.
    """
    (converted,) = _convert(
        model,
        params,
        [_Conversion(model, layers, fit, partial)],
        calibration,
        repair=repair,
        batch_size=batch_size,
        stream_dtype=stream_dtype,
        place=place,
        on_layer=on_layer,
    )
    return converted


def convert_side_by_side(
    model: Decoder,
    params: Mapping[str, Any],
    conversions: Sequence[tuple[Collection[int], LayerFit]],
    calibration: Int[np.ndarray, "n t"],
    *,
    repair: float = REPAIR,
    batch_size: int = 8,
    on_layer: Callable[[ConvertedLayer], None] | None = None,
) -> list[tuple[Decoder, dict[str, Any]]]:
    """Converts one model in several ways at once, for which the dense model is run once.

    Args:
      model: as in :func:`convert_layers`.
      params: as in :func:`convert_layers`.
      conversions: ``layers`` and ``fit`` of each, as in :func:`convert_layers`.
      calibration: as in :func:`convert_layers`.
      repair: as in :func:`convert_layers`.
      batch_size: as in :func:`convert_layers`.
      on_layer: function that is called after each layer that a conversion has replaced.

    Returns:
      For each conversion the model and its parameters.
    """
    started = [_Conversion(model, layers, fit, None) for layers, fit in conversions]
    how = {"repair": repair, "batch_size": batch_size, "on_layer": on_layer}
    return _convert(model, params, started, calibration, **how)


def _convert(
    model: Decoder,
    params: Mapping[str, Any],
    conversions: Sequence["_Conversion"],
    calibration: Int[np.ndarray, "n t"],
    *,
    repair: float,
    batch_size: int,
    stream_dtype: Dtype = np.float32,
    place: Place = jnp.asarray,
    on_layer: Callable[[ConvertedLayer], None] | None,
) -> list[tuple[Decoder, dict[str, Any]]]:
    if not 0.0 <= repair <= 1.0:
        raise ValueError(f"repair={repair} must be between 0 and 1")
    streams = Streams(
        model,
        outer_params(model, params),
        calibration,
        batch_size=batch_size,
        dtype=stream_dtype,
        place=place,
        conversions=len(conversions),
    )
    behind = max(conversion.go_on(streams) for conversion in conversions)
    for i, unread in enumerate(layers_of(model, params)):
        started = time.perf_counter()
        # What a call has read and computed is let go before the next layer is read: weights that
        # are loaded on demand need not fit into memory.
        if i > behind:
            _convert_layer(i, read_leaves(unread), conversions, streams, repair)
        for conversion in conversions:
            if i not in conversion.layers:
                continue
            if i <= behind:
                conversion.take_over(i, read_leaves(unread[FFN_NAME]))
            if any(isinstance(leaf, Tensor) for leaf in jax.tree.leaves(unread)):
                # What need not fit into memory before need not after.
                conversion.leave_on_disk(i)
            if on_layer is not None:
                on_layer(ConvertedLayer(i, conversion.errors[i], time.perf_counter() - started))
    return [
        (conversion.model, replace_ffns(model, params, conversion.replaced))
        for conversion in conversions
    ]


def _convert_layer(
    i: int,
    layer: Any,
    conversions: Sequence["_Conversion"],
    streams: Streams,
    repair: float,
) -> None:
    """Takes the streams through a layer that they have not reached yet."""
    # Each stage needs blocks of other sizes than the one before.
    trim_heap()
    replaced = [i in conversion.layers for conversion in conversions]
    found = streams.reach(i, layer, repair, replaced)
    for number, conversion in enumerate(conversions):
        activations, found[number] = found[number], None
        if activations is None:
            continue
        trim_heap()
        ffn = conversion.convert(i, layer[FFN_NAME], activations)
        conversion.errors[i] = streams.leave(activations, layer, ffn, number)
        conversion.save_streams(i, streams)


class _Conversion:
    """A model whose FFNs are being replaced, one after the other.

    Attributes:
      layers: numbers of the layers to be replaced.
      model: the model as it is so far.
      replaced: parameters of the FFNs that were replaced, by layer.
      errors: squared error of each of them on its targets, over the targets' variance.
    """

    def __init__(
        self,
        model: Decoder,
        layers: Collection[int],
        fit: LayerFit,
        partial: PartialConversion | None = None,
    ):
        self.layers = layers
        self.model = model.clone(ffns=model.ffns or (None,) * model.spec.n_layer)
        self.replaced: dict[int, Any] = {}
        self.errors: dict[int, float] = {}
        self._fit, self._partial = fit, partial

    def go_on(self, streams: Streams) -> int:
        """Returns the last layer that a stopped conversion has left behind; -1 if there is none."""
        if self._partial is None:
            return -1
        if (kept := self._partial.load_streams(self.layers, *streams.kind)) is None:
            return -1
        layer, state, self.errors = kept
        streams.restore(state)
        return layer

    def convert(
        self, i: int, mlp: Any, activations: LayerActivations
    ) -> Callable[[Float[Array, "c d"]], Float[Array, "c d"]]:
        """Replaces the FFN of a layer, and returns what replaces it."""
        found = None if self._partial is None else self._partial.load(i, mlp)
        if found is None:
            dense = DenseFFN.from_params(mlp, self.model.ffn_layout, self.model.spec.activation)
            ffn, leaves = self._fit(i, dense, activations)
            found = ffn, _cast_like(leaves, mlp, i)
            if self._partial is not None:
                self._partial.save(i, mlp, *found)
        leaves = self._use(i, mlp, *found)
        module = ffn_module(self.model, i).clone(name=None)
        return functools.partial(compiled_ffn(module), {"params": leaves})

    def save_streams(self, i: int, streams: Streams) -> None:
        """Keeps the streams behind a layer that was replaced."""
        if self._partial is not None:
            self._partial.save_streams(i, streams.state(), self.errors)

    def take_over(self, i: int, mlp: Any) -> None:
        """Replaces the FFN of a layer that a stopped conversion has left behind."""
        assert self._partial is not None
        found = self._partial.load(i, mlp)
        assert found is not None
        self._use(i, mlp, *found)

    def leave_on_disk(self, i: int) -> None:
        """Lets go of a layer's parameters where they are kept on the disk."""
        if self._partial is not None:
            self.replaced[i] = self._partial.on_demand(i)

    def _use(self, i: int, mlp: Any, ffn: Any, leaves: Any) -> Any:
        # Where the dense ones lay, so that what is called with them does not send them each time.
        if isinstance(jax.tree.leaves(mlp)[0], jax.Array):
            leaves = jax.tree.map(jnp.asarray, leaves)
        ffns = self.model.ffns
        self.model = self.model.clone(ffns=(*ffns[:i], ffn, *ffns[i + 1 :]))
        self.replaced[i] = leaves
        return leaves


def outer_params(model: Decoder, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of the body that are no layer's: what embeds tokens, and the norm."""
    body, collection = model.layer_path
    outer = {name: leaves for name, leaves in params[body].items() if name != collection}
    return {body: read_leaves(outer)}


@functools.lru_cache(maxsize=8)
def compiled_ffn(module: nn.Module) -> Callable[..., Any]:
    """Returns ``module.apply``, compiled once for all layers of one configuration."""
    return jax.jit(module.apply)


def _cast_like(leaves: Any, mlp: Any, layer: int) -> Any:
    dtype = jax.tree.leaves(mlp)[0].dtype
    cast = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), leaves)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(cast)):
        raise ValueError(f"what layer {layer} was fitted to is not finite in {dtype}")
    return cast
