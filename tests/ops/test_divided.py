"""Kernels that XLA cannot look into, on several devices; see divided_worker.py for the runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sparseffn_jax as sf
from sparseffn_jax.measure.gpus import compile_for, gpus

HERE = Path(__file__).parent


def test_eight_devices_give_what_float64_gives():
    roots = (HERE.parents[1], HERE.parent, HERE)
    environment = {"PYTHONPATH": os.pathsep.join(map(str, roots)), "JAX_PLATFORMS": "cpu"}
    worker = subprocess.run(
        [sys.executable, HERE / "divided_worker.py"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert worker.returncode == 0, worker.stdout[-4000:]
    # Three layers in five places, one in one, and two mapped; libraries may have spoken too.
    assert len(re.findall("^(gated|circulant)[ ,]", worker.stdout, re.MULTILINE)) == 18


@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (4, 2)])
def test_eight_hopper_gpus_share_a_layer(data, tensor):
    h100 = gpus()["h100"]
    mesh = Mesh(h100.devices(1, 8).reshape(data, tensor), ("data", "tensor"))
    branch = sf.SpectralConfig("low_rank", width=1024, rank=32)
    layer = sf.SparseFFN(sf.SparseFFNConfig(256, 1024, spectral=branch), dtype=jnp.bfloat16)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 256)))
    specs = {"up/filter": P(None, "tensor"), "up/bias": P("tensor"), "down/axes": P("tensor")}

    def placed(path, leaf):
        spec = specs.get("/".join(entry.key for entry in path[-2:]), P())
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    variables = jax.tree_util.tree_map_with_path(placed, shapes)

    def cost(tokens):
        x = jax.ShapeDtypeStruct(
            (tokens, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("data"))
        )
        program = compile_for(
            h100, jax.grad(lambda v, x: layer.apply(v, x).astype(jnp.float32).sum()), variables, x
        )
        return program, [kernel for kernel in program.kernels if "pallas" in kernel.name]

    # Each device multiplies its tokens by its hidden units: 2, 3 and 4 products of one size.
    tokens = 2**17
    program, kernels = cost(tokens)
    assert sorted(kernel.matrix_flops for kernel in kernels) == [
        products * 2 * (tokens // data) * (1024 // tensor) * 32 for products in (2, 3, 4)
    ]
    # Neither tokens nor weights go elsewhere; what is summed has the width of a rank.
    assert set(program.collective_bytes) == {"all-reduce"}
    # Devices without work would wait: with so few tokens the layer runs in plain products.
    assert cost(2**13)[1] == []
