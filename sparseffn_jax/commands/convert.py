"""The command ``sparseffn convert``."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sparseffn_jax.checkpoints.folders import check_replaceable
from sparseffn_jax.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained
from sparseffn_jax.commands.common import check_at_least, matching_tokenizer
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.progress import counter, stage
from sparseffn_jax.sparsify.convert import sparsify
from sparseffn_jax.sparsify.layers import REPAIR, ConvertedLayer
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.train.data import STDLIB, load_windows, read_text


@dataclasses.dataclass(frozen=True)
class Convert:
    """Replace a dense checkpoint's FFNs by SparseFFNs that start near them.

    Layer by layer: closed-form warm start, then distillation; no end-to-end training (that is
    "finetune"). The result is a folder in Hugging Face format. The same command goes on where it
    stopped; until then --out with ".partial" behind it holds the layers so far.

    Attributes:
      model: Folder, GGUF file or hub name of a dense model.
      out: Folder to write.
      config: JSON file of one SparseFFNConfig for every layer, or a list with one (or null, to
        keep the layer dense) for each; see "inspect". Without it --flops decides.
      flops: FFN FLOPs over the dense ones, where no --config is given.
      text: Calibration text; see "demo".
      calibration_tokens: Tokens of it to use; ten for each hidden unit of a layer or more.
      window: Tokens in a window; default the smaller of n_positions and 1024.
      batch_size: Windows computed at once; changes time and memory, not the result.
      distill_steps: Of distillation, for each layer; 0 for none.
      repair: Share, from 0 to 1, of what the layers before have lost that a layer makes up for.
      seed: Of the choice of windows.
      plans: Table of measured plans to choose by, as "inspect --autotune" writes it.
      overwrite: Replace an existing model in --out.
    """

    model: str
    out: Path
    config: Path | None = None
    flops: float = 0.4
    text: str = STDLIB
    calibration_tokens: int = 65536
    window: int | None = None
    batch_size: int = 4
    distill_steps: int = 300
    repair: float = REPAIR
    seed: int = 0
    plans: Path | None = None
    overwrite: bool = False

    def run(self, console: Console) -> None:
        """Runs the command."""
        check_at_least("calibration_tokens", self.calibration_tokens, 1)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("distill_steps", self.distill_steps, 0)
        check_replaceable(self.out, self.overwrite)
        with stage("loading the model", console):
            dense = load_pretrained(self.model, param_dtype=None, on_demand=True)
            configs = self._configs(dense)
            tokenizer = matching_tokenizer(self.model, dense)
        with stage("reading the text", console):
            window = check_window(self.window, dense.spec.n_positions)
            windows = load_windows(self.text, tokenizer, window).train
        order = np.random.default_rng(self.seed).permutation(len(windows))
        chosen = order[: max(1, self.calibration_tokens // window)]
        # Beside --out, so that it is on the same disk and is found by the same command.
        work_dir = self.out.with_name(self.out.name + ".partial")
        with self._stoppable(work_dir), counter("converting layer", console) as count:

            def on_layer(layer: ConvertedLayer) -> None:
                count(layer.layer + 1, dense.spec.n_layer)
                console.print(
                    f"layer {layer.layer}: error {layer.error:.4f} of the targets' variance, "
                    f"{layer.seconds:.1f} s"
                )

            model, params = sparsify(
                dense.model(),
                dense.params,
                configs,
                windows[chosen, :-1],
                distill_steps=self.distill_steps,
                repair=self.repair,
                batch_size=self.batch_size,
                seed=self.seed,
                work_dir=work_dir,
                on_layer=on_layer,
            )
        save_pretrained(self.out, model, params, tokenizer=tokenizer, overwrite=self.overwrite)
        shutil.rmtree(work_dir)
        console.print(f"wrote {self.out}; recover its quality with: sparseffn finetune")

    @staticmethod
    @contextlib.contextmanager
    def _stoppable(work_dir: Path) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; {work_dir} keeps the converted layers, and the same command goes on"
            ) from None

    def _configs(self, dense: Pretrained) -> Any:
        if self.config is None:
            return size_model(dense.spec, self.flops)
        return SparseFFNConfig.layers_from_json(read_text(self.config))
