"""What each part of a conversion without gradient steps gains, on text that it did not see.

python campaigns/ablation.py MODEL TEXT --flops 0.4 --plan planned=plan/plan.json

The first row is narrow FFNs whose units are kept by importance and refitted; each row below has one
part more, and those of --plan share the same budget out among the layers. "Fisher" stands for units
and bypasses that are chosen in the metric of the loss instead of that of the outputs.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import campaign
import numpy as np
from rich.console import Console

import sparseffn_jax as sf
from sparseffn_jax.bench.peers import narrow
from sparseffn_jax.bench.published import KeepUnits
from sparseffn_jax.defaults import REPAIR
from sparseffn_jax.progress import counter
from sparseffn_jax.sparsify.dense import DenseFFN, Linear
from sparseffn_jax.sparsify.fisher import output_fisher
from sparseffn_jax.sparsify.fit import fit_layer
from sparseffn_jax.sparsify.layers import convert_layers
from sparseffn_jax.sparsify.planning import root_of
from sparseffn_jax.sparsify.selection import score_units
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.sparsify.streams import LayerActivations


class Row(NamedTuple):
    """A way to convert the model.

    Attributes:
      configs: the configuration of each layer.
      fit: how a layer is fitted: by ``"importance"``, ``"elimination"`` or ``"fisher"``.
      repair: share of earlier losses that a layer makes up for.
    """

    configs: Any
    fit: str
    repair: float


def importance(dense: DenseFFN, activations: LayerActivations, *, centred: bool) -> np.ndarray:
    """Returns the output variance that each unit contributes."""
    return score_units(dense, activations, centred=centred).importance


def fit_in_metric(
    dense: DenseFFN,
    config: sf.SparseFFNConfig,
    activations: LayerActivations,
    root: np.ndarray,
) -> tuple[sf.SparseFFNConfig, Any]:
    """Fits a layer of a core and a bypass whose outputs are multiplied by ``root`` meanwhile."""
    back = np.linalg.inv(root)
    down = Linear(dense.down.weight @ root, dense.down.bias @ root)
    config, leaves = fit_layer(
        dataclasses.replace(dense, down=down),
        config,
        dataclasses.replace(activations, target=activations.target @ np.float32(root)),
    )
    if "bypass" in leaves.get("spectral", {}):
        leaves["spectral"]["bypass"]["filter"] @= back
    leaves["core"]["down"]["kernel"] @= back
    if config.bias:
        leaves["bias"] @= back
    return config, leaves


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    campaign.add_subject(parser, calibration_tokens=32768, window=1024, validation_windows=12)
    parser.add_argument("--flops", type=float, default=0.4)
    parser.add_argument("--plan", nargs="*", default=[], help="NAME=FILE as sparseffn plan writes")
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of the rows; default all")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation.json"))
    arguments = parser.parse_args()
    subject = campaign.load_subject(arguments)
    dense, chosen = subject.dense, subject.chosen
    model, spec = dense.model(), dense.spec
    console = Console(soft_wrap=True)
    fisher = output_fisher(model, dense.params, chosen)

    def convert(row: Row) -> float:
        def fit(layer: int, dense: DenseFFN, activations: LayerActivations) -> tuple[Any, Any]:
            config = row.configs[layer]
            if row.fit == "importance":
                score = functools.partial(importance, centred=config.bias)
                return KeepUnits(score, refit=True)(dense, config, activations)
            if row.fit == "fisher":
                return fit_in_metric(dense, config, activations, root_of(fisher[layer]))
            return fit_layer(dense, config, activations)

        with counter("converting layer", console) as count:
            return subject.loss(
                *convert_layers(
                    model,
                    dense.params,
                    [i for i, config in enumerate(row.configs) if config is not None],
                    fit,
                    chosen[:, :-1],
                    repair=row.repair,
                    batch_size=4,
                    on_layer=lambda layer: count(layer.layer + 1, spec.n_layer),
                )
            )

    every = (narrow(spec, arguments.flops),) * spec.n_layer
    beside = (size_model(spec, arguments.flops, bypass=True),) * spec.n_layer
    rows = {
        "narrow by importance, refitted": Row(every, "importance", 0.0),
        "by elimination": Row(every, "elimination", 0.0),
        "and repair": Row(every, "elimination", REPAIR),
        "and a bypass": Row(beside, "elimination", REPAIR),
        "and Fisher": Row(beside, "fisher", REPAIR),
    }
    for name, file in (given.split("=", 1) for given in arguments.plan):
        configs = sf.SparseFFNConfig.layers_from_json(Path(file).read_text(encoding="utf-8"))
        rows[f"{name}: plan"] = Row(configs, "elimination", REPAIR)
        rows[f"{name}: plan and Fisher"] = Row(configs, "fisher", REPAIR)
    taken = [row for i, row in enumerate(rows) if arguments.rows is None or i in arguments.rows]
    dense_loss = subject.loss(model, dense.params)
    results = {"dense, nats a token": f"{dense_loss:.4f}"}
    for name in taken:
        results[name] = f"{convert(rows[name]) - dense_loss:+.4f}"
        console.print(f"{name}: {results[name]}")
    campaign.finish("Loss over dense after conversion", results, [], arguments.out, vars(arguments))


if __name__ == "__main__":
    main()
