"""Run by test_strategies.py: trains on forced host devices, and writes what it saw as JSON.

It is a program of its own because a process's devices are fixed when JAX starts.
"""

import argparse
import json
import os
from pathlib import Path


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--process", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--counted", action="store_true")
    arguments = parser.parse_args()
    count = f"--xla_force_host_platform_device_count={arguments.devices}"
    os.environ["XLA_FLAGS"] += f" {count} --xla_cpu_multi_thread_eigen=false"

    import jax

    if arguments.counted:
        counted_targets(arguments.out)
    elif arguments.process is None:
        one_process(arguments.out)
    else:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{arguments.port}", 2, arguments.process)
        two_processes(arguments.out, arguments.process)


def model_params_config():
    """Returns what all runs share."""
    import jax
    import numpy as np
    from train_models import SPARSE_FFN, make_model

    from sparseffn_jax.train.config import TrainConfig

    model, params = make_model((SPARSE_FFN, None))
    config = TrainConfig(
        steps=6,
        recipe="full",
        learning_rate=1e-3,
        batch_size=8,
        save_every=3,
        eval_every=6,
        log_every=1,
    )
    return model, jax.tree.map(np.asarray, params), config


def fit(strategy, folder, windows=None, **settings):
    """Returns the losses, the hash of the batches and the parameters of a run."""
    import dataclasses

    from train_models import make_windows

    from sparseffn_jax.train.loop import train

    model, params, config = model_params_config()
    losses = []
    result = train(
        model,
        params,
        windows or make_windows(),
        dataclasses.replace(config, **settings),
        folder,
        strategy=strategy,
        on_step=lambda _, metrics: losses.append(metrics["loss"]),
    )
    validation = [r["validation_loss"] for r in result.history if "validation_loss" in r]
    return {"losses": losses, "validation": validation, "hash": result.data_hash}, result.params


def losses_under_pmap(windows, **settings):
    """Returns the losses of a run whose update ``jax.pmap`` compiles, without the loop."""
    import dataclasses

    import jax
    import numpy as np

    from sparseffn_jax.train.data import make_batches
    from sparseffn_jax.train.step import Batch, init_state, make_stage, make_update

    model, params, config = model_params_config()
    config = dataclasses.replace(config, **settings)
    stage = make_stage(config, params, 0)
    count = jax.local_device_count()
    state, frozen = jax.tree.map(
        lambda x: np.broadcast_to(x, (count, *x.shape)), init_state(stage, params)
    )
    step = jax.pmap(
        make_update(model, stage, config, axis_name="replicas"),
        axis_name="replicas",
        in_axes=(0, 0, None, 0, None, None, None),
    )
    rows = np.arange(len(windows.train))
    batches, losses = make_batches(rows, config.batch_size, config.seed), []
    for i in range(config.steps):
        read = next(batches)
        batch = windows.train[read]
        if windows.train_counted is not None:
            batch = Batch(batch, windows.train_counted[read])
        batch = jax.tree.map(lambda x: x.reshape(count, -1, x.shape[-1]), batch)
        state, metrics = step(state, frozen, None, batch, i, i, 1.0)
        losses.append(np.asarray(metrics["loss"]).tolist())
    return losses


def muon_on(mesh):
    """Returns the losses of two steps of Muon, and of what state every device holds all."""
    import dataclasses

    import numpy as np
    from train_models import make_windows

    from sparseffn_jax.train.sharding import replicated_leaves
    from sparseffn_jax.train.step import make_stage, make_update
    from sparseffn_jax.train.strategies import make_strategy

    seen, windows = {}, make_windows().train
    model, params, config = model_params_config()
    config = dataclasses.replace(config, optimizer="muon")
    for where, strategy in (("single", make_strategy("single")), ("mesh", mesh)):
        stage = make_stage(config, params, 0)
        state, frozen = strategy.init_state(stage, params)
        if where == "mesh":
            seen["replicated"] = [leaf.path for leaf in replicated_leaves(state.optimizer, 256)]
        update = make_update(
            model, stage, config, gather=strategy.gather, batch_shards=strategy.batch_shards
        )
        step = strategy.compile(update, state, frozen, None, (8, windows.shape[1]))
        seen[where] = []
        for i in range(2):
            batch = strategy.place_batch(windows, np.arange(8 * i, 8 * i + 8))
            scalars = np.int32(i), np.int32(i), np.float32(1.0)
            state, metrics = step(state, frozen, None, batch, *scalars)
            seen[where].append([float(metrics[key]) for key in ("loss", "update_norm")])
    return seen


def plans_by_mesh():
    """Returns the plans of a core beside a bypass in the step that each mesh compiles."""
    from train_models import SPARSE_FFN, make_model, make_windows

    import sparseffn_jax as sf
    from sparseffn_jax.ops.plans.choice import recorded
    from sparseffn_jax.train.step import make_stage, make_update
    from sparseffn_jax.train.strategies import make_strategy

    ffn = sf.SparseFFNConfig(
        SPARSE_FFN.d_model,
        SPARSE_FFN.d_ff,
        spectral=sf.SpectralConfig("low_rank", rank=4),
        micro=sf.MicroRefinementConfig(sf.CoreConfig(16)),
    )
    model, params = make_model((ffn, None))
    _, _, config = model_params_config()
    plans = {}
    for mesh in ("data=8", "fsdp=8", "data=4,tensor=2"):
        strategy = make_strategy("mesh", mesh)
        stage = make_stage(config, params, 0)
        state, frozen = strategy.init_state(stage, params)
        update = make_update(model, stage, config, gather=strategy.gather)
        shape = config.batch_size, make_windows().train.shape[1]
        with recorded() as picked:
            strategy.compile(update, state, frozen, None, shape)
        plans[mesh] = sorted({choice.plan for choice in picked})
    return plans


def one_process(out):
    import jax
    import numpy as np
    from communication import bytes_sent
    from flax.traverse_util import flatten_dict
    from train_models import make_windows

    from sparseffn_jax.train.sharding import replicated_leaves
    from sparseffn_jax.train.strategies import MeshSharding, make_strategy

    seen = {}
    mesh = make_strategy("mesh", "data=2,fsdp=2,tensor=2")
    for name, strategy in {
        "single": make_strategy("single"),
        "pmap": make_strategy("pmap"),
        "mesh": mesh,
    }.items():
        seen[name], params = fit(strategy, out / name)
        flat = {"/".join(path): np.asarray(x) for path, x in flatten_dict(params).items()}
        np.savez(out / f"{name}.npz", **flat)
        if name == "mesh":
            seen["specs"] = {
                "/".join(path): [str(axes) for axes in x.sharding.spec]
                for path, x in flatten_dict(params).items()
            }
            seen["replicated"] = [leaf.path for leaf in replicated_leaves(params, 256)]
    large = {"batch_size": 16, "steps": 3}
    seen["large"], _ = fit(make_strategy("single"), out / "large", **large)
    for name, strategy in {"pmap": make_strategy("pmap"), "mesh": mesh}.items():
        seen[f"{name}, accumulated"], _ = fit(
            strategy, out / f"{name}-accumulated", accumulate_steps=2, **large
        )
    # What eight devices wrote, on one and on four.
    for name, strategy in {
        "single": make_strategy("single"),
        "four": MeshSharding("fsdp=4", jax.devices()[:4]),
    }.items():
        _, params = fit(strategy, out / "mesh")
        flat = {"/".join(path): np.asarray(x) for path, x in flatten_dict(params).items()}
        np.savez(out / f"mesh_on_{name}.npz", **flat)
    seen["muon"] = muon_on(mesh)
    seen["under_pmap"] = losses_under_pmap(make_windows())
    seen["plans"] = plans_by_mesh()
    seen["communication"] = communication(bytes_sent)
    (out / "seen.json").write_text(json.dumps(seen))


def counted_targets(out):
    """Trains on devices and microbatches of which unequal numbers of targets count, or none."""
    from train_models import make_counted_windows

    from sparseffn_jax.train.strategies import make_strategy

    settings = {"batch_size": 8, "accumulate_steps": 2, "steps": 3, "eval_every": 3}
    windows, seen = make_counted_windows(), {}
    for name, mesh in (("single", None), ("pmap", None), ("mesh", "data=2,fsdp=2")):
        seen[name], _ = fit(make_strategy(name, mesh), out / name, windows, **settings)
    seen["under_pmap"] = losses_under_pmap(windows, **settings)
    (out / "seen.json").write_text(json.dumps(seen))


def communication(bytes_sent):
    """Returns what a step's compiled program sends, and the parameters that train."""
    import jax
    from train_models import SPARSE_FFN, VOCAB_SIZE, make_model, make_windows

    from sparseffn_jax.evaluate import fused_loss
    from sparseffn_jax.train.config import TrainConfig
    from sparseffn_jax.train.step import make_stage, make_update
    from sparseffn_jax.train.strategies import make_strategy

    # Chunks of two tokens: what the loss sends in one of them, it sends eight times.
    fused_loss._CPU = fused_loss._CPU._replace(entries=2 * VOCAB_SIZE)
    model, params = make_model((None, SPARSE_FFN), tie_word_embeddings=False)
    windows, config = make_windows(), TrainConfig(recipe="full", batch_size=8)
    stage, sent, in_loops = make_stage(config, params, 0), {}, {}
    for mesh in ("data=8", "fsdp=8"):
        strategy = make_strategy("mesh", mesh)
        state, frozen = strategy.init_state(stage, params)
        update = make_update(
            model, stage, config, gather=strategy.gather, batch_shards=strategy.batch_shards
        )
        step = strategy.compile(update, state, frozen, None, (8, windows.train.shape[1]))
        sent[mesh] = bytes_sent(step.as_text())
        lines = [line for line in step.as_text().splitlines() if "/while/body/" in line]
        assert lines
        in_loops[mesh] = bytes_sent("\n".join(lines))
    leaves = jax.tree.leaves(state.trainable)
    return {
        "sent": sent,
        "in_loops": in_loops,
        "parameters": sum(x.size for x in leaves),
        "split": sum(x.size for x in leaves if not x.sharding.is_fully_replicated),
    }


def stop_while_sealing_is_slow(strategy, folder):
    """Stops a run after a step; says whether its checkpoint is sealed when that is over."""
    import signal
    import time

    from train_models import make_windows

    from sparseffn_jax.train import checkpoints
    from sparseffn_jax.train.loop import train

    usual = checkpoints.seal

    def slowly(*arguments):
        time.sleep(5)
        usual(*arguments)

    def on_step(*_):
        signal.raise_signal(signal.SIGINT)

    checkpoints.seal = slowly
    model, params, config = model_params_config()
    try:
        train(model, params, make_windows(), config, folder, strategy=strategy, on_step=on_step)
    except KeyboardInterrupt:
        return (folder / "checkpoints" / "1" / "manifest.json").is_file()
    finally:
        checkpoints.seal = usual


def two_processes(out, process):
    from sparseffn_jax.train.run_lock import RunFolderError
    from sparseffn_jax.train.strategies import make_strategy

    seen = {}
    try:
        fit(make_strategy("pmap"), out / "held")
    except RunFolderError as error:
        seen["refusal"] = str(error)
    for name, mesh in (("mesh", "data=2,fsdp=2,tensor=2"), ("pmap", None)):
        seen[name], _ = fit(make_strategy(name, mesh), out / name)
    seen["sealed"] = stop_while_sealing_is_slow(make_strategy("pmap"), out / "stopped")
    (out / f"seen{process}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
