"""Run by test_run_lock.py: trains in a folder, or is refused it, as a process of its own.

Once it has written a checkpoint it writes a line, and goes on when it has read one.
"""

import sys
import time
from pathlib import Path


def main():
    from train_models import make_model, make_windows

    from sparseffn_jax.train.config import TrainConfig
    from sparseffn_jax.train.loop import train

    config = TrainConfig(steps=3, batch_size=3, save_every=1, eval_every=0, log_every=1)

    out_dir = Path(sys.argv[1])

    def on_step(step, _):
        if step == 2:
            while not (out_dir / "checkpoints" / "1" / "manifest.json").exists():
                time.sleep(0.01)
            print("training", flush=True)
            sys.stdin.readline()

    try:
        train(*make_model(), make_windows(), config, out_dir, on_step=on_step)
    except OSError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
