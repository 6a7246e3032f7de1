"""The benches run, compare like with like, and write what they say they write."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_layers
import gpu_step
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from transformers import GPT2Config, LlamaConfig

import sparseffn_jax as sf
from sparseffn_jax.bench import layer as layer_bench
from sparseffn_jax.bench import model as model_bench
from sparseffn_jax.bench import pytorch_model
from sparseffn_jax.bench.external import torch_refusal
from sparseffn_jax.cli import main
from sparseffn_jax.commands import bench as bench_commands
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.ops.plans.choice import PlanTable, pick, platform_of

ONLY = ("low-rank-21", "circulant-16", "circulant-16-half")


def test_the_grid_is_what_its_names_say():
    configs = layer_bench.grid(768, 3072)
    ratios = {name: flops_ratio(config) for name, config in configs.items()}
    assert ratios["low-rank-64"] == 64 * (768 + 3072) / (768 * 3072)
    assert ratios["narrow-1/4"] == ratios["structured-1/4"] == 0.25
    assert ratios["unstructured-1/4"] == pytest.approx(0.25, abs=0.01)
    assert len(configs["circulant-16-half"].spectral.frequencies) == 5
    assert ratios["bypass-0.4"] <= 0.4
    mask = configs["unstructured-1/4"].micro.core.up_mask
    assert not mask.is_structured
    assert set(np.sum(mask.blocks, axis=0)) == {3}


def test_the_ffn_bench(tmp_path, capfd):
    out = tmp_path / "bench"
    main(
        ["bench", "ffn", "--d-model", "256", "--d-ff", "256", "--tokens", "8", "--repeats", "1",
         "--no-external", "--json", "--out", str(out), "--only", *ONLY]
    )  # fmt: skip
    printed = json.loads(capfd.readouterr().out)
    written = json.loads((out / "ffn.json").read_text())
    assert printed == written
    for picture in ("speedups", "roofline", "parts"):
        assert (out / f"{picture}.png").stat().st_size > 10_000
    rows = {(row["configuration"], row["mode"]): row for row in written["rows"]}
    assert set(rows) == {(n, m) for n in ONLY for m in ("forward", "training", "decoding")}
    for (name, mode), row in rows.items():
        assert row["promised"] == 1.0 / flops_ratio(layer_bench.grid(256, 256)[name])
        assert row["realised"] == pytest.approx(row["speedup"] / row["promised"])
        assert row["tokens"] == (1 if mode == "decoding" else 8)
    assert rows["circulant-16", "training"]["memory_ratio"] > 0
    assert set(rows["circulant-16", "forward"]["plans"]["block_circulant"]) >= {"dft", "dense"}
    assert all(loss >= 1.0 for loss in rows["circulant-16", "forward"]["plan_loss"].values())
    assert "circulant-16 over circulant-16-half" in written["pairs"]
    # Products as counted in the program, over those on paper.
    assert written["counted_flops"]["low-rank-21"] == pytest.approx(
        {"forward": 1.0, "training": 1.0}, rel=0.02
    )


# Tiles are larger than the embedded model's layers.
@pytest.mark.filterwarnings("ignore:a GPU multiplies whole tiles")
def test_the_ffn_bench_estimates_for_a_gpu_that_is_not_here(tmp_path, capfd):
    argv = [
        *("bench", "ffn", "--d-model", "256", "--d-ff", "256", "--tokens", "64"),
        *("--dtype", "bfloat16", "--device", "h100", "--out", str(tmp_path)),
        *("--only", "narrow-1/4"),
    ]
    main([*argv, "--json"])
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((tmp_path / "ffn-h100.json").read_text())
    assert printed["gpu"].startswith("NVIDIA H100")
    rows = {row["mode"]: row for row in printed["rows"]}
    assert [rows[mode]["tokens"] for mode in ("forward", "training", "decoding")] == [64, 64, 1]
    for row in rows.values():
        assert row["promised"] == 4.0
        assert 0.0 < row["seconds"] < 1e-3
        assert row["kernels"] >= 2
        assert row["weights_copied"] == 0
    assert rows["training"]["bytes_moved"] > rows["forward"]["bytes_moved"]
    main(argv)
    assert "narrow-1/4" in capfd.readouterr().out


def test_the_model_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(model_bench, "SIZES", {"small": (32, 2, 2)})
    monkeypatch.setattr(model_bench, "_VOCABULARY", 97)
    settings = model_bench.ModelBenchSettings(
        layers=1, window=8, prompt=4, decoded=3, repeats=1, out=tmp_path
    )
    result = model_bench.run_model_bench(settings, Console(quiet=True))
    # JSON knows no tuples.
    assert json.loads((tmp_path / "model.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["times"]) == {"evaluation", "training step", "generation"}
    assert all(times["candidate_seconds"] > 0 for times in result["times"].values())
    assert set(result["compile_seconds"]) == {"dense", "sparse", "unequal"}
    if "pytorch" not in result:
        assert all(times["over_pytorch"]["dense"] > 0 for times in result["times"].values())
    assert model_bench.model_table(result).row_count == 4


def test_the_model_bench_takes_a_model_of_the_users(tmp_path):
    config = LlamaConfig(
        vocab_size=97, max_position_embeddings=16, hidden_size=32, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = sf.LlamaForCausalLM(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    sf.save_pretrained(tmp_path / "dense", model, params)
    settings = model_bench.ModelBenchSettings(
        model=str(tmp_path / "dense"), circulant_block=8, window=8, prompt=4, decoded=3, repeats=1,
        external=False, out=tmp_path,
    )  # fmt: skip
    result = model_bench.run_model_bench(settings, Console(quiet=True))
    assert result["pytorch"] == "not asked for"
    assert result["ffn"]["gated"]
    assert result["ffn"]["spectral"]["block_size"] == 8
    settings = dataclasses.replace(settings, decoded=13)
    with pytest.raises(ValueError, match="need 17 positions: the model has 16"):
        model_bench.run_model_bench(settings, Console(quiet=True))


@pytest.mark.skipif(torch_refusal() is not None, reason=str(torch_refusal()))
def test_pytorch_computes_what_ours_does(tmp_path):
    import torch

    config = GPT2Config(
        vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = sf.GPT2LMHeadModel(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda x: x * 6.0 if x.ndim == 2 else x, params)
    sf.save_pretrained(tmp_path, model, params)
    theirs = pytorch_model.PyTorchModel(config, "float32")
    theirs._model = type(theirs._model).from_pretrained(tmp_path, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(97, size=(3, 9), dtype=np.int32)
    before = sf.evaluate_loss(model, params, tokens, 3)
    assert theirs.evaluation(tokens)() == pytest.approx(before, rel=1e-5)
    np.testing.assert_array_equal(
        theirs.generation(tokens[:1, :4], 5)(), sf.generate(model, params, tokens[:1, :4], 5)
    )
    train = sf.TrainConfig(steps=1, learning_rate=1e-3)
    assert theirs.training_step(tokens, train)() == pytest.approx(before, rel=1e-5)
    assert theirs.evaluation(tokens)() < before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ffn", "--d-model", "100"], "--d-model 100 and --d-ff 3072 must be multiples"),
        (["ffn", "--only", "magic"], "unknown configurations magic: expected some of low-rank-64"),
        (["ffn", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["ffn", "--device", "h900"], "--device 'h900' is not known: expected one of a100, h100"),
        (["model", "--circulant-block", "5"], "width=3072 is not a multiple of block_size=5"),
        (["model", "--flops", "2"], "flops_ratio=2.0 must lie above 0"),
        (["model", "--layers", "13"], "--layers 13 must lie between 1 and 12"),
        (["quality", "--targets", "0.5"], "a target speed-up of 0.5 must be above 1"),
        (["model", "--plans", "no/plans.json"], "no/plans.json"),
    ],
)
def test_wrong_settings_are_refused(argv, message, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *argv])
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("bench", ["ffn", "model", "quality"])
def test_a_table_of_measured_plans_is_followed(bench, monkeypatch, tmp_path):
    path = tmp_path / "plans.json"
    PlanTable(jax.devices()[0].device_kind, {("product", (8,)): "measured"}).save(path)
    followed = []

    def run(settings, console):
        costs = {"cheapest": 1.0, "measured": 2.0}
        plan = pick("product", None, costs, problem=(8,), platform=platform_of(()))
        followed.append(plan)
        # Nothing else of the command is wanted here.
        raise KeyboardInterrupt

    name = "run_quality" if bench == "quality" else f"run_{bench}_bench"
    monkeypatch.setattr(bench_commands, name, run)
    for options in ([], ["--plans", str(path)]):
        with pytest.raises(SystemExit):
            main(["bench", bench, *options])
    assert followed == ["cheapest", "measured"]


def test_the_gpu_campaign_asks_for_what_its_scripts_have(monkeypatch, tmp_path):
    calls = tmp_path / "calls"
    for name, body in (("nvidia-smi", "echo NVIDIA H100"), ("python", f'echo "$@" >> {calls}')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = Path(__file__).parents[2] / "campaigns" / "gpu.sh"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", script], check=True, env=os.environ | {"PATH": path})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_layers, "measure", lambda *_: {"us": 1.0, "temporary_mib": 0.0})
    monkeypatch.setattr(gpu_step, "measure", lambda *_: {"ms": 1.0})
    scripts = {"campaigns/gpu_layers.py": gpu_layers, "campaigns/gpu_step.py": gpu_step}
    for line in calls.read_text().splitlines():
        monkeypatch.setattr(sys, "argv", line.split())
        scripts.pop(sys.argv[0]).main()
    assert not scripts
    (folder,) = (tmp_path / "campaigns" / "results").iterdir()
    assert folder.name.endswith("-nvidia-h100")
    rows = json.loads((folder / "layers.json").read_text())["rows"]
    assert {row["speedup"] for row in rows} == {1.0}
    steps = json.loads((folder / "gpt2_small.json").read_text())["steps"]
    assert list(steps) == ["dense", "default-0.4"]
