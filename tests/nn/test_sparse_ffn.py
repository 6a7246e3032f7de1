import dataclasses
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from numerics import (
    DTYPES,
    assert_close,
    circulant,
    dense_of,
    draw,
    jit,
    tangent_chebyshev,
    value_and_vjp,
)

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.measure.costs import flops_per_token
from sparseffn_jax.measure.flops import count_flops
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.ops.block_sparse import block_sparse_matmul
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.ops.plans import costs
from sparseffn_jax.ops.plans.choice import recorded

D, M = 12, 24


def mask_of(*rows, block_shape):
    return BlockMask(block_shape, [[digit == "1" for digit in row] for row in rows])


SCATTERED = mask_of("1101", "0100", "1011", block_shape=(4, 6))
SCATTERED_BACK = mask_of("100", "011", "110", "010", block_shape=(6, 4))
ROWS = mask_of("1010", "0000", "1010", block_shape=(4, 6))
COLUMNS = mask_of("011", "000", "011", "000", block_shape=(6, 4))
CORRECTIONS = (
    mask_of("100", "010", "100", block_shape=(4, 4)),
    mask_of("0110", "0110", block_shape=(6, 3)),
)
LOW_RANK = SpectralConfig("low_rank", M, rank=3, down_rank=5)
CIRCULANT = SpectralConfig("block_circulant", M, block_size=6)
MASKED_CIRCULANT = SpectralConfig(
    "block_circulant", M, block_size=6, frequency_mask=(False, True, False, True)
)
POLYNOMIAL = PolynomialConfig(4, (True, True, False, True, True), radius=1.5, groups=3)
ALL = SparseFFNConfig(
    D,
    M,
    "silu",
    MASKED_CIRCULANT,
    POLYNOMIAL,
    MicroRefinementConfig(CoreConfig(M, SCATTERED, SCATTERED_BACK), CORRECTIONS),
)

CONFIGS = {
    "low rank": SparseFFNConfig(D, M, spectral=LOW_RANK),
    "low rank and polynomial": SparseFFNConfig(D, M, spectral=LOW_RANK, polynomial=POLYNOMIAL),
    "circulant": SparseFFNConfig(D, M, spectral=CIRCULANT),
    "masked circulant": SparseFFNConfig(D, M, spectral=MASKED_CIRCULANT),
    "core": SparseFFNConfig(D, M, micro=MicroRefinementConfig(CoreConfig(M))),
    "unstructured core": SparseFFNConfig(
        D, M, micro=MicroRefinementConfig(CoreConfig(M, SCATTERED, SCATTERED_BACK))
    ),
    "structured core": SparseFFNConfig(
        D, M, micro=MicroRefinementConfig(CoreConfig(M, ROWS, COLUMNS))
    ),
    "corrections": SparseFFNConfig(
        D, M, spectral=LOW_RANK, micro=MicroRefinementConfig(corrections=CORRECTIONS)
    ),
    "all": ALL,
    # 24 is no multiple of 16, and no map has a bias.
    "gated low rank": SparseFFNConfig(
        16,
        M,
        "silu",
        LOW_RANK,
        POLYNOMIAL,
        MicroRefinementConfig(CoreConfig(8)),
        gated=True,
        bias=False,
    ),
    "low rank bypass": SparseFFNConfig(
        *(D, M, "silu", SpectralConfig("low_rank", rank=3)),
        micro=MicroRefinementConfig(CoreConfig(8)),
        gated=True,
        bias=False,
    ),
    "wide low rank bypass": SparseFFNConfig(
        D,
        M,
        spectral=SpectralConfig("low_rank", rank=11),
        micro=MicroRefinementConfig(CoreConfig(4)),
    ),
    "circulant bypass": SparseFFNConfig(
        *(D, M),
        spectral=dataclasses.replace(MASKED_CIRCULANT, width=0),
        micro=MicroRefinementConfig(CoreConfig(8), CORRECTIONS),
    ),
    "bypass alone": SparseFFNConfig(D, M, spectral=SpectralConfig("block_circulant", block_size=4)),
    "gated all": dataclasses.replace(ALL, gated=True),
    "gated core": SparseFFNConfig(
        D,
        M,
        "silu",
        micro=MicroRefinementConfig(CoreConfig(M, SCATTERED, SCATTERED_BACK)),
        gated=True,
    ),
}


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def gelu_new(x):
    return x * sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))


def reference(config, params, x):
    """The layer in float64 NumPy, written from its formula."""
    phi = {"gelu_new": gelu_new, "silu": lambda x: x * sigmoid(x)}[config.activation]

    def spectral_map(x, part):
        if config.spectral.transform == "low_rank":
            return x @ part["axes"] @ part["filter"]
        b, frequencies = config.spectral.block_size, config.spectral.frequencies
        _, p, q = part["real"].shape
        return circulant(x, part["real"], part.get("imag", np.zeros((0, p, q))), b, frequencies)

    def linear(x, kernel, mask):
        return x @ (kernel if mask is None else dense_of(kernel, mask))

    def polynomial(u):
        degrees, radius = config.polynomial.degrees, config.polynomial.radius
        groups = len(params["spectral"]["polynomial"])
        u = u.reshape(*u.shape[:-1], groups, u.shape[-1] // groups)
        y = sum(
            c[:, None] * tangent_chebyshev(u, k, radius)[0]
            for k, c in zip(degrees, params["spectral"]["polynomial"].T, strict=True)
        )
        return y.reshape(*u.shape[:-2], config.spectral.width)

    def up(part, apply):
        """The hidden units' pre-activations: of the gate, if any, and of up."""
        return [
            apply(x, part[name]) + part[name].get("bias", 0.0)
            for name in (("gate", "up") if config.gated else ("up",))
        ]

    def hidden(act, us):
        return act(us[0]) * us[1] if config.gated else act(us[0])

    y = np.zeros_like(x) + params.get("bias", 0.0)
    if config.spectral is not None:
        branch = params["spectral"]
        if config.spectral.width:
            units = hidden(polynomial if config.polynomial else phi, up(branch, spectral_map))
            y = y + spectral_map(units, branch["down"])
        else:
            y = y + spectral_map(x, branch["bypass"])
    core = config.micro and config.micro.core
    if core:
        core = core.without_dead_units()
        us = up(params["core"], lambda x, part: linear(x, part["kernel"], core.up_mask))
        y = y + linear(hidden(phi, us), params["core"]["down"]["kernel"], core.down_mask)
    for i, mask in enumerate(config.micro.corrections if config.micro else ()):
        y = y + linear(y, params[f"correction_{i}"]["kernel"], mask)
    return y


def shapes_of(config):
    x = jax.ShapeDtypeStruct((1, config.d_model), jnp.float32)
    return jax.eval_shape(SparseFFN(config).init, jax.random.key(0), x)["params"]


def random_params(config, seed=0):
    """Nothing at zero, not even what starts there; and the same in float64."""
    flat = flatten_dict(shapes_of(config))
    arrays, exact = draw(seed, *(leaf.shape for leaf in flat.values()), scale=0.4)
    return (
        unflatten_dict(dict(zip(flat, arrays, strict=True))),
        unflatten_dict(dict(zip(flat, exact, strict=True))),
    )


def apply(config, params, x, dtype=jnp.float32):
    return jit(SparseFFN(config, dtype=dtype).apply)({"params": params}, x)


def finite_differences(function, tree, step=1e-5):
    """Central differences of a float64 scalar function, entry by entry."""
    gradient = jax.tree.map(np.zeros_like, tree)
    for leaf, slot in zip(jax.tree.leaves(tree), jax.tree.leaves(gradient), strict=True):
        for index in np.ndindex(leaf.shape):
            value = leaf[index]
            leaf[index] = value + step
            above = function(tree)
            leaf[index] = value - step
            slot[index] = (above - function(tree)) / (2 * step)
            leaf[index] = value
    return gradient


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_float64(name):
    config = CONFIGS[name]
    params, params64 = random_params(config)
    shape = (2, 2, config.d_model)
    (x, cotangent), (x64, cotangent64) = draw(1, shape, shape)
    y, (params_bar, x_bar) = value_and_vjp(
        lambda params, x: SparseFFN(config).apply({"params": params}, x), (params, x), cotangent
    )
    assert_close(y, reference(config, params64, x64))
    expected = finite_differences(
        lambda tree: np.vdot(reference(config, *tree), cotangent64), (params64, x64)
    )
    assert_close(x_bar, expected[1], what="gradient of x")
    chex.assert_trees_all_equal_shapes(params_bar, params)
    wanted = flatten_dict(expected[0], sep="/")
    for path, bar in flatten_dict(params_bar, sep="/").items():
        assert_close(bar, wanted[path], what=f"gradient of {path}")


@pytest.mark.parametrize(
    "name", ["low rank and polynomial", "circulant", "unstructured core", "all"]
)
def test_half_precision(name):
    config = CONFIGS[name]
    params, params64 = random_params(config)
    # Rounding of the parameters is not what is measured.
    params, params64 = (
        jax.tree.map(lambda a: a.astype(jnp.bfloat16), t) for t in (params, params64)
    )
    params64 = jax.tree.map(lambda a: np.asarray(a, np.float64), params64)
    (x,), (x64,) = draw(1, (64, D), dtype="bfloat16")
    y = apply(config, params, x, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert_close(y, reference(config, params64, x64), "bfloat16")


def test_half_precision_leaves_parameters_and_gradients_float32():
    layer = SparseFFN(ALL, dtype=jnp.bfloat16)
    x = jnp.ones((2, 3, D), jnp.bfloat16)
    params, _ = random_params(ALL)
    made = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(made)} == {"float32"}
    y, (bars,) = value_and_vjp(lambda params: layer.apply({"params": params}, x), (params,), x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(bars, params)
    chex.assert_tree_all_finite(bars)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_takes_any_batch(batch):
    params, params64 = random_params(ALL)
    (x,), (x64,) = draw(2, (*batch, D))
    assert_close(apply(ALL, params, x), reference(ALL, params64, x64))


def test_under_transformations():
    params, params64 = random_params(ALL)
    (x, cotangent), (x64, cotangent64) = draw(3, (3, D), (3, D))
    layer = nn.remat(SparseFFN)(ALL)

    def loss(params, x, cotangent):
        return jnp.vdot(layer.apply({"params": params}, x), cotangent)

    gradient = jit(jax.vmap(jax.grad(loss, argnums=1), (None, 0, 0)))
    expected = finite_differences(lambda x: np.vdot(reference(ALL, params64, x), cotangent64), x64)
    assert_close(gradient(params, x, cotangent), expected)


@pytest.mark.parametrize("name", ["low rank and polynomial", "masked circulant"])
def test_inside_nnx(name):
    config = CONFIGS[name]
    (x,), _ = draw(4, (2, 3, D))

    @nnx.jit
    def build(x):
        return nnx.bridge.ToNNX(SparseFFN(config), rngs=nnx.Rngs(0)).lazy_init(x)

    @nnx.jit
    def value_and_gradient(module, x):
        return nnx.value_and_grad(lambda module: jnp.sum(module(x) ** 2))(module)

    wrapped = build(x)
    params = nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))
    chex.assert_trees_all_equal_shapes(params, shapes_of(config))
    y = apply(config, params, x)
    assert_close(nnx.jit(lambda module, x: module(x))(wrapped, x), y)
    value, gradient = value_and_gradient(wrapped, x)
    assert_close(value, jnp.sum(y**2))
    chex.assert_trees_all_equal_shapes(nnx.to_pure_dict(gradient), params)
    chex.assert_tree_all_finite(nnx.to_pure_dict(gradient))


def test_all_hidden_units_in_the_core_are_the_dense_ffn():
    params, exact = random_params(CONFIGS["core"])
    (x,), (x64,) = draw(5, (7, D))
    hidden = gelu_new(x64 @ exact["core"]["up"]["kernel"] + exact["core"]["up"]["bias"])
    dense = hidden @ exact["core"]["down"]["kernel"] + exact["bias"]
    assert_close(apply(CONFIGS["core"], params, x), dense)


def test_corrections_start_as_the_identity():
    x = jax.random.normal(jax.random.key(1), (7, D))
    params = jit(SparseFFN(CONFIGS["corrections"]).init)(jax.random.key(0), x)["params"]
    assert not any(np.any(params[f"correction_{i}"]["kernel"]) for i in range(len(CORRECTIONS)))
    np.testing.assert_array_equal(
        apply(CONFIGS["corrections"], params, x), apply(CONFIGS["low rank"], params, x)
    )


@pytest.mark.parametrize("plan", ["fft", "dft", "split", "dense"])
def test_tokens_do_not_mix(plan):
    spectral = dataclasses.replace(MASKED_CIRCULANT, implementation=plan)
    layer = SparseFFN(dataclasses.replace(ALL, spectral=spectral))
    params, _ = random_params(ALL)
    apply = jit(lambda x: layer.apply({"params": params}, x))
    x = jax.random.normal(jax.random.key(2), (2, 6, D))
    before, after = apply(x), apply(x.at[1, 3].add(1.0))
    moved = np.any(np.asarray(before) != np.asarray(after), axis=-1)
    assert np.argwhere(moved).tolist() == [[1, 3]]


def with_plans(config, spectral=None, micro=None):
    if config.spectral is not None:
        part = dataclasses.replace(config.spectral, implementation=spectral)
        config = dataclasses.replace(config, spectral=part)
    if config.micro is not None:
        core = config.micro.core
        if core is not None:
            core = dataclasses.replace(core, implementation=micro)
        part = dataclasses.replace(config.micro, core=core)
        config = dataclasses.replace(config, micro=part)
    return config


FORCED = pytest.mark.parametrize(
    ("name", "spectral", "micro"),
    [
        ("low rank", "two_gemms", None),
        ("low rank", "merged", None),
        ("all", "fft", "gather"),
        ("all", "dft", "masked"),
        ("all", "dense", "rows"),
        ("all", "split", "columns"),
        ("gated all", "dft", "columns"),
        ("gated core", None, "rows"),
        ("structured core", None, "slice"),
        ("structured core", None, "masked"),
        ("core", None, None),
        ("low rank bypass", "joined", None),
        ("wide low rank bypass", "joined", None),
        ("low rank bypass", "two_gemms", None),
        ("low rank bypass", "merged", None),
        *(("circulant bypass", plan, None) for plan in ("fft", "dft", "split", "dense")),
    ],
)


@FORCED
def test_forced_plans_reach_the_operators_and_agree(name, spectral, micro):
    config = CONFIGS[name]
    params, params64 = random_params(config)
    (x,), (x64,) = draw(6, (5, config.d_model))
    y = apply(with_plans(config, spectral, micro), params, x)
    assert_close(y, reference(config, params64, x64))


@pytest.mark.parametrize(
    ("name", "spectral", "micro"),
    [
        ("low rank and polynomial", None, None),
        ("low rank bypass", "joined", None),
        ("circulant bypass", "fft", None),
        ("structured core", None, "slice"),
        ("all", "dft", "rows"),
        ("gated all", "split", "columns"),
    ],
)
def test_products_of_the_hessian_forward_over_reverse(name, spectral, micro):
    config = with_plans(CONFIGS[name], spectral, micro)
    params, _ = random_params(config)
    direction, _ = random_params(config, seed=1)
    (x,), _ = draw(9, (5, config.d_model))

    def loss(params):
        return jnp.sum(jnp.sin(SparseFFN(config).apply({"params": params}, x)))

    def along(params):
        products = jax.tree.map(jnp.vdot, jax.grad(loss)(params), direction)
        return sum(jax.tree.leaves(products))

    forward = jit(lambda params, by: jax.jvp(jax.grad(loss), (params,), (by,))[1])
    product, wanted = forward(params, direction), jit(jax.grad(along))(params)
    for leaf, expected in zip(jax.tree.leaves(product), jax.tree.leaves(wanted), strict=True):
        assert_close(leaf, expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("polynomial", [None, PolynomialConfig(3, groups=2)])
def test_one_kernel_for_a_low_rank_layer_equals_a_plan_for_each_map(gated, polynomial):
    def layer(plan):
        branch = SpectralConfig("low_rank", 96, 16, implementation=plan)
        config = SparseFFNConfig(48, 96, spectral=branch, polynomial=polynomial, gated=gated)
        return SparseFFN(config, dtype=jnp.bfloat16)

    (x, dy), _ = draw(0, (2, 37, 48), (2, 37, 48), dtype="bfloat16")
    variables = jax.jit(layer("fused").init)(jax.random.key(0), x)
    found, wanted = (
        value_and_vjp(layer(plan).apply, (variables, x), dy) for plan in ("fused", "two_gemms")
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(one, other, "bfloat16")
    packed = layer("fused").pack(variables, x.shape[0] * x.shape[1])
    assert_close(layer("fused").apply(packed, x), found[0], "bfloat16")


def is_packed(path):
    return not any("bias" in key.key or key.key == "polynomial" for key in path)


@FORCED
def test_packed_weights_stand_for_the_parameters(name, spectral, micro):
    config = CONFIGS[name]
    params, params64 = random_params(config)
    # What was packed is read from nowhere else.
    gone = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full_like(leaf, jnp.nan) if is_packed(path) else leaf, params
    )
    # Summing products, "rows" refuses half precision.
    for dtype in DTYPES[:1] if micro == "rows" else DTYPES:
        (x,), (x64,) = draw(6, (5, config.d_model), dtype=dtype)
        layer = SparseFFN(with_plans(config, spectral, micro), dtype=dtype)
        variables = layer.pack({"params": params}, 5)
        y = jax.jit(layer.apply)({**variables, "params": gone}, x)
        assert_close(y, reference(config, params64, x64), dtype, factor=2.0)
        leaves = jax.tree.leaves(variables["packed"])
        assert {str(leaf.dtype) for leaf in leaves} <= {dtype, "complex64"}


def test_a_call_with_another_plan_packs_its_own_weights():
    config = SparseFFNConfig(48, 96, spectral=SpectralConfig("block_circulant", 96, block_size=8))
    layer = SparseFFN(config)
    (one, many), _ = draw(0, (1, 48), (3000, 48))
    params = jax.jit(layer.init)(jax.random.key(0), one)
    variables = layer.pack(params, 1)
    (name,) = variables["packed"]["spectral"]
    with recorded() as chosen:
        y = layer.apply(variables, many)
    assert chosen[0].plan not in name
    assert_close(y, layer.apply(params, many))
    both = layer.pack(params, 1, 3000)
    assert len(both["packed"]["spectral"]) == 2
    assert_close(layer.apply(both, many), y)


@pytest.mark.parametrize(
    ("name", "plan"), [("low rank", None), ("circulant", "dft"), ("unstructured core", None)]
)
def test_tiles_follow_the_platform_that_is_lowered_for(name, plan):
    config = with_plans(CONFIGS[name], plan, "rows")
    layer, params = SparseFFN(config), {"params": shapes_of(config)}
    # More tokens than a tile has on CPU; elsewhere all are taken at once.
    x = jax.ShapeDtypeStruct((200_000, D), jnp.float32)
    traced = jax.jit(lambda v, x: jax.grad(lambda v: layer.apply(v, x).sum())(v)).trace(params, x)
    assert "stablehlo.while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.while" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_plan_is_chosen_for_each_platform():
    scattered = BlockMask.from_array(np.eye(8, dtype=bool) | (np.arange(8) == 0), (64, 64))
    (x, kernel), _ = draw(0, (2048, 512), scattered.kernel_shape)
    traced = jax.jit(lambda x, k: block_sparse_matmul(x, k, scattered)).trace(x, kernel)
    # A GEMM a block row on CPU; on a GPU one for all block columns with equally many blocks.
    products = [
        traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.dot_general")
        for platform in ("cpu", "cuda")
    ]
    assert products == [8, 2]


def test_a_training_layer_has_no_packed_weights():
    layer = SparseFFN(CONFIGS["all"])
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((2, D)))
    assert set(variables) == {"params"}


def test_forced_plans_change_the_program():
    def multiply_adds(name, spectral=None, micro=None):
        layer = SparseFFN(with_plans(CONFIGS[name], spectral, micro))
        params, _ = random_params(CONFIGS[name])
        return count_flops(layer.apply, {"params": params}, jnp.ones((50, D))).dot // 2

    assert multiply_adds("low rank", "two_gemms") < multiply_adds("low rank", "merged")
    assert multiply_adds("circulant", "dft") != multiply_adds("circulant", "dense")
    assert multiply_adds("structured core", micro="slice") < multiply_adds(
        "structured core", micro="masked"
    )
    for plan in ("rows", "columns", "gather"):
        assert multiply_adds("unstructured core", micro=plan) < multiply_adds(
            "unstructured core", micro="masked"
        )


def test_a_forced_plan_that_cannot_run_says_why():
    layer = SparseFFN(with_plans(CONFIGS["unstructured core"], micro="slice"))
    with pytest.raises(ValueError, match="cannot run as 'slice' here"):
        layer.init(jax.random.key(0), jnp.ones((2, D)))


# Multiply-adds of one token, by hand: up + down, at D = 12 and M = 24.
HAND_COUNTED = {
    "low rank": (3 * (12 + 24) + 5 * (24 + 12), 0),
    "low rank and polynomial": (3 * (12 + 24) + 5 * (24 + 12), 0),
    # b = 6: 2 x 4 blocks; 4 products for the 2 complex frequencies each, 4 for DC and Nyquist
    # together; all 6 components in and out.
    "circulant": (2 * (2 * 4 * (4 + 4 + 4) + (12 + 24) * 6), 0),
    # Frequency 1 and Nyquist: 3 of 6 components.
    "masked circulant": (2 * (2 * 4 * (4 + 1) + (12 + 24) * 3), 0),
    "core": (0, 12 * 24 * 2),
    "unstructured core": (0, 7 * 4 * 6 + 6 * 6 * 4),
    "structured core": (0, 8 * 12 + 12 * 8),
    # Corrections: 3 blocks of 4 x 4, and both rows of 2 columns of 3.
    "corrections": (3 * (12 + 24) + 5 * (24 + 12), 3 * 16 + 12 * 6),
    "all": (
        2 * (2 * 4 * (4 + 1) + (12 + 24) * 3),
        7 * 4 * 6 + 6 * 6 * 4 + 3 * 16 + 12 * 6,
    ),
    "gated low rank": (2 * 3 * (16 + 24) + 5 * (24 + 16), 3 * 16 * 8),
    "low rank bypass": (3 * (12 + 12), 3 * 12 * 8),
    "wide low rank bypass": (11 * (12 + 12), 2 * 12 * 4),
    # 2 x 2 blocks; 3 of 6 components.
    "circulant bypass": (2 * 2 * (4 + 1) + (12 + 12) * 3, 2 * 12 * 8 + 3 * 16 + 12 * 6),
    # b = 4: 3 x 3 blocks; 4 products for the complex frequency, 4 for DC and Nyquist together.
    "bypass alone": (3 * 3 * (4 + 4) + (12 + 12) * 4, 0),
    "gated all": (
        # Gate and up share the transform of the inputs.
        3 * 2 * 4 * (4 + 1) + (12 + 2 * 24 + 24 + 12) * 3,
        2 * 7 * 4 * 6 + 6 * 6 * 4 + 3 * 16 + 12 * 6,
    ),
    "gated core": (0, 2 * 7 * 4 * 6 + 6 * 6 * 4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_by_hand_analytically_and_in_the_program(name, monkeypatch):
    # A plan that multiplies what lives alone, where the cost model would rather not.
    monkeypatch.setattr(costs, "_SCATTERED", 1e6)
    config = CONFIGS[name]
    spectral, micro = HAND_COUNTED[name]
    flops = flops_per_token(config)
    # One Clenshaw step is 3 operations, and degree 4 takes 4 of them for each of 24 units.
    polynomial = 3 * 4 * 24 if config.polynomial else 0
    assert flops == {"spectral": 2 * spectral, "polynomial": polynomial, "micro": 2 * micro}
    plans = {"low_rank": "two_gemms", "block_circulant": "dft"}
    forced = with_plans(config, config.spectral and plans[config.spectral.transform])
    if name in ("unstructured core", "all", "gated all", "gated core"):
        forced = with_plans(forced, forced.spectral and forced.spectral.implementation, "gather")
    params, _ = random_params(config)
    tokens = 5
    x = jnp.ones((tokens, config.d_model))
    count = count_flops(SparseFFN(forced).apply, {"params": params}, x)
    assert count.dot == 2 * tokens * (spectral + micro)


PARAMETERS = {
    "low rank": 12 * 3 + 3 * 24 + 24 + 24 * 5 + 5 * 12 + 12,
    "low rank and polynomial": 12 * 3 + 3 * 24 + 24 + 24 * 5 + 5 * 12 + 12 + 3 * 4,
    "circulant": 2 * (2 * 4 * 6) + 24 + 12,
    "masked circulant": 2 * (2 * 4 * 3) + 24 + 12,
    "core": 12 * 24 * 2 + 24 + 12,
    "unstructured core": 7 * 4 * 6 + 6 * 6 * 4 + 24 + 12,
    # Half of the hidden units are read by no output.
    "structured core": 8 * 12 + 12 * 8 + 12 + 12,
    "corrections": 12 * 3 + 3 * 24 + 24 + 24 * 5 + 5 * 12 + 12 + 3 * 16 + 12 * 6,
    "all": (2 * (2 * 4 * 3) + 24 + 3 * 4) + (7 * 4 * 6 + 6 * 6 * 4 + 24) + (3 * 16 + 12 * 6) + 12,
    "gated low rank": 2 * 3 * (16 + 24) + 5 * (24 + 16) + 3 * 4 + 3 * 16 * 8,
    "low rank bypass": 2 * 3 * 12 + 3 * 12 * 8,
    "wide low rank bypass": 2 * 11 * 12 + 2 * 12 * 4 + 4 + 12,
    "circulant bypass": 2 * 2 * 3 + (2 * 12 * 8 + 8) + (3 * 16 + 12 * 6) + 12,
    "bypass alone": 3 * 3 * 4 + 12,
    "gated all": 3 * (2 * 4 * 3)
    + 2 * 24
    + 3 * 4
    + 2 * (7 * 4 * 6 + 24)
    + 6 * 6 * 4
    + (3 * 16 + 12 * 6)
    + 12,
    "gated core": 2 * (7 * 4 * 6 + 24) + 6 * 6 * 4 + 12,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_masked_has_no_parameter(name):
    leaves = jax.tree.leaves(shapes_of(CONFIGS[name]))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]
    assert all(leaf.size for leaf in leaves)


@pytest.mark.parametrize(("b", "mask"), [(1, None), (2, None), (6, (True, False, False, True))])
def test_real_frequencies_alone_have_no_imaginary_parameter(b, mask):
    spectral = SpectralConfig("block_circulant", M, block_size=b, frequency_mask=mask)
    config = SparseFFNConfig(D, M, spectral=spectral)
    assert set(shapes_of(config)["spectral"]["up"]) == {"real", "bias"}
    params, params64 = random_params(config)
    (x,), (x64,) = draw(7, (3, D))
    assert_close(apply(config, params, x), reference(config, params64, x64))


def wide(**parts):
    return SparseFFNConfig(96, 384, **parts)


def wide_core(up, down):
    core = CoreConfig(
        384,
        BlockMask.from_array(up, (8, 8)),
        BlockMask.from_array(down, (8, 8)),
    )
    return wide(micro=MicroRefinementConfig(core))


def scattered(rows, columns, density):
    blocks = np.random.default_rng(0).random((rows, columns)) < density
    return blocks | np.eye(rows, columns, dtype=bool)


@pytest.mark.parametrize(
    "config",
    [
        wide(spectral=SpectralConfig("low_rank", 384, rank=24)),
        wide(spectral=SpectralConfig("block_circulant", 384, block_size=8)),
        wide(spectral=SpectralConfig("block_circulant", 384, block_size=3)),
        wide(spectral=SpectralConfig("block_circulant", 384, block_size=1)),
        wide(
            spectral=SpectralConfig(
                "block_circulant",
                384,
                block_size=16,
                frequency_mask=(False, True, True) + (False,) * 6,
            )
        ),
        wide(
            spectral=SpectralConfig(
                "block_circulant", 384, block_size=4, frequency_mask=(True, False, False)
            )
        ),
        wide(
            spectral=SpectralConfig("low_rank", 384, rank=24),
            polynomial=PolynomialConfig(4, radius=100.0),
        ),
        wide(micro=MicroRefinementConfig(CoreConfig(384))),
        wide_core(scattered(12, 48, 0.25), scattered(48, 12, 0.25)),
        # A quarter of the hidden units live.
        wide_core(
            np.ones((12, 1)) * (np.arange(48) < 12), (np.arange(48) < 12)[:, None] * np.ones(12)
        ),
    ],
    ids=[
        "low rank",
        "circulant",
        "odd circulant",
        "diagonal",
        "two frequencies",
        "only DC",
        "polynomial",
        "dense core",
        "unstructured core",
        "structured core",
    ],
)
def test_a_fresh_layer_has_the_variance_of_a_dense_one(config):
    x = jax.random.normal(jax.random.key(0), (256, 96))
    rng = np.random.default_rng(0)
    first = rng.normal(0.0, 96**-0.5, (96, 384))
    second = rng.normal(0.0, 384**-0.5, (384, 96))
    hidden = np.asarray(x, np.float64) @ first
    dense = (hidden if config.polynomial else gelu_new(hidden)) @ second
    y, _ = jit(SparseFFN(config).init_with_output)(jax.random.key(1), x)
    assert 0.25 < float(jnp.var(y)) / dense.var() < 4.0


def test_refuses_other_channels():
    with pytest.raises(ValueError, match="x has 13 channels, but d_model=12"):
        SparseFFN(ALL).init(jax.random.key(0), jnp.ones((2, 13)))
