"""Rewrites a SparseFFN as the dense FFN that computes the same, where there is one.

A core of whole units is a narrower FFN. A low-rank bypass becomes hidden units that are linear in
their inputs. If the FFN is gated, a component takes one unit: its gate has no weights and a bias
of 1, so that it gives ``phi(1)`` times what goes up. If it is not, a component takes two units,
because ``phi(z) - phi(-z)`` is ``z`` for GELU, SiLU and ReLU alike. One unit would do where a bias
lifts ``z`` to where phi is linear; but then the bias takes most of the bits that programs keep of
a hidden activation, eleven in float16 and seven in Q8_0.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseffn_jax.checkpoints.weights import Tensor
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.decoder import FFN
from sparseffn_jax.models.spec import DecoderSpec, FFNLayout
from sparseffn_jax.ops.activations import get_activation
from sparseffn_jax.ops.masks import BlockMask, decompress

# The activations of which phi(z) - phi(-z) is z.
_HALVES = frozenset(
    ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")
)


def units_of_component(activation: str, gated: bool) -> int | None:
    """Returns how many hidden units compute what one component of a bypass does, if any can.

    Args:
      activation: Hugging Face name of the FFN's activation.
      gated: whether a hidden unit is ``phi(gate) * up``.
    """
    if gated:
        return 1
    return 2 if activation in _HALVES else None


def why_not_dense(ffn: FFN, spec: DecoderSpec, takes_biases: bool) -> str | None:
    """Returns what keeps a layer from being a dense FFN, or ``None`` if nothing does.

    Args:
      ffn: the layer's FFN.
      spec: sizes of the model.
      takes_biases: whether dense FFNs may have biases where the model is to be written.
    """
    if ffn is None:
        return None
    if not isinstance(ffn, SparseFFNConfig):
        return f"an FFN of your own, {ffn!r}"
    branch = ffn.spectral
    if ffn.micro is None or ffn.micro.core is None:
        return "no core"
    if branch is not None and not (branch.is_bypass and branch.transform == "low_rank"):
        return "a spectral branch"
    if ffn.micro.corrections:
        return "linear corrections"
    masks = (ffn.micro.core.up_mask, ffn.micro.core.down_mask)
    if not all(mask is None or mask.is_structured for mask in masks):
        return "a core with an unstructured mask"
    if ffn.gated != spec.gated:
        return "a gate" if ffn.gated else "no gate"
    if spec.ffn_bias and not ffn.bias:
        return "no biases"
    if branch is not None and units_of_component(ffn.activation, ffn.gated) is None:
        return f"a bypass, which no units with the activation {ffn.activation} compute"
    if needs_biases(ffn) and not takes_biases:
        what = "biases" if ffn.bias else "a bypass, which units with biases compute"
        return f"{what}, for which its family has no place"
    return None


def needs_biases(ffn: SparseFFNConfig) -> bool:
    """Returns whether a SparseFFN has biases as a dense FFN."""
    return ffn.bias or (ffn.gated and ffn.spectral is not None)


def dense_width(ffn: SparseFFNConfig) -> int:
    """Returns how many hidden units a SparseFFN has as a dense FFN.

    Args:
      ffn: a configuration for which :func:`why_not_dense` has no reason.
    """
    width = int(_kept(ffn).sum())
    if ffn.spectral is not None:
        width += ffn.spectral.rank * (units_of_component(ffn.activation, ffn.gated) or 0)
    return width


Maps = Mapping[str, Mapping[str, Any]]


def dense_leaves(
    maps: Callable[[], Maps], layout: FFNLayout, sizes: tuple[int, int], bias: bool, dtype: Any
) -> dict[str, Any]:
    """Returns the parameters of a dense FFN, to be computed when one of them is read.

    Args:
      maps: returns the parameters, in which biases may be missing: they are zero then.
      layout: the names of the dense FFN's maps.
      sizes: the number of channels and of the dense FFN's hidden units.
      bias: whether there are biases.
      dtype: the dtype of the parameters.
    """
    (d_model, width), dtype = sizes, np.dtype(dtype)

    def tensor(name: str, leaf: str, shape: tuple[int, ...]) -> Tensor:
        def read() -> np.ndarray:
            return np.asarray(maps()[name].get(leaf, np.zeros(shape)), dtype)

        return Tensor("params", shape, dtype.name, read)

    dense = {}
    for name in (*layout.up_maps, layout.down):
        shape = (width, d_model) if name == layout.down else (d_model, width)
        stored = shape[::-1] if layout.transposed else shape
        dense[name] = {"kernel": tensor(name, "kernel", stored)}
        if bias:
            dense[name]["bias"] = tensor(name, "bias", shape[1:])
    return dense


def dense_maps(ffn: SparseFFNConfig, leaves: Mapping[str, Any], layout: FFNLayout) -> Maps:
    """Computes the parameters of the dense FFN that a SparseFFN is.

    Args:
      ffn: a configuration for which :func:`why_not_dense` has no reason.
      leaves: the layer's parameters.
      layout: the names of the dense FFN's maps.
    """
    assert ffn.micro is not None
    assert ffn.micro.core is not None
    core, kept = ffn.micro.core.without_dead_units(), _kept(ffn)
    weights = leaves["core"]
    down = _whole(weights["down"]["kernel"], core.down_mask)[kept]
    ups = [_whole(weights[name]["kernel"], core.up_mask)[:, kept] for name in ffn.up_maps]
    zero = np.zeros(len(kept))
    biases = [np.asarray(weights[name].get("bias", zero))[kept] for name in ffn.up_maps]
    if ffn.spectral is not None:
        more_ups, more_biases, more_down = _units(ffn, leaves["spectral"]["bypass"], down)
        ups = [np.concatenate(pair, axis=1) for pair in zip(ups, more_ups, strict=True)]
        biases = [np.concatenate(pair) for pair in zip(biases, more_biases, strict=True)]
        down = np.concatenate([down, more_down])
    out = np.asarray(leaves["bias"]) if ffn.bias else np.zeros(ffn.d_model)
    linears = [*zip(ups, biases, strict=True), (down, out)]
    return {
        name: {"kernel": weight.T if layout.transposed else weight, "bias": bias}
        for name, (weight, bias) in zip((*layout.up_maps, layout.down), linears, strict=True)
    }


def _units(
    ffn: SparseFFNConfig, bypass: Mapping[str, Any], down: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Returns a bypass as units: weights and biases of the maps into them, and those out of them.

    What leads out of a unit gets the size of what leads out of the core's, beside which it is
    rounded where weights are stored in blocks.
    """
    axes, filter = (np.asarray(bypass[name], np.float64) for name in ("axes", "filter"))
    size = np.sqrt(np.mean(np.square(np.asarray(down, np.float64)).sum(axis=1)))
    norms = np.linalg.norm(filter, axis=1)
    scale = np.where((norms > 0) & (size > 0), norms / (size or 1.0), 1.0)
    axes, filter = axes * scale, filter / scale[:, None]
    zero, one = np.zeros(len(filter)), np.ones(len(filter))
    if not ffn.gated:
        return [np.hstack([axes, -axes])], [np.append(zero, zero)], np.vstack([filter, -filter])
    at_one = float(get_activation(ffn.activation)(jnp.float32(1.0)))
    return [np.zeros_like(axes), axes], [one, zero], filter / at_one


def _kept(ffn: SparseFFNConfig) -> np.ndarray:
    """Returns for each unit that the core stores whether an output reads it."""
    assert ffn.micro is not None
    assert ffn.micro.core is not None
    core = ffn.micro.core.without_dead_units()
    if (mask := core.down_mask) is None:
        return np.ones(core.width, bool)
    return np.repeat(np.isin(np.arange(mask.grid[0]), mask.live_rows), mask.block_shape[0])


def _whole(kernel: Any, mask: BlockMask | None) -> np.ndarray:
    return np.asarray(kernel if mask is None else decompress(jnp.asarray(kernel), mask))
