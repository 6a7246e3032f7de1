"""The command ``sparseffn inspect``."""

import dataclasses
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from sparseffn_jax.checkpoints.pretrained import EMBEDDED_MODEL, Pretrained, load_pretrained
from sparseffn_jax.commands.common import check_at_least
from sparseffn_jax.measure.autotune import autotune
from sparseffn_jax.measure.layers import describe_layer
from sparseffn_jax.measure.records import make_folder
from sparseffn_jax.ops.plans.choice import PlanTable, using


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what a model's FFNs are made of: parts, parameters, FLOPs and plans, layer by layer.

    Attributes:
      model: Folder, GGUF file or hub name, dense or sparse.
      tokens: Rows for which the execution plans are chosen (1: decoding).
      plans: Table of measured plans to choose by; see --autotune.
      autotune: Measure the plans of the model's layers here and write the table to --plans.
      json: Also print the layers' SparseFFNConfigs, in the form that "convert --config" reads.
    """

    model: str = str(EMBEDDED_MODEL)
    tokens: int = 2048
    plans: Path | None = None
    autotune: bool = False
    json: bool = False

    def run(self, console: Console) -> None:
        """Runs the command."""
        check_at_least("tokens", self.tokens, 1)
        if self.autotune and self.plans is None:
            raise ValueError("--autotune needs --plans, the file to write the table to")
        pretrained = load_pretrained(self.model)
        if self.autotune:
            self._autotune(pretrained, console)
        with using(self.plans):
            self._show(pretrained, console)

    def _autotune(self, pretrained: Pretrained, console: Console) -> None:
        assert self.plans is not None
        make_folder(self.plans.parent)
        table = PlanTable(jax.devices()[0].device_kind)
        for config in dict.fromkeys(filter(None, pretrained.ffns)):
            with console.status("measuring plans"):
                measured = autotune(config, [self.tokens])
            table = dataclasses.replace(table, plans={**table.plans, **measured.plans})
        table.save(self.plans)
        console.print(f"wrote {len(table.plans)} plans to {self.plans}")

    def _show(self, pretrained: Pretrained, console: Console) -> None:
        spec = pretrained.spec
        table = Table(title=f"{self.model}: d_model={spec.d_model}, d_ff={spec.d_ff}")
        for name in ("layer", "parts", "parameters", "FLOPs a token", "of dense", "plans"):
            table.add_column(name, justify="left" if name in ("parts", "plans") else "right")
        for i in range(spec.n_layer):
            layer = describe_layer(pretrained.model(), i, self.tokens)
            table.add_row(
                str(i),
                "\n".join(layer.parts),
                f"{layer.parameters:,}",
                f"{layer.flops:,}",
                f"{layer.flops_ratio:.3f}",
                "\n".join(f"{name.replace('_', ' ')}: {plan}" for name, plan in layer.plans),
            )
        console.print(table)
        if self.json:
            ffns = pretrained.ffns or (None,) * spec.n_layer
            layers = [None if ffn is None else ffn.to_dict() for ffn in ffns]
            console.print_json(data=layers)
