"""Takes calibration text through a stack, one layer at a time.

Token streams stand side by side: the residual stream of the dense model, and that of the model
whose layers so far have been replaced; or those of several such models, for which the dense one is
computed once. A layer is fitted when all have reached it, and all go on through it. Nothing but the
streams and one layer's inputs and targets is ever held for the whole text.

Fitting a layer on the inputs that the replaced prefix really gives it, and to a target that undoes
part of what the prefix did, is sequential layer-wise reconstruction as in Frantar & Alistarh 2023
(SparseGPT, 2301.00774) with the residual stream's error added to the target.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseffn_jax.measure.memory import CheckedJit, free_host_bytes, halves, shortage
from sparseffn_jax.models.decoder import Decoder, Dtype, block_module

# Tokens of a layer's activations that are on the device at once.
CHUNK = 2048
Place = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class LayerActivations:
    """What one FFN receives on the calibration text, and what its replacement should return.

    Attributes:
      x: inputs (n, d_model), in host memory.
      target: outputs (n, d_model), in host memory.
      place: function that puts a chunk of tokens on the devices.
    """

    x: Float[np.ndarray, "n d"]
    target: Float[np.ndarray, "n d"]
    place: Place = jnp.asarray

    @functools.cached_property
    def variance(self) -> float:
        """Variance of the targets, summed over channels; never zero."""
        mean, squares = self.target.mean(0, dtype=np.float32), 0.0
        for start in range(0, len(self.target), CHUNK):
            squares += float(np.sum(np.square(self.target[start : start + CHUNK] - mean)))
        return max(squares / len(self.target), float(np.finfo(np.float32).tiny))

    def chunks(self) -> Iterator[tuple[Float[Array, "c d"], Float[Array, "c d"]]]:
        """Yields inputs and targets of some tokens at a time, in float32 on the devices."""
        for start in range(0, len(self.x), CHUNK):
            rows = slice(start, start + CHUNK)
            yield self.rows(rows)

    def sample(self, count: int) -> tuple[Float[Array, "c d"], Float[Array, "c d"]]:
        """Returns inputs and targets of about ``count`` tokens from all over the text."""
        return self.rows(slice(None, None, max(1, len(self.x) // count)))

    def rows(self, rows: Any) -> tuple[Float[Array, "c d"], Float[Array, "c d"]]:
        """Returns inputs and targets of the chosen tokens, in float32 on the devices."""
        return tuple(
            self.place(np.asarray(part[rows], np.float32)) for part in (self.x, self.target)
        )


class Streams:
    """The residual streams of one conversion or several, all before the same layer.

    Attributes:
      model: the dense model, whose precision is that of the computation.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        tokens: Int[np.ndarray, "n t"],
        *,
        batch_size: int,
        dtype: Dtype = np.float32,
        place: Place = jnp.asarray,
        conversions: int = 1,
    ):
        """Embeds the text.

        Args:
          model: the dense model.
          params: its parameters; only what embeds tokens is read.
          tokens: token ids.
          batch_size: number of windows in one forward pass.
          dtype: what the streams are stored in.
          place: function that puts a batch of windows on the devices.
          conversions: number of conversions.

        Raises:
          MemoryError: if the streams and one layer's activations do not fit into host memory.
        """
        # The dense stream, and for each conversion its own and a layer's inputs and targets.
        arrays = 1 + 3 * conversions
        needed = arrays * tokens.size * model.spec.d_model * np.dtype(dtype).itemsize
        what = f"a conversion on {tokens.size:,} tokens"
        if lacking := shortage(needed, free_host_bytes(), what):
            raise MemoryError(f"{lacking}: lower the number of calibration tokens")
        self.model, self._place = model, place
        self._batches = [
            slice(start, start + batch_size) for start in range(0, len(tokens), batch_size)
        ]
        embed = jax.jit(lambda params, ids: model.apply({"params": params}, ids, method="embed"))
        shape = (*tokens.shape, model.spec.d_model)
        self._dense = np.empty(shape, dtype)
        for rows in self._batches:
            x, self._table = embed(params, place(tokens[rows]))
            self._dense[rows] = x
        # Until a conversion has replaced its first layer, its stream is the dense one.
        self._converted: list[np.ndarray | None] = [None] * conversions
        self._runs: dict[Any, Callable] = {}
        # Of all layers alike.
        block = block_module(model, 0)

        def rest_and_target(params, dense, mine, y, repair):
            dense, mine, y = (part.astype(jnp.float32) for part in (dense, mine, y))
            variables = {"params": params}
            rest = mine - block.apply(variables, y, method="behind_ffn")
            lost = repair * (dense - mine)
            return rest, y + block.apply(variables, y, lost, method="before_norm")

        self._rest_and_target = jax.jit(rest_and_target)
        self._behind_ffn = jax.jit(
            lambda params, y: block.apply({"params": params}, y, method="behind_ffn")
        )

    @property
    def kind(self) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of each stream."""
        return self._dense.shape, self._dense.dtype

    def state(self) -> tuple[np.ndarray, ...]:
        """Returns the streams as they are; a step further changes these arrays."""
        converted = [stream for stream in self._converted if stream is not None]
        assert len(converted) == len(self._converted)
        return self._dense, *converted

    def restore(self, state: Sequence[np.ndarray]) -> None:
        """Puts the streams where they were when :meth:`state` returned them."""
        self._dense, *converted = state
        self._converted = list(converted)

    def reach(
        self, layer: int, params: Any, repair: float, replaced: Sequence[bool] = (True,)
    ) -> list[LayerActivations | None]:
        """Takes the streams to where the layer's FFN adds to them, and the dense one past it.

        Args:
          layer: the layer's number; every earlier layer has been left behind.
          params: the layer's parameters in the dense model.
          repair: share of the target that brings the residual stream back to the dense model's;
            the rest is what the dense FFN returns on the same inputs.
          replaced: for each conversion, whether it replaces the layer's FFN; if not, its stream
            goes past the layer too.

        Returns:
          For each conversion what its FFN receives and should return, or ``None`` if it stays
          dense.

        Raises:
          ValueError: if the activations are not finite.
        """
        run = self._run(layer)
        found = [
            tuple(np.empty_like(self._dense) for _ in range(2)) if here else None
            for here in replaced
        ]
        streams = [
            np.empty_like(self._dense) if stream is None and here else stream
            for stream, here in zip(self._converted, replaced, strict=True)
        ]
        for rows in self._batches:
            dense, *of_dense = run(params, self._place(self._dense[rows]), self._table)
            for before, stream, arrays in zip(self._converted, streams, found, strict=True):
                if stream is None:
                    continue
                mine, z, y = dense, *of_dense
                if before is not None:
                    # One after the other: at once, they would need twice the memory.
                    dense.block_until_ready()
                    mine, z, y = run(params, self._place(before[rows]), self._table)
                if arrays is None:
                    stream[rows] = mine
                    continue
                x, target = arrays
                x[rows] = z
                stream[rows], target[rows] = self._rest_and_target(params, dense, mine, y, repair)
                _check_finite(layer, x[rows], target[rows])
            self._dense[rows] = dense
        self._converted = streams
        return [None if arrays is None else self._activations(*arrays) for arrays in found]

    def observe(self, layer: int, params: Any) -> LayerActivations:
        """Takes the dense stream past a layer while nothing has been replaced.

        Args:
          layer: the layer's number; every earlier layer has been left behind.
          params: the layer's parameters.

        Returns:
          What its FFN receives and returns.
        """
        run = self._run(layer)
        x, y = np.empty_like(self._dense), np.empty_like(self._dense)
        for rows in self._batches:
            self._dense[rows], x[rows], y[rows] = run(
                params, self._place(self._dense[rows]), self._table
            )
        return self._activations(x, y)

    def leave(
        self,
        activations: LayerActivations,
        params: Any,
        ffn: Callable[[Float[Array, "c d"]], Float[Array, "c d"]],
        conversion: int = 0,
    ) -> float:
        """Takes a conversion's stream past the layer that it has reached.

        Args:
          activations: what :meth:`reach` returned for this conversion.
          params: the layer's parameters in the dense model.
          ffn: the FFN that replaces the layer's.
          conversion: number of the conversion.

        Returns:
          The squared error on the targets, over their variance.
        """
        stream = self._converted[conversion]
        assert stream is not None
        stream = stream.reshape(activations.x.shape)
        error = 0.0
        for start, (x, target) in enumerate(activations.chunks()):
            rows = slice(start * CHUNK, start * CHUNK + len(x))
            y = ffn(x)
            added = np.asarray(self._behind_ffn(params, y), np.float32)
            stream[rows] = np.asarray(stream[rows], np.float32) + added
            error += float(jnp.sum(jnp.square(y - target)))
        return error / len(activations.x) / activations.variance

    def _activations(self, x: np.ndarray, target: np.ndarray) -> LayerActivations:
        d_model = x.shape[-1]
        return LayerActivations(x.reshape(-1, d_model), target.reshape(-1, d_model), self._place)

    def _run(self, layer: int) -> Callable:
        """Returns the layer's block, compiled once for all layers that compute the same."""
        kind = self.model.layer_kind(self.model.config, layer)
        key = (self.model.ffns[layer] if self.model.ffns else None, kind)
        if key not in self._runs:
            block = block_module(self.model, layer)

            def run(params, x, table):
                x = x.astype(block.dtype)
                out, variables = block.apply(
                    {"params": params}, x, None, table, True, False, mutable=["intermediates"]
                )
                sown = variables["intermediates"]
                return out, sown["ffn_input"][0], sown["ffn_output"][0]

            self._runs[key] = CheckedJit(run, "a layer's forward pass", _smaller)
        return self._runs[key]


def _check_finite(layer: int, *stored: np.ndarray) -> None:
    """Refuses activations as they are stored: in float16 what is too large becomes infinite."""
    if not all(np.isfinite(part).all() for part in stored):
        dtype = stored[0].dtype
        advice = "take bfloat16 or float32" if dtype == np.float16 else "check the weights"
        raise ValueError(f"the activations of layer {layer} are not finite in {dtype}: {advice}")


def _smaller(params: Any, x: Array, table: Any) -> dict[str, tuple[Any, ...]]:
    """Returns the arguments of a layer with half of the batch, and with half of the window."""
    return halves(
        x.shape[0],
        x.shape[1],
        lambda b, t: (params, x[:b, :t], jax.tree.map(lambda leaf: leaf[:, :t], table)),
    )
