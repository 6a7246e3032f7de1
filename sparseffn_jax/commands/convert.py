"""The command ``sparseffn convert``."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sparseffn_jax.checkpoints.cards import model_card, origin_of, table
from sparseffn_jax.checkpoints.hub import check_push, push_to_hub
from sparseffn_jax.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained
from sparseffn_jax.commands.arguments.convert import ConvertArguments
from sparseffn_jax.commands.common import DTYPES, matching_tokenizer, read_windows
from sparseffn_jax.commands.plan import Plan
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.progress import counter, stage
from sparseffn_jax.sparsify.convert import sparsify
from sparseffn_jax.sparsify.layers import ConvertedLayer
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.train.documents import read_text

# FFN FLOPs over the dense ones, where nothing else is asked for.
_FLOPS = 0.4


class Convert(ConvertArguments):
    """Replaces a dense model's FFNs by sparse ones."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        if self.push is not None:
            check_push(self.push)
        if self._plan is not None:
            self._make_plan(self._plan, console)
        with stage("loading the model", console):
            dense = load_pretrained(self.model, param_dtype=None, on_demand=True)
            configs = self._configs(dense)
            tokenizer = matching_tokenizer(self.model, dense)
        read, _ = read_windows(self, tokenizer, dense.spec.n_positions, console)
        windows, window = read.train, read.train.shape[1] - 1
        order = np.random.default_rng(self.seed).permutation(len(windows))
        chosen = order[: max(1, self.calibration_tokens // window)]
        errors: list[float] = []
        with self._stoppable(), counter("converting layer", console) as count:

            def on_layer(layer: ConvertedLayer) -> None:
                count(layer.layer + 1, dense.spec.n_layer)
                errors.append(layer.error)
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
                stream_dtype=DTYPES[self.stream_dtype],
                seed=self.seed,
                work_dir=self._work_dir,
                on_layer=on_layer,
            )
        with stage(f"writing {self.out}", console):
            card = model_card(
                self.push or self.out.name,
                model,
                params,
                origin_of(self.model, dense.folder),
                self._card_section(len(chosen) * window, errors),
            )
            save_pretrained(
                self.out, model, params, tokenizer=tokenizer, overwrite=self.overwrite, card=card
            )
        shutil.rmtree(self._work_dir)
        console.print(f"wrote {self.out}; recover its quality with: sparseffn finetune")
        if self.push is not None:
            with stage(f"pushing {self.out}", console):
                url = push_to_hub(self.out, self.push, private=self.private or None)
            console.print(f"pushed {self.out} to {self.push}: {url}")

    def _card_section(self, tokens: int, errors: list[float]) -> str:
        rows = [
            ("calibration", f"{tokens:,} tokens of {Path(self.text).name}"),
            ("distillation, layer by layer", f"{self.distill_steps} steps a layer"),
            ("repair", f"{self.repair:g} of what the layers before have lost"),
        ]
        if errors:
            worst = f"{max(errors):.4f} in the worst layer"
            rows.append(
                ("error", f"{np.mean(errors):.4f} of the targets' variance on average, {worst}")
            )
        if self._plan is not None:
            rows += self._plan.card_rows()
        return f"## Converted\n\n{table(('', ''), rows)}"

    @property
    def _work_dir(self) -> Path:
        # Beside --out, so that it is on the same disk and is found by the same command.
        return self.out.with_name(self.out.name + ".partial")

    @property
    def _plan(self) -> Plan | None:
        if not self.is_planned:
            return None
        return Plan(
            self.model,
            self.out.with_name(self.out.name + ".plan"),
            self.budget,
            servable=self.servable,
            text=self.text,
            validation_text=self.validation_text,
            text_tokens=self.text_tokens,
            calibration_tokens=min(self.calibration_tokens, Plan.calibration_tokens),
            window=self.window,
            batch_size=self.batch_size,
            repair=self.repair,
            seed=self.seed,
        )

    def _make_plan(self, plan: Plan, console: Console) -> None:
        # Times differ from run to run: what has been converted by a plan goes on by that plan.
        if not (self._work_dir.exists() and plan.is_made):
            plan.run(console)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; {self._work_dir} keeps the converted layers, and the same command goes "
                "on"
            ) from None

    def _configs(self, dense: Pretrained) -> Any:
        if self._plan is not None:
            return SparseFFNConfig.layers_from_json(read_text(self._plan.plan_file))
        if self.config is not None:
            return SparseFFNConfig.layers_from_json(read_text(self.config))
        return size_model(dense.spec, self.budget.given.get("flops", _FLOPS))
