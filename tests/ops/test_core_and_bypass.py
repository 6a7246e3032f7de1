"""A core beside a bypass, by every plan, against float64; where joining them pays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import DTYPES, assert_close, dot_generals, draw, value_and_vjp

from sparseffn_jax.ops import core_and_bypass
from sparseffn_jax.ops.core_and_bypass import Weights
from sparseffn_jax.ops.hidden import Activate, Channels, HiddenMaps, MapPlan
from sparseffn_jax.ops.low_rank import Factors
from sparseffn_jax.ops.plans.choice import refusing

PLANS = ("joined", "two_gemms", "merged")
D, WIDTH, RANK, OUT = 24, 20, 5, 28
# More units than components, and more than twice as many components as units.
SIZES = ((WIDTH, RANK), (6, 17))


def shapes(maps, bias, width=WIDTH, rank=RANK):
    kernels = [(D, width)] * maps
    return *kernels, (width, OUT), (D, rank), (rank, OUT), *[(width,)] * (maps * bias)


def make(maps, leaves):
    *up, down, axes, filter = leaves[: maps + 3]
    return Weights(HiddenMaps(tuple(up), down), Factors(axes, filter)), Channels(leaves[maps + 3 :])


def run(plan, maps):
    def function(x, *leaves):
        weights, channels = make(maps, leaves)
        matrices = core_and_bypass.pack(weights, MapPlan(plan))
        rank = weights.bypass.axes.shape[1]
        return core_and_bypass.apply(x, matrices, rank, Activate("relu"), channels)

    return function


def reference(maps, x, leaves, cotangent):
    """Value and VJP in float64, of ``relu`` without a map for gates or with one."""
    (up, down), (axes, filter) = (weights := make(maps, leaves))[0]
    biases = weights[1].biases or (0.0,) * maps
    first, *rest = (x @ kernel + bias for kernel, bias in zip(up, biases, strict=True))
    hidden = np.maximum(first, 0.0) * (rest[0] if rest else 1.0)
    y = hidden @ down + x @ axes @ filter
    back = cotangent @ down.T
    bars = [back * (first > 0.0) * (rest[0] if rest else 1.0)]
    if rest:
        bars.append(back * np.maximum(first, 0.0))
    components = cotangent @ filter.T
    x_bar = sum(bar @ kernel.T for bar, kernel in zip(bars, up, strict=True)) + components @ axes.T
    kernels = [x.T @ bar for bar in bars]
    factors = x.T @ components, (x @ axes).T @ cotangent
    sums = [bar.sum(0) for bar in bars] if weights[1].biases else []
    return y, [x_bar, *kernels, hidden.T @ cotangent, *factors, *sums]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize(("width", "rank"), SIZES)
@pytest.mark.parametrize("plan", PLANS)
def test_equals_float64(plan, width, rank, maps, bias, dtype):
    (x, *leaves, cotangent), (x64, *leaves64, cotangent64) = draw(
        0, (7, D), *shapes(maps, bias, width, rank), (7, OUT), dtype=dtype, scale=0.5
    )
    y, bars = value_and_vjp(run(plan, maps), (x, *leaves), cotangent)
    expected, expected_bars = reference(maps, x64, leaves64, cotangent64)
    assert y.dtype == dtype
    assert_close(y, expected, dtype, "value")
    for i, (bar, wanted) in enumerate(zip(bars, expected_bars, strict=True)):
        # A hidden unit next to zero may be on its other side in half precision.
        factor = 1.0 if dtype == "float32" else 3.0
        assert_close(bar, wanted, dtype, f"gradient {i}", factor=factor)


def test_joined_it_is_two_products():
    (x, *leaves), _ = draw(0, (7, D), *shapes(2, False))
    sizes = [product for *_, product in dot_generals(run("joined", 2), x, *leaves)]
    assert sizes == [7 * D * (2 * WIDTH + RANK), 7 * (WIDTH + RANK) * OUT]


def weights_of(d, width, rank, maps=2):
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    up = (leaf(d, width),) * maps
    return Weights(HiddenMaps(up, leaf(width, d)), Factors(leaf(d, rank), leaf(rank, d)))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_joining_must_pay_for_the_copy_of_the_weights(platform):
    weights = weights_of(4096, 3712, 1024)
    choose = core_and_bypass.choose
    assert choose(1, weights, platform).name == "two_gemms"
    assert choose(65536, weights_of(1024, 32, 1024), platform, is_packed=True).name == "merged"
    with pytest.raises(ValueError, match="no plan 'fft': use one of joined, two_gemms, merged"):
        choose(1, weights, platform, "fft")


def test_on_a_cpu_joining_must_pay_for_the_copy_of_the_hidden_units_too():
    choose = core_and_bypass.choose
    for weights in (weights_of(4096, 3712, 1024), weights_of(576, 1024, 64)):
        assert choose(65536, weights, "gpu").name == "joined"
        assert choose(65536, weights, "cpu").name == "two_gemms"
        for platform in ("cpu", "gpu"):
            assert choose(1, weights, platform, is_packed=True).name == "joined"
    # Together they are narrower than x.
    assert choose(65536, weights_of(576, 128, 64), "cpu").name == "joined"


def test_a_plan_that_is_refused_for_a_while():
    weights = weights_of(4096, 3712, 1024)
    with refusing({("core_and_bypass", "joined"): "it is too late"}):
        assert core_and_bypass.choose(65536, weights, "gpu").name == "two_gemms"
        with pytest.raises(ValueError, match=r"cannot run as 'joined' here: it is too late"):
            core_and_bypass.choose(65536, weights, "gpu", "joined")
    assert core_and_bypass.choose(65536, weights, "gpu").name == "joined"


def test_a_call_with_packed_weights_copies_none_of_them():
    weights = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), weights_of(256, 192, 64))
    plan = core_and_bypass.choose(1, weights, "gpu", is_packed=True)
    packed = {plan.layout: core_and_bypass.pack(weights, plan)}

    def decode(x, packed, weights):
        return core_and_bypass.layer(x, weights, Activate("silu"), Channels(), packed=packed)

    x = jnp.ones((1, 256), jnp.bfloat16)
    lowered = jax.jit(decode).trace(x, packed, weights).lower(lowering_platforms=("cuda",))
    operations = [line.split(" : ")[0] for line in lowered.as_text().splitlines()]
    assert sum("stablehlo.dot_general" in line for line in operations) == 2
    joined = [line for line in lowered.as_text().splitlines() if "stablehlo.concatenate" in line]
    assert len(joined) == 1
    assert "tensor<1x256xbf16>" in joined[0].split("->")[1]
    assert not any("transpose" in line or "pad " in line for line in operations)
