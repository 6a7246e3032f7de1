import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, dot_generals, draw, value_and_vjp

from sparseffn_jax.ops import block_circulant, filters, low_rank
from sparseffn_jax.ops.hidden import Activate, Channels, HiddenMaps, kept, over_tokens
from sparseffn_jax.ops.plans import costs


# Tiles that divide the tokens, smaller ones that do, none that does, and one tile for all.
@pytest.mark.parametrize("tokens", [96, 128, 80, 50, 113, 32, 7])
def test_tiles_change_nothing(tokens):
    (x, w, cotangent), (x64, w64, cotangent64) = draw(0, (tokens, 6), (6, 4), (tokens, 4))
    y, (dx, dw) = value_and_vjp(
        lambda x, w: over_tokens(lambda rows: jnp.sin(rows @ w), x, 48), (x, w), cotangent
    )
    inner = np.cos(x64 @ w64) * cotangent64
    assert_close(y, np.sin(x64 @ w64))
    assert_close(dx, inner @ w64.T)
    assert_close(dw, x64.T @ inner)


@pytest.mark.parametrize(
    ("tokens", "shape"), [(96, (2, 48, 6)), (160, (5, 32, 6)), (50, (2, 32, 6))]
)
def test_tiles_divide_the_tokens_where_some_do(tokens, shape):
    jaxpr = jax.make_jaxpr(lambda x: over_tokens(jnp.sin, x, 48))(jnp.ones((tokens, 6)))
    (scan,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    assert scan.invars[0].aval.shape == shape


def test_what_is_kept_is_not_computed_again():
    x, w = jnp.ones((8, 4)), jnp.ones((4, 4))

    def products(keep):
        def loss(x):
            return over_tokens(lambda rows: jnp.sin(keep(rows @ w)), x, None).sum()

        return len(dot_generals(jax.grad(loss), x))

    assert (products(lambda z: z), products(kept)) == (3, 2)


@pytest.mark.parametrize("operator", ["low_rank", "block_circulant"])
def test_spectral_branches_are_the_same_in_tiles(operator, monkeypatch):
    shapes = {
        "low_rank": [(8, 3), (3, 16), (16, 3), (3, 8)],
        "block_circulant": [(3, 2, 4), (1, 2, 4), (3, 4, 2), (1, 4, 2)],
    }[operator]
    (x, cotangent, bias, *factors), _ = draw(0, (100, 8), (100, 8), (16,), *shapes)

    blocks = filters.Blocks(4, (0, 1, 2))

    def layer(x, bias, *factors):
        activate, channels = Activate("tanh"), Channels((bias,))
        if operator == "block_circulant":
            first, last = (filters.Filter(*part) for part in (factors[:2], factors[2:]))
            weights = HiddenMaps((first,), last)
            plan = block_circulant.choose(len(x), weights, blocks, activate, "cpu", "dft")
            packed = block_circulant.pack(weights, plan, blocks)
            return block_circulant.apply(x, packed, plan, blocks, activate, channels)
        first, last = (low_rank.Factors(*part) for part in (factors[:2], factors[2:]))
        weights = HiddenMaps((first,), last)
        plan = low_rank.choose(len(x), weights, activate, "cpu", "two_gemms")
        return low_rank.apply(x, low_rank.pack(weights, plan), plan, activate, channels)

    whole = value_and_vjp(layer, (x, bias, *factors), cotangent)
    # JAX would give the program back that it traced before.
    jax.clear_caches()
    monkeypatch.setattr(costs, "token_tile", lambda *_: 32)
    assert "scan" in str(jax.make_jaxpr(layer)(x, bias, *factors))
    tiled = value_and_vjp(layer, (x, bias, *factors), cotangent)
    for one, other in zip(jax.tree.leaves(tiled), jax.tree.leaves(whole), strict=True):
        assert_close(one, other)
