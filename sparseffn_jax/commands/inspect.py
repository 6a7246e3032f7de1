"""The command ``sparseffn inspect``."""

import dataclasses
import itertools

import jax
from rich.console import Console
from rich.table import Table

from sparseffn_jax.bench.estimated import estimate_layer, known_gpu
from sparseffn_jax.checkpoints.pretrained import Pretrained, load_pretrained
from sparseffn_jax.commands.arguments.inspect import InspectArguments
from sparseffn_jax.commands.common import DTYPES
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.measure.autotune import FEW_TOKENS, autotune
from sparseffn_jax.measure.costs import mean_flops_ratio
from sparseffn_jax.measure.gpus import GPU
from sparseffn_jax.measure.layers import describe_layer
from sparseffn_jax.measure.records import make_folder
from sparseffn_jax.models.spec import DecoderSpec
from sparseffn_jax.ops.plans.choice import PlanTable, using
from sparseffn_jax.progress import counter, stage
from sparseffn_jax.sparsify.sizing import size_model


class Inspect(InspectArguments):
    """Shows what a model's FFNs are made of."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        if self.device is not None:
            # Without the compiler it is refused here, before anything is read.
            known_gpu(self.device).devices()
        with stage("loading the model"):
            pretrained = load_pretrained(self.model)
        if self.autotune:
            self._autotune(pretrained, console)
        if self.json:
            ffns = pretrained.ffns or (None,) * pretrained.spec.n_layer
            console.print_json(data=[None if ffn is None else ffn.to_dict() for ffn in ffns])
            return
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
        if not self.json:
            console.print(f"wrote {len(table.plans)} plans to {self.plans}")

    def _show(self, pretrained: Pretrained, console: Console) -> None:
        spec, model = pretrained.spec, pretrained.model()
        ffns = pretrained.ffns or (None,) * spec.n_layer
        layers = {ffn: describe_layer(model, ffns.index(ffn), self.tokens) for ffn in set(ffns)}
        parameters = sum(layers[ffn].parameters for ffn in ffns)
        share = parameters / sum(leaf.size for leaf in jax.tree.leaves(pretrained.params))
        totals = {
            "layers": "all",
            "parts": f"{share:.0%} of the model's parameters",
            "parameters": f"{parameters:,}",
            "FLOPs a token": f"{sum(layers[ffn].flops for ffn in ffns):,}",
            "of dense": f"{mean_flops_ratio(ffns):.3f}",
        }
        caption = "Each line is of one layer, the last of all together."
        seconds: dict[SparseFFNConfig | None, float] = {}
        if self.device is not None:
            gpu = known_gpu(self.device)
            with counter("compiling layer") as count:
                for each in {*ffns, None}:
                    seconds[each] = self._estimate(each, spec, gpu)
                    count(len(seconds), len({*ffns, None}))
            whole = sum(seconds[ffn] for ffn in ffns)
            totals["us"] = f"{1e6 * whole:.1f}"
            caption += (
                f" us: a forward pass of {self.tokens} tokens in {self.dtype}, estimated for "
                f"{gpu.description} and not measured"
            )
            if any(ffns):
                caption += (
                    f"; dense FFNs take {seconds[None] * spec.n_layer / whole:.2f} times that"
                )
            caption += "."
        title = f"{self.model}: d_model={spec.d_model}, d_ff={spec.d_ff}"
        table = Table(title=title, caption=caption, show_footer=True)
        for name, total in totals.items():
            is_text = name in ("layers", "parts")
            table.add_column(name, total, justify="left" if is_text else "right")
        table.add_column("operator: plan")
        for ffn, alike in itertools.groupby(range(spec.n_layer), key=ffns.__getitem__):
            first, *others = alike
            layer = layers[ffn]
            table.add_row(
                f"{first}-{others[-1]}" if others else str(first),
                "\n".join(layer.parts),
                f"{layer.parameters:,}",
                f"{layer.flops:,}",
                f"{layer.flops_ratio:.3f}",
                *([f"{1e6 * seconds[ffn]:.1f}"] if seconds else []),
                "\n".join(f"{name.replace('_', ' ')}: {plan}" for name, plan in layer.plans),
            )
        console.print(table)

    def _estimate(self, ffn: SparseFFNConfig | None, spec: DecoderSpec, gpu: GPU) -> float:
        config = size_model(spec, 1.0) if ffn is None else ffn
        # Few tokens are decoded, by weights that are packed before.
        mode = "decoding" if self.tokens <= FEW_TOKENS else "forward"
        return estimate_layer(config, mode, self.tokens, DTYPES[self.dtype], gpu).seconds
