"""Kills training at random moments and resumes it, and compares the end with an undisturbed run.

    python campaigns/kill_and_resume.py --kills 30

The run saves at every other step, so that many of the moments lie within a save.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import campaign
import jax
import numpy as np
from rich.progress import Progress

import sparseffn_jax as sf

STEPS = 120


def main() -> None:
    """Runs the campaign, or, started by it, the training that is to be killed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill_and_resume.json"))
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train is not None:
        train(arguments.train)
        return
    choose = random.Random(arguments.seed)
    failures: list[str] = []
    kills = runs = fallbacks = 0
    during: list[int] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("kills", total=arguments.kills)
        reference = Path(folder) / "undisturbed"
        seconds = _seconds_of_training(reference)
        expected = dict(np.load(reference / "end.npz"))
        while kills < arguments.kills and not failures:
            out = Path(folder) / "killed"
            shutil.rmtree(out, ignore_errors=True)
            runs += 1
            while not (out / "end.npz").exists():
                worker = _start(out)
                if kills < arguments.kills:
                    # From the first step on: until then nothing has changed.
                    _wait_for_a_line(worker)
                    time.sleep(choose.uniform(0.0, 0.8 * seconds))
                    worker.kill()
                _, errors = worker.communicate()
                fallbacks += errors.count("is not whole")
                if worker.returncode == -9:
                    kills += 1
                    progress.advance(task)
                    during.append(len(list((out / "checkpoints").glob("*tmp*"))))
                elif worker.returncode != 0:
                    failures.append(f"run {runs} after {kills} kills: {errors[-1500:]}")
                    break
            else:
                if not campaign.same_bits(dict(np.load(out / "end.npz")), expected):
                    failures.append(f"run {runs}: the final parameters differ")
    rows = {
        "kills": kills,
        "of them within a save": sum(map(bool, during)),
        "checkpoints found unfinished and passed over": fallbacks,
        "runs brought to their end": runs,
        "with other final parameters or unresumable": len(failures),
    }
    settings = {"kills": arguments.kills, "seed": arguments.seed, "steps": STEPS}
    campaign.finish("Killed and resumed", rows, failures, arguments.out, settings)


def train(out: Path) -> None:
    """Trains, says when the first step is done, and leaves the final parameters."""
    jax.config.update("jax_compilation_cache_dir", str(out.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model, params = campaign.tiny_model()
    config = campaign.tiny_config(steps=STEPS, save_every=2)

    def on_step(*_) -> None:
        print("step", flush=True)

    result = sf.train(model, params, campaign.tiny_windows(), config, out, on_step=on_step)
    partial = out / "partial.npz"
    arrays: dict[str, Any] = campaign.flat(result.params)
    np.savez(partial, **arrays)
    partial.rename(out / "end.npz")


def _start(out: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--train", str(out)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def _wait_for_a_line(worker: subprocess.Popen) -> None:
    assert worker.stdout is not None
    worker.stdout.readline()


def _seconds_of_training(out: Path) -> float:
    worker = _start(out)
    _wait_for_a_line(worker)
    started = time.perf_counter()
    worker.communicate()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
