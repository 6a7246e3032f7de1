"""Takes calibration text through a stack, one layer at a time.

Two token streams stand side by side: the residual stream of the dense model, and that of the model
whose layers so far have been replaced. A layer is fitted when both have reached it, and both go on
through it. Nothing but the streams and one layer's inputs and targets is ever held for the whole
text.

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
    """The two residual streams of a conversion, both before the same layer.

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
    ):
        """Embeds the text.

        Args:
          model: the dense model.
          params: its parameters; only what embeds tokens is read.
          tokens: token ids.
          batch_size: number of windows in one forward pass.
          dtype: what the streams are stored in.
          place: function that puts a batch of windows on the devices.

        Raises:
          MemoryError: if the streams and one layer's activations do not fit into host memory.
        """
        # Both streams, and a layer's inputs and targets.
        needed = 4 * tokens.size * model.spec.d_model * np.dtype(dtype).itemsize
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
        # Until the first layer is replaced there is one stream.
        self._converted: np.ndarray | None = None
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
        """Returns both streams as they are; a step further changes these arrays."""
        assert self._converted is not None
        return self._dense, self._converted

    def restore(self, state: Sequence[np.ndarray]) -> None:
        """Puts both streams where they were when :meth:`state` returned them."""
        self._dense, self._converted = state

    def reach(self, layer: int, params: Any, repair: float) -> LayerActivations:
        """Takes both streams to where the layer's FFN adds to them, and the dense one past it.

        Args:
          layer: the layer's number; every earlier layer has been left behind.
          params: the layer's parameters in the dense model.
          repair: share of the target that brings the residual stream back to the dense model's;
            the rest is what the dense FFN returns on the same inputs.

        Raises:
          ValueError: if the activations are not finite.
        """
        run = self._run(layer)
        before = self._dense if self._converted is None else self._converted
        rest = np.empty_like(before) if self._converted is None else before
        x, target = np.empty_like(before), np.empty_like(before)
        for rows in self._batches:
            dense, z, y = run(params, self._place(self._dense[rows]), self._table)
            mine = dense
            if self._converted is not None:
                # One after the other: at once, they would need twice the memory.
                dense.block_until_ready()
                mine, z, y = run(params, self._place(before[rows]), self._table)
            x[rows] = z
            rest[rows], target[rows] = self._rest_and_target(params, dense, mine, y, repair)
            # Checked as they are stored: in float16 what is too large becomes infinite.
            if not (np.isfinite(x[rows]).all() and np.isfinite(target[rows]).all()):
                raise ValueError(
                    f"the activations of layer {layer} are not finite in {x.dtype}: "
                    + ("take bfloat16 or float32" if x.dtype == np.float16 else "check the weights")
                )
            self._dense[rows] = dense
        self._converted = rest
        d_model = x.shape[-1]
        return LayerActivations(x.reshape(-1, d_model), target.reshape(-1, d_model), self._place)

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
        d_model = x.shape[-1]
        return LayerActivations(x.reshape(-1, d_model), y.reshape(-1, d_model), self._place)

    def leave(
        self,
        activations: LayerActivations,
        params: Any,
        ffn: Callable[[Float[Array, "c d"]], Float[Array, "c d"]],
    ) -> float:
        """Takes the converted stream past the layer that it has reached.

        Args:
          activations: what :meth:`reach` returned.
          params: the layer's parameters in the dense model.
          ffn: the FFN that replaces the layer's.

        Returns:
          The squared error on the targets, over their variance.
        """
        assert self._converted is not None
        stream = self._converted.reshape(activations.x.shape)
        error = 0.0
        for start, (x, target) in enumerate(activations.chunks()):
            rows = slice(start * CHUNK, start * CHUNK + len(x))
            y = ffn(x)
            added = np.asarray(self._behind_ffn(params, y), np.float32)
            stream[rows] = np.asarray(stream[rows], np.float32) + added
            error += float(jnp.sum(jnp.square(y - target)))
        return error / len(activations.x) / activations.variance

    def skip(self, layer: int, params: Any) -> None:
        """Takes both streams through a layer that stays dense."""
        run = self._run(layer)
        for stream in (self._dense, self._converted):
            if stream is not None:
                for rows in self._batches:
                    stream[rows] = run(params, self._place(stream[rows]), self._table)[0]

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


def _smaller(params: Any, x: Array, table: Any) -> dict[str, tuple[Any, ...]]:
    """Returns the arguments of a layer with half of the batch, and with half of the window."""
    return halves(
        x.shape[0],
        x.shape[1],
        lambda b, t: (params, x[:b, :t], jax.tree.map(lambda leaf: leaf[:, :t], table)),
    )
