"""Programs for GPUs that are not here, compiled by XLA's GPU compiler."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparseffn_jax.config import SparseFFNConfig, SpectralConfig
from sparseffn_jax.measure.gpus import GPU, compile_for, gpus
from sparseffn_jax.measure.programs import TRITON, Kernel
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.sparsify.sizing import size_ffn

GPT2, LLAMA = (768, 3072, False), (4096, 11008, True)


@pytest.fixture
def h100() -> GPU:
    return gpus()["h100"]


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


def layer(
    size: tuple[int, int, bool],
    ratio: float,
    tokens: int,
    *,
    packed: bool,
    bypass: bool | None = True,
):
    """Returns a layer's function, the shapes of its arguments, and the bytes of its weights."""
    d_model, d_ff, gated = size
    options = {"gated": gated, "bias": not gated, "bypass": bypass}
    config = size_ffn(d_model, d_ff, ratio, "silu" if gated else "gelu_new", **options)
    ffn = SparseFFN(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = shape(tokens, d_model)
    variables = jax.eval_shape(ffn.init, jax.random.key(0), x)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    if packed:
        variables = jax.eval_shape(lambda v: ffn.pack(v, tokens, platform="gpu"), variables)
    return ffn.apply, (variables, x), weights


def kernel(**given) -> Kernel:
    fields = dict.fromkeys(Kernel._fields, 0) | {"dtype": "", "is_collective": False}
    return Kernel(**fields | given)


def test_time_is_that_of_the_slowest_of_arithmetic_products_and_memory(h100):
    launch = h100.kernel_seconds(kernel())
    assert 0.0 < launch < 1e-5
    second = {
        "matrix_flops": 0.7 * 989e12,
        "other_flops": 0.7 * 67e12,
        "bytes_read": 0.8 * 3.352e12,
    }
    for name, amount in second.items():
        one = kernel(**{name: amount, "dtype": "bfloat16"})
        assert h100.kernel_seconds(one) == pytest.approx(1.0 + launch)
    every = kernel(**second, dtype="bfloat16")
    assert h100.kernel_seconds(every) == pytest.approx(1.0 + launch)
    few, many = 0.8 * 450e9 / 8, 0.8 * 450e9
    for kind, read, written, seconds in (
        ("all-gather", few, many, 1.0),
        ("reduce-scatter", many, few, 1.0),
        ("all-reduce", many, many, 2.0),
    ):
        sent = kernel(kind=kind, bytes_read=read, bytes_written=written, is_collective=True)
        assert h100.kernel_seconds(sent) == pytest.approx(seconds + launch)


@pytest.mark.parametrize("name", gpus())
def test_every_known_gpu_can_be_compiled_for(name):
    program = compile_for(gpus()[name], lambda x, w: x @ w, shape(2048, 512), shape(512, 1024))
    assert sum(k.times * k.matrix_flops for k in program.kernels) == 2 * 2048 * 512 * 1024
    assert program.memory.arguments == 2 * 512 * (2048 + 1024)
    assert 0.0 < gpus()[name].seconds(program) < 1e-3


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("size", [GPT2, LLAMA])
@pytest.mark.parametrize("ratio", [0.4, 0.25])
def test_a_decoding_step_copies_no_weights(h100, size, ratio, tokens):
    run, args, _ = layer(size, ratio, tokens, packed=True)
    assert compile_for(h100, run, *args).inputs_moved == 0


def test_a_layer_that_is_not_packed_is_seen_to_copy_weights(h100):
    run, args, weights = layer(LLAMA, 0.4, 8192, packed=False)
    assert 0.1 * weights < compile_for(h100, run, *args).inputs_moved <= weights


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_decoding_step_reads_little_beside_the_weights(h100, tokens):
    run, args, weights = layer(LLAMA, 0.4, tokens, packed=True)
    program = compile_for(h100, run, *args)
    assert weights < sum(k.times * k.bytes_read for k in program.kernels) < 1.1 * weights


@pytest.mark.parametrize("bypass", [None, True])
def test_a_layer_is_estimated_faster_than_dense(h100, bypass):
    sparse, dense = (
        h100.seconds(compile_for(h100, run, *args))
        for run, args, _ in (
            layer(LLAMA, ratio, 8192, packed=False, bypass=bypass) for ratio in (0.4, 1.0)
        )
    )
    assert sparse < dense / 2.2


def test_a_low_rank_layer_runs_in_one_kernel_where_its_tiles_fit(h100):
    def program(gpu, plan=None):
        branch = SpectralConfig("low_rank", 3072, 144, implementation=plan)
        ffn = SparseFFN(SparseFFNConfig(768, 3072, spectral=branch), dtype=jnp.bfloat16)
        x = shape(16384, 768)
        variables = jax.eval_shape(ffn.init, jax.random.key(0), x)
        return compile_for(gpu, ffn.apply, variables, x)

    one, each = program(h100), program(h100, "two_gemms")
    names = [kernel.scope.rpartition("/pallas_call")[0] for kernel in one.kernels]
    assert sum(name.endswith("forward_kernel") for name in names) == 1
    # The products are the same, whoever runs them.
    products = [sum(kernel.matrix_flops for kernel in found.kernels) for found in (one, each)]
    assert products[0] == products[1] == 4 * 16384 * 144 * (768 + 3072)
    assert h100.seconds(one) < 0.9 * h100.seconds(each)
    assert one.memory.temporary < 0.1 * each.memory.temporary
    assert not any(kernel.kind in TRITON for kernel in program(gpus()["a100"]).kernels)


def test_collectives_of_a_sharded_gradient_have_their_bytes(h100):
    mesh = Mesh(h100.devices(1, 8).reshape(8), ("data",))

    def loss(w, x):
        return jnp.sum((x @ w).astype(jnp.float32))

    def placed(given, *parts):
        sharding = NamedSharding(mesh, PartitionSpec(*parts))
        return jax.ShapeDtypeStruct(given.shape, given.dtype, sharding=sharding)

    args = placed(shape(512, 1024)), placed(shape(4096, 512), "data")
    program = compile_for(h100, jax.grad(loss), *args)
    assert program.collective_bytes == {"all-reduce": 2 * 2 * 512 * 1024}


def test_without_the_compiler_the_error_says_what_to_install(h100, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sparseffn_jax\[programs\]'"):
        h100.devices()


def test_devices_have_the_shape_that_is_asked_for(h100):
    devices = h100.devices(8, 8)
    assert devices.shape == (8, 8)
    assert len({device.id for device in np.ravel(devices)}) == 64
