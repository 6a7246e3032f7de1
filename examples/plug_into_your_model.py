"""Puts a SparseFFN into a model of your own: in Flax Linen, and in Flax NNX.

    python examples/plug_into_your_model.py --steps 100

The model classifies sequences by one residual block; where its dense FFN would be is a SparseFFN
with all its parts. It trains like any module: what is masked has no parameter, so that optax and
everything else sees only what lives.
"""

import argparse
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import sparseffn_jax as sf

D, CLASSES = 64, 4

# Half of the blocks of a correction of the whole layer's output.
CHECKERBOARD = sf.BlockMask.from_array(np.indices((4, 4)).sum(axis=0) % 2, (16, 16))
FFN = sf.SparseFFNConfig(
    d_model=D,
    d_ff=4 * D,
    activation="gelu_new",
    # From scratch the block-circulant map is the right one; low_rank is for pretrained weights. The
    # highest of the 5 frequencies is left out.
    spectral=sf.SpectralConfig(
        "block_circulant", 4 * D, block_size=8, frequency_mask=(True,) * 4 + (False,)
    ),
    polynomial=sf.PolynomialConfig(degree=4),
    micro=sf.MicroRefinementConfig(core=sf.CoreConfig(width=32), corrections=(CHECKERBOARD,)),
)


class Batch(NamedTuple):
    """Sequences and their classes."""

    x: Float[Array, "b t d"]
    labels: Int[Array, " b"]


class LinenModel(nn.Module):
    """Your Linen model: a SparseFFN is a submodule like any other."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b classes"]:
        x = x + sf.SparseFFN(FFN)(nn.LayerNorm()(x))
        return nn.Dense(CLASSES)(x.mean(axis=1))


class NNXModel(nnx.Module):
    """Your NNX model: ``ToNNX`` makes a SparseFFN an NNX module, here of known input shape."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.ffn = nnx.bridge.ToNNX(sf.SparseFFN(FFN), rngs=rngs).lazy_init(jnp.zeros((1, D)))
        self.head = nnx.Linear(D, CLASSES, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b classes"]:
        x = x + self.ffn(self.norm(x))
        return self.head(x.mean(axis=1))


def train_linen(batch: Batch, steps: int, learning_rate: float = 1e-3) -> list[float]:
    """Trains :class:`LinenModel`; returns the loss before every step."""
    model, optimizer = LinenModel(), optax.adam(learning_rate)
    params = jax.jit(model.init)(jax.random.key(0), batch.x)["params"]
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        def objective(params):
            logits: Any = model.apply({"params": params}, batch.x)
            return loss(logits, batch.labels)

        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses


def train_nnx(batch: Batch, steps: int, learning_rate: float = 1e-3) -> list[float]:
    """Trains :class:`NNXModel`; returns the loss before every step."""
    model = NNXModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda model: loss(model(batch.x), batch.labels))(
            model
        )
        optimizer.update(model, gradient)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


def loss(logits: Float[Array, "b classes"], labels: Int[Array, " b"]) -> Float[Array, ""]:
    """Returns the mean cross-entropy in nats."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(steps: int = 100) -> dict[str, list[float]]:
    """Trains both models on random data that both can learn by heart, and prints the losses."""
    x, labels = jax.random.split(jax.random.key(1))
    batch = Batch(jax.random.normal(x, (32, 16, D)), jax.random.randint(labels, (32,), 0, CLASSES))
    print(f"{sf.flops_ratio(FFN):.2f} of the dense FFN's FLOPs")
    losses = {"Linen": train_linen(batch, steps), "NNX": train_nnx(batch, steps)}
    for name, values in losses.items():
        for i in range(0, steps, max(1, steps // 5)):
            print(f"{name:5} step {i:4}  loss {values[i]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
