"""Damages training checkpoints in all ways that disks and people have, and resumes from them.

    python campaigns/corrupt_checkpoints.py --checkpoints 200

Each time one to three faults hit a run's folder with three checkpoints. What the run then resumes
from must be, bit for bit, what was written under that step, or nothing: a damaged checkpoint that
is taken for a whole one fails the campaign. Some runs are also brought to their end and compared.
"""

import argparse
import collections
import contextlib
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import campaign
import jax
import numpy as np
from rich.progress import track

import sparseffn_jax as sf
from sparseffn_jax.train.checkpoints import CheckpointStore

STEPS, SAVED, LAST = 16, (4, 8, 12), 13
CONFIG = campaign.tiny_config(steps=STEPS, save_every=4)


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--to-the-end", type=int, default=10, help="how many runs are finished")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/corrupt_checkpoints.json"))
    arguments = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        expected = campaign.flat(train(folder / "undisturbed").params)
        written = folder / "written"
        with contextlib.suppress(InterruptedError):
            train(written, crash=LAST + 1)
        contents = {step: read(written, step) for step in SAVED}
        for number in track(range(arguments.checkpoints), description="corrupting"):
            choose = random.Random(f"{arguments.seed}/{number}")
            out = folder / "damaged"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(written, out)
            faults = [choose.choice(FAULTS) for _ in range(choose.choice((1, 1, 2, 3)))]
            for fault in faults:
                # The newest one most of the time: that is what a resumed run would take.
                fault(choose, out / "checkpoints" / str(choose.choice((12, 12, 12, 8, 4))))
            done = ", ".join(fault.__name__ for fault in faults)
            try:
                with CheckpointStore(out, keep=3) as store:
                    step = store.latest_step()
                if step is not None and not campaign.same_bits(read(out, step), contents[step]):
                    failures.append(f"{number} ({done}): step {step} was loaded, but is damaged")
                if number < arguments.to_the_end:
                    ended = campaign.flat(train(out).params)
                    if not campaign.same_bits(ended, expected):
                        failures.append(f"{number} ({done}): the run ended with other parameters")
                    counts["brought to their end, bit-equal"] += 1
            except Exception as error:
                failures.append(f"{number} ({done}): {type(error).__name__}: {error}")
                continue
            counts[
                "harmless: the newest was not hit"
                if step == max(SAVED)
                else "none was whole, begun again"
                if step is None
                else f"fell back to step {step}"
            ] += 1
    rows = {"corrupted": arguments.checkpoints, **counts, "silently wrong": len(failures)}
    settings = {"checkpoints": arguments.checkpoints, "seed": arguments.seed}
    campaign.finish("Corrupted checkpoints", rows, failures, arguments.out, settings)


def train(out: Path, crash: int | None = None) -> sf.TrainResult:
    """Trains, or goes on; may crash on the way."""
    model, params = campaign.tiny_model()

    def on_step(step: int, _) -> None:
        if step == crash:
            raise InterruptedError

    return sf.train(model, params, campaign.tiny_windows(), CONFIG, out, on_step=on_step)


def read(out: Path, step: int) -> dict[str, np.ndarray]:
    """Returns all arrays that a resumed run takes from a checkpoint."""
    _, params = campaign.tiny_model()
    with CheckpointStore(out, keep=3) as store:
        position, _, settings = store.read(step)
        arrays = campaign.flat(store.restore_params(step, params, lambda shapes: shapes))
    text = np.frombuffer(f"{position} {settings}".encode(), np.uint8)
    return arrays | {"position": text}


# --- faults ------------------------------------------------------------------------------------


def truncate(choose: random.Random, checkpoint: Path) -> None:
    """Cuts a file short."""
    file = _any(choose, checkpoint)
    data = file.read_bytes()
    file.write_bytes(data[: choose.randrange(len(data))] if data else b"?")


def flip_a_bit(choose: random.Random, checkpoint: Path) -> None:
    """Flips one bit."""
    file = _any(choose, checkpoint)
    data = bytearray(file.read_bytes() or b"?")
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    file.write_bytes(data)


def zero(choose: random.Random, checkpoint: Path) -> None:
    """Overwrites a file by zeros, as a lost block reads."""
    file = _any(choose, checkpoint)
    file.write_bytes(bytes(file.stat().st_size or 1))


def lose_a_file(choose: random.Random, checkpoint: Path) -> None:
    """Removes a file."""
    _any(choose, checkpoint).unlink()


def lose_the_manifest(_: random.Random, checkpoint: Path) -> None:
    """Removes the manifest, as if the run had died before it."""
    (checkpoint / "manifest.json").unlink(missing_ok=True)


def swap_two_files(choose: random.Random, checkpoint: Path) -> None:
    """Exchanges two files of one checkpoint."""
    _exchange(_any(choose, checkpoint), _any(choose, checkpoint))


def swap_with_another(choose: random.Random, checkpoint: Path) -> None:
    """Exchanges an item with that of another checkpoint."""
    other = checkpoint.with_name(str(choose.choice(SAVED)))
    item = choose.choice(("ffn", "rest", "optimizer", "position", "manifest.json"))
    if (checkpoint / item).exists() and (other / item).exists():
        _exchange(checkpoint / item, other / item)


def swap_checkpoints(choose: random.Random, checkpoint: Path) -> None:
    """Exchanges two whole checkpoints."""
    _exchange(checkpoint, checkpoint.with_name(str(choose.choice(SAVED))))


def add_a_file(choose: random.Random, checkpoint: Path) -> None:
    """Puts a file there that is not of it."""
    (_any(choose, checkpoint).parent / "stray").write_bytes(choose.randbytes(9))


FAULTS: tuple[Callable[[random.Random, Path], None], ...] = (
    truncate,
    flip_a_bit,
    flip_a_bit,
    zero,
    lose_a_file,
    lose_the_manifest,
    swap_two_files,
    swap_with_another,
    swap_checkpoints,
    add_a_file,
)


def _any(choose: random.Random, checkpoint: Path) -> Path:
    return choose.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))


def _exchange(a: Path, b: Path) -> None:
    if a != b:
        aside = a.with_name(".aside")
        a.rename(aside)
        b.rename(a)
        aside.rename(b)


if __name__ == "__main__":
    main()
