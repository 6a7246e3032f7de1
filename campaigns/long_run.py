"""Trains a tiny model for 2000 steps: memory must not grow, and the step compile once.

python campaigns/long_run.py
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import campaign
import jax
from rich.progress import Progress

import sparseffn_jax as sf


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=400, help="steps before memory counts")
    parser.add_argument("--out", type=Path, default=Path("runs/long_run.json"))
    arguments = parser.parse_args()
    compiled: list[str] = []

    def on_compile(event: str, duration_secs: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            del duration_secs
            compiled.append(details.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(on_compile)
    model, params = campaign.tiny_model()
    config = campaign.tiny_config(steps=arguments.steps, eval_every=200, save_every=100)
    resident: dict[int, int] = {}
    at_warm_up = 0
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("training", total=arguments.steps)

        def on_step(step: int, _) -> None:
            nonlocal at_warm_up
            progress.update(task, completed=step)
            if step == arguments.warm_up:
                at_warm_up = len(compiled)
            if step % 50 == 0:
                resident[step] = _resident_bytes()

        sf.train(model, params, campaign.tiny_windows(), config, folder, on_step=on_step)
    steps = [step for step in resident if step >= arguments.warm_up]
    growth = resident[steps[-1]] / resident[steps[0]] - 1.0
    step_compilations = sum(name == "step" or "step" in name for name in compiled)
    rows = {
        "steps": arguments.steps,
        "resident after warm-up": f"{resident[steps[0]] / 2**20:.1f} MiB",
        "resident at the end": f"{resident[steps[-1]] / 2**20:.1f} MiB",
        "growth": f"{100 * growth:.2f} %",
        "compilations of the step": step_compilations,
        "compilations after warm-up": len(compiled) - at_warm_up,
    }
    failures = []
    if growth >= 0.02:
        failures.append(f"memory grew by {100 * growth:.2f} %: expected less than 2 %")
    if step_compilations != 1:
        failures.append(f"the step was compiled {step_compilations} times: {compiled}")
    campaign.finish("A long run", rows, failures, arguments.out, {"resident": resident})


def _resident_bytes() -> int:
    match = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(match[1]) if match else 0


if __name__ == "__main__":
    main()
