"""The FFNs of all of a model's layers as one program, to be timed against another model's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseffn_jax.measure.timing import PairedTimes, time_pair
from sparseffn_jax.models.decoder import Decoder, ffn_module

Stack = Callable[[Float[Array, "t d"]], Any]


def ffn_stack(model: Decoder, params: Any, *, train: bool = False) -> Stack:
    """Returns the model's FFNs, one after the other, as one jitted function of the activations.

    Nothing else of the model is in it, so that what replacing the FFNs gains is seen undiluted.

    Args:
      model: a decoder.
      params: parameters of the model, or of its FFNs alone as :func:`fresh_ffns` returns them; the
        stack has as many layers as they have.
      train: whether the function returns the gradients of the sum of squared outputs by the
        parameters and the activations, instead of the outputs.
    """
    body, collection = model.layer_path
    tree = params[body][collection]
    modules = [ffn_module(model, i) for i in range(len(tree))]
    layers = [tree[str(i)]["mlp"] for i in range(len(tree))]

    def forward(layers: Any, x: Any) -> Any:
        for module, leaves in zip(modules, layers, strict=True):
            # An FFN that has been dropped has no parameters, and takes no time.
            if leaves:
                x = module.apply({"params": leaves}, x)
        return x

    run = jax.jit(forward)
    if train:
        run = jax.jit(jax.grad(lambda layers, x: jnp.sum(forward(layers, x) ** 2), argnums=(0, 1)))
    layers = jax.device_put(layers)
    return lambda x: run(layers, x)


def fresh_ffns(model: Decoder, seed: int = 0, count: int | None = None) -> dict[str, Any]:
    """Returns newly drawn parameters of the FFNs alone, at their places in the model's tree.

    How long a layer takes does not depend on its weights, so that a configuration can be timed
    before anything is fitted.

    Args:
      model: a decoder.
      seed: seed of the parameters.
      count: number of layers to draw, the first ones, if there are so many; ``None`` draws all.
    """
    x = jnp.zeros((1, model.spec.d_model), model.dtype)
    inits, layers = {}, {}
    for i, key in enumerate(jax.random.split(jax.random.key(seed), model.spec.n_layer)[:count]):
        kind = model.ffns[i] if model.ffns else None
        # Layers of one kind are compiled once.
        init = inits.setdefault(kind, jax.jit(ffn_module(model, i).init))
        layers[str(i)] = {"mlp": init(key, x).get("params", {})}
    body, collection = model.layer_path
    return {body: {collection: layers}}


def time_stacks(
    baseline: Stack,
    candidate: Stack,
    x: Float[Array, "t d"],
    *,
    repeats: int = 15,
    least_seconds: float = 0.0,
) -> PairedTimes:
    """Times two stacks in turn on the same activations, as :func:`time_pair` does.

    Args:
      baseline: the stack that is compared with.
      candidate: the stack that is compared.
      x: (t, d_model) activations.
      repeats: number of pairs of runs, at least.
      least_seconds: as in :func:`~sparseffn_jax.measure.timing.time_in_turn`.
    """
    return time_pair(
        lambda: baseline(x), lambda: candidate(x), repeats=repeats, least_seconds=least_seconds
    )
