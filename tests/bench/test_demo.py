"""The demo's plan, on a clock that does not tick; the command itself is run in test_cli.py."""

import io

import pytest
from rich.console import Console

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.demo import DemoSettings, run_demo
from sparseffn_jax.measure.costs import dense_flops, flops_per_token


def demo(tiny, out, **changes):
    few = {
        "steps": 2, "batch_size": 2, "calibration_windows": 32, "distill_steps": 0,
        "evaluation_windows": 4, "sweep": (1.0,), "prompt": "def",
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=140)
    return run_demo(DemoSettings(**tiny, out=out, **few, **changes), console), console.file


def test_layers_are_planned_for_a_speedup(tiny, exact_clock, tmp_path):
    report, printed = demo(tiny, tmp_path, ffn_speedup=3.0)
    configs = [SparseFFNConfig.from_dict(config) for config in report["ffn_configs"]]
    assert 3.0 <= report["ffn_speedup"] < 4.0
    flops = report["ffn_flops_per_token"]
    assert flops["dense"] == len(configs) * dense_flops(32, 128, gated=False)
    counted = sum(sum(flops_per_token(config).values()) for config in configs)
    assert flops["sparse"] == counted
    assert report["ffn_flops_ratio"] == pytest.approx(counted / flops["dense"])
    assert f"layer 0: {configs[0].micro.core.width} units" in printed.getvalue()


def test_a_speedup_out_of_reach_is_refused(tiny, exact_clock, tmp_path):
    with pytest.raises(ValueError, match="ffn_speedup=1000 is out of reach"):
        demo(tiny, tmp_path, ffn_speedup=1000.0)
    with pytest.raises(ValueError, match=r"ffn_speedup=1\.0 must be above 1"):
        demo(tiny, tmp_path, ffn_speedup=1.0)


def test_layers_can_be_made_alike(tiny, exact_clock, tmp_path):
    report, _ = demo(tiny, tmp_path, flops=0.5)
    assert report["ffn_flops_ratio"] <= 0.5
    assert not (tmp_path / "estimates.json").exists()
