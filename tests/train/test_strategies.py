"""All ways to share the work give the same run; see parallel_worker.py for the runs themselves."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from communication import data_parallel_bytes
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import LlamaConfig

import sparseffn_jax as sf
from sparseffn_jax.measure.gpus import gpus
from sparseffn_jax.measure.programs import read_program
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.distributed import DistributedConfig
from sparseffn_jax.train.run_lock import hold_run_folder
from sparseffn_jax.train.sharding import (
    BATCH_SPEC,
    leaf_sharding,
    make_mesh,
    parse_mesh,
    shardings,
)
from sparseffn_jax.train.step import init_state, make_stage, make_update
from sparseffn_jax.train.strategies import STEP_SCALARS, MeshSharding, make_strategy

HERE = Path(__file__).parent


def start(*arguments):
    root = HERE.parents[1]
    roots = os.pathsep.join(map(str, (root, root / "tests", root / "campaigns")))
    return subprocess.Popen(
        [sys.executable, HERE / "parallel_worker.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": roots, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*workers):
    for worker in workers:
        output, _ = worker.communicate(timeout=300)
        assert worker.returncode == 0, output[-4000:]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What a process with eight devices saw, and its folder."""
    out = tmp_path_factory.mktemp("eight")
    finish(start(out))
    return json.loads((out / "seen.json").read_text()), out


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What a process with four devices saw where some targets do not count."""
    out = tmp_path_factory.mktemp("counted")
    finish(start(out, "--devices", 4, "--counted"))
    return json.loads((out / "seen.json").read_text())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes saw together, and their folder; this one held another."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--devices", 4, "--port", port)
    with hold_run_folder(out / "held"):
        finish(*(start(out, *options, "--process", i) for i in (0, 1)))
    return [json.loads((out / f"seen{i}.json").read_text()) for i in (0, 1)], out


@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_eight_devices_train_as_one(eight, strategy):
    seen, _ = eight
    assert len(seen["single"]["losses"]) == 6
    for what in ("losses", "validation"):
        np.testing.assert_allclose(seen[strategy][what], seen["single"][what], rtol=1e-5)
    assert seen[strategy]["hash"] == seen["single"]["hash"]


def test_muon_on_eight_devices(eight):
    seen = eight[0]["muon"]
    np.testing.assert_allclose(seen["mesh"], seen["single"], rtol=1e-4)
    assert seen["replicated"] == []


@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_microbatches_train_as_the_large_batch(eight, strategy):
    seen, _ = eight
    for what in ("losses", "validation"):
        np.testing.assert_allclose(
            seen[f"{strategy}, accumulated"][what], seen["large"][what], rtol=1e-5
        )
    assert seen[f"{strategy}, accumulated"]["hash"] == seen["large"]["hash"]


def test_an_update_under_pmap_trains_as_one_device(eight):
    seen, _ = eight
    losses = np.array(seen["under_pmap"])
    assert losses.shape == (6, 8)
    np.testing.assert_array_equal(losses, losses[:, :1].repeat(8, axis=1))
    np.testing.assert_allclose(losses[:, 0], seen["single"]["losses"], rtol=1e-5)


@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_a_loss_on_some_targets_is_the_same_on_four_devices(counted, strategy):
    for what in ("losses", "validation"):
        np.testing.assert_allclose(counted[strategy][what], counted["single"][what], rtol=1e-5)
    assert counted[strategy]["hash"] == counted["single"]["hash"]


def test_a_loss_on_some_targets_is_the_same_under_pmap(counted):
    losses = np.array(counted["under_pmap"])
    np.testing.assert_array_equal(losses, losses[:, :1].repeat(4, axis=1))
    np.testing.assert_allclose(losses[:, 0], counted["single"]["losses"], rtol=1e-5)


@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_two_processes_train_as_one_device(eight, two_processes, strategy):
    (first, second), out = two_processes
    single = eight[0]["single"]
    assert first[strategy] == second[strategy]
    for what in ("losses", "validation"):
        np.testing.assert_allclose(first[strategy][what], single[what], rtol=1e-5)
    assert first[strategy]["hash"] == single["hash"]
    log = (out / strategy / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 7))


def test_two_processes_are_refused_a_folder_together(two_processes):
    for seen in two_processes[0]:
        assert f"process {os.getpid()} on host" in seen["refusal"]


def test_no_process_ends_before_the_checkpoint_is_sealed(two_processes):
    assert [seen["sealed"] for seen in two_processes[0]] == [True, True]


@pytest.mark.parametrize("onto", ["single", "four"])
def test_a_mesh_checkpoint_goes_onto_other_devices(eight, onto):
    _, out = eight
    written, restored = np.load(out / "mesh.npz"), np.load(out / f"mesh_on_{onto}.npz")
    assert set(written) == set(restored)
    for name in written:
        np.testing.assert_array_equal(restored[name], written[name], err_msg=name)


def test_the_mesh_splits_what_the_table_says(eight):
    seen, _ = eight
    specs = {path.removeprefix("transformer/"): spec for path, spec in seen["specs"].items()}
    assert specs["h/1/mlp/c_fc/kernel"] == ["tensor", "fsdp"]
    assert specs["h/0/mlp/spectral/down/axes"] == ["tensor", "fsdp"]
    assert specs["h/0/attn/c_proj/kernel"] == ["fsdp", "tensor"]
    # 97 tokens cannot be dealt out to two, so both axes share the channels.
    assert specs["wte/embedding"] == ["None", "('tensor', 'fsdp')"]
    # What the report would list, had it these sizes: no matrix but the smallest.
    assert not any(path.endswith(("kernel", "embedding")) for path in seen["replicated"])


def test_weights_are_joined_unless_hidden_units_are_divided(eight):
    assert eight[0]["plans"] == {
        "data=8": ["joined"],
        "fsdp=8": ["joined"],
        "data=4,tensor=2": ["two_gemms"],
    }


def test_communication_is_what_the_formulas_say(eight):
    seen = eight[0]["communication"]
    sent, parameters = seen["sent"], seen["parameters"]
    # Gradients, and a few numbers for losses and norms.
    gradients = data_parallel_bytes(parameters, 8)
    assert set(sent["data=8"]) == {"all-reduce"}
    assert sent["data=8"]["all-reduce"] == pytest.approx(gradients, rel=0.01)
    # On CPU XLA leaves most sums of gradients an all-reduce, of which each device then takes its
    # piece; forward and backward pass share what was gathered.
    fsdp = sent["fsdp=8"]
    assert 0.8 * gradients < fsdp["all-reduce"] + fsdp["all-to-all"] < gradients
    assert fsdp["all-gather"] == pytest.approx(7 / 8 * 4 * seen["split"], rel=0.02)
    # The chunks of the loss send nothing: each device sums up its own gradient of the head.
    assert seen["in_loops"] == {"data=8": {}, "fsdp=8": {}}


def test_on_gpus_each_device_sums_up_its_own_piece_of_the_gradient():
    strategy = MeshSharding("fsdp=8", list(gpus()["h100"].devices(1, 8)[0]))
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    model = sf.LlamaForCausalLM(config, dtype=jnp.bfloat16, remat=True)
    ids = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    train = TrainConfig(recipe="full", batch_size=8)
    stage = make_stage(train, params, 0)
    state, frozen = jax.eval_shape(functools.partial(init_state, stage), params)
    update = make_update(
        model, stage, train, gather=strategy.gather, batch_shards=strategy.batch_shards
    )
    batch = jax.ShapeDtypeStruct(
        (8, 129), jnp.int32, sharding=NamedSharding(strategy.mesh, BATCH_SPEC)
    )
    everywhere = NamedSharding(strategy.mesh, P())
    scalars = [jax.ShapeDtypeStruct((), x.dtype, sharding=everywhere) for x in STEP_SCALARS]
    step = jax.jit(update, out_shardings=(shardings(strategy.mesh, state), everywhere))
    args = strategy.abstract(state), strategy.abstract(frozen), None, batch, *scalars
    with strategy.tracing():
        traced = step.trace(*args)
    lowered = traced.lower(lowering_platforms=("cuda",))
    sent = read_program(lowered.compile()).collective_bytes
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Weights travel in 16 bits, for the forward and for the backward pass; gradients in 16 or 32.
    assert sent["all-gather"] == pytest.approx(2 * 2 * parameters, rel=0.25)
    assert 1.9 * parameters < sent["reduce-scatter"] < 4.1 * parameters
    assert sent["all-reduce"] < 0.02 * sent["reduce-scatter"]


def mesh_of(**sizes):
    return jax.sharding.AbstractMesh(
        tuple(sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor")),
        ("data", "fsdp", "tensor"),
    )


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("mlp/spectral/up/real", (5, 4, 16), P(None, "fsdp", "tensor")),
        ("mlp/spectral/down/imag", (3, 16, 4), P(None, "tensor", "fsdp")),
        ("mlp/spectral/gate/filter", (8, 32), P("fsdp", "tensor")),
        ("mlp/spectral/bypass/axes", (32, 8), P("fsdp", "tensor")),
        ("mlp/spectral/bypass/filter", (8, 32), P("tensor", "fsdp")),
        ("mlp/spectral/bypass/imag", (3, 4, 4), P(None, "tensor", "fsdp")),
        ("mlp/core/up/kernel", (6, 16, 8), P("tensor", "fsdp", None)),
        ("mlp/core/down/kernel", (6, 16, 8), P("tensor", None, "fsdp")),
        ("mlp/core/up/kernel", (32, 64), P("fsdp", "tensor")),
        ("mlp/correction_0/kernel", (6, 8, 8), P("tensor", "fsdp", None)),
        ("self_attn/q_proj/kernel", (32, 32), P("fsdp", "tensor")),
        ("mlp/down_proj/kernel", (64, 32), P("tensor", "fsdp")),
        ("ln_1/scale", (32,), P()),
        # No side of seven takes two devices; one that does takes both axes.
        ("mlp/c_fc/kernel", (7, 8), P(None, ("tensor", "fsdp"))),
        ("mlp/c_fc/kernel", (7, 9), P(None, None)),
    ],
)
def test_rules(path, shape, spec):
    keys = tuple(jax.tree_util.DictKey(name) for name in path.split("/"))
    found = leaf_sharding(mesh_of(fsdp=2, tensor=2), keys, shape).spec
    assert P(*found) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2,fsdp", "has 'fsdp': expected"),
        ("data=2,data=2", "has 'data=2': expected"),
        ("model=2", "has 'model=2': expected"),
        ("data=0", "has 'data=0': expected"),
        ("", "has '': expected"),
    ],
)
def test_meshes_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_what_does_not_fit_is_refused():
    count = jax.device_count()
    with pytest.raises(ValueError, match=rf"takes {2 * count} devices, but there are {count}"):
        make_mesh(parse_mesh(f"fsdp={2 * count}"))
    with pytest.raises(ValueError, match="the mesh strategy, and no other, needs the sizes"):
        make_strategy("mesh")
    with pytest.raises(ValueError, match="the mesh strategy, and no other, needs the sizes"):
        make_strategy("pmap", "data=1")
    with pytest.raises(ValueError, match="unknown strategy 'ddp': expected one of single, pmap"):
        make_strategy("ddp")
    strategy = MeshSharding(f"data={count}")
    strategy.batch_shards = 8
    with pytest.raises(ValueError, match="batch_size=12 cannot be dealt out to 8 parts"):
        strategy.check(TrainConfig(batch_size=12))
    assert make_strategy("pmap").batch_shards == count
    with pytest.raises(ValueError, match="belong together"):
        DistributedConfig(distributed=True, processes=2)
    with pytest.raises(ValueError, match="process=2 must lie between 0 and 1"):
        DistributedConfig(True, "localhost:1", 2, 2)
