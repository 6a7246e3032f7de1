import jax
import jax.numpy as jnp
import pytest
from numerics import DTYPES, assert_close, draw, value_and_vjp

from sparseffn_jax.ops import low_rank
from sparseffn_jax.ops.hidden import Activate, HiddenMaps

PLANS = ("two_gemms", "merged")
BATCHES = ((), (2, 3), (0,))


def one_map(plan):
    return lambda x, *factors: low_rank.multiply(
        x, low_rank.pack_map(low_rank.Factors(*factors), plan)
    )


def reference(x, axes, filter, cotangent):
    """Value and VJP of ``x U K`` with U K multiplied out, in float64."""
    weight = axes @ filter
    weight_bar = x.reshape(-1, x.shape[-1]).T @ cotangent.reshape(-1, weight.shape[1])
    return x @ weight, (cotangent @ weight.T, weight_bar @ filter.T, axes.T @ weight_bar)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("plan", PLANS)
def test_equals_float64(plan, batch, dtype):
    (*arguments, cotangent), exact = draw(
        0, (*batch, 24), (24, 5), (5, 36), (*batch, 36), dtype=dtype
    )
    y, bars = value_and_vjp(one_map(plan), arguments, cotangent)
    expected, expected_bars = reference(*exact)
    assert y.dtype == dtype
    assert_close(y, expected, dtype, "value")
    for name, bar, wanted in zip(("x", "axes", "filter"), bars, expected_bars, strict=True):
        assert_close(bar, wanted, dtype, f"gradient of {name}")


@pytest.mark.parametrize("plan", PLANS)
def test_under_transformations(plan):
    (*arguments, cotangent), exact = draw(1, (4, 12), (12, 3), (3, 8), (4, 8))
    function = jax.checkpoint(one_map(plan))

    def loss(x, axes, filter, cotangent):
        return jnp.vdot(function(x, axes, filter), cotangent)

    gradient = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), (0, None, None, 0))
    x_bar, axes_bar, filter_bar = jax.jit(gradient)(*arguments, cotangent)
    _, expected = reference(*exact)
    assert_close(x_bar, expected[0])
    assert_close(axes_bar.sum(0), expected[1])
    assert_close(filter_bar.sum(0), expected[2])


def test_refuses_an_unknown_plan():
    (axes, filter), _ = draw(0, (4, 2), (2, 6))
    weights = HiddenMaps((low_rank.Factors(axes, filter),), low_rank.Factors(filter.T, axes.T))
    with pytest.raises(
        ValueError, match="low_rank has no plan 'fft': use one of two_gemms, merged"
    ):
        low_rank.choose(2, weights, Activate("relu"), "cpu", "fft")


def test_one_kernel_runs_a_layer_on_a_hopper_gpu(monkeypatch):
    def plan(tokens, dtype="bfloat16", platform="gpu", implementation=None):
        into, out = jnp.zeros((768, 144), dtype), jnp.zeros((3072, 144), dtype)
        weights = HiddenMaps(
            (low_rank.Factors(into, out.T),), low_rank.Factors(out, jnp.zeros((144, 768), dtype))
        )
        return low_rank.choose(tokens, weights, Activate("silu"), platform, implementation)

    assert plan(16384).is_fused
    assert not plan(16384, platform="cpu").is_fused
    assert not plan(16384, dtype="float32").is_fused
    assert not plan(16384, implementation="two_gemms").is_fused
    # A few tokens would go through all weights on a few multiprocessors.
    assert not plan(64).is_fused
    assert plan(64, implementation="fused").is_fused
    assert plan(64, implementation="fused").layout == plan(64, implementation="two_gemms").layout
    with pytest.raises(ValueError, match=r"cannot run as 'fused' here: it multiplies bfloat16"):
        plan(64, "float32", "cpu", "fused")
    # Several may share the tokens, so that each has too few of them.
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not plan(16384).is_fused
    assert plan(8 * 16384).is_fused
