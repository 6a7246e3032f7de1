"""How well a plan's predicted damage orders plans: random plans against the loss after conversion.

python campaigns/plan_accuracy.py MODEL TEXT --plans 30

Each plan starts from a share of the FFN FLOPs between 0.3 and 0.9, which every layer varies at
random, and is converted without gradient steps.
"""

import argparse
from pathlib import Path
from typing import Any

import campaign
import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

import sparseffn_jax as sf
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.progress import counter
from sparseffn_jax.sparsify.fisher import output_fisher
from sparseffn_jax.sparsify.planning import Planner, config_of, estimate_layers, size_grid, size_of
from sparseffn_jax.sparsify.trials import try_out


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    campaign.add_subject(parser, calibration_tokens=16384, window=256, validation_windows=64)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/plan_accuracy.json"))
    arguments = parser.parse_args()
    subject = campaign.load_subject(arguments)
    dense, chosen = subject.dense, subject.chosen
    model, spec, tokens = dense.model(), dense.spec, chosen[:, :-1]
    console, rng = Console(soft_wrap=True), np.random.default_rng(0)

    fisher = output_fisher(model, dense.params, chosen)
    grid = size_grid(spec)
    damages = []
    with counter("estimating layer", console) as count:
        for layer in estimate_layers(model, dense.params, tokens, fisher, grid):
            damages.append(layer)
            count(len(damages), spec.n_layer)
    planner = Planner(model, dense.params, tokens, fisher, damages)

    def flops(config: sf.SparseFFNConfig | None) -> float:
        return 1.0 if config is None else flops_ratio(config)

    try_out([(planner, planner.plan(flops, budget=0.5 * spec.n_layer).configs)])

    sizes = [size for size in damages[0] if size != (spec.d_ff, 0)]
    costs = np.array([flops(config_of(spec, size)) for size in sizes])

    def draw() -> list[Any]:
        share = rng.uniform(0.3, 0.9)
        wanted = np.clip(share * np.exp(rng.normal(0.0, 0.35, spec.n_layer)), 0.1, 1.0)
        # One of the ten sizes nearest to what the layer may cost.
        near = np.argsort(np.abs(costs[None] - wanted[:, None]), axis=1)[:, :10]
        return [config_of(spec, sizes[rng.choice(row)]) for row in near]

    dense_loss = subject.loss(model, dense.params)
    rows, predicted, measured = {}, [], []
    with counter("converting plan", console) as count:
        for number in range(arguments.plans):
            configs = draw()
            converted = sf.sparsify(
                model, dense.params, configs, tokens, distill_steps=0, batch_size=4
            )
            own = [
                layer[size_of(config, spec)] for layer, config in zip(damages, configs, strict=True)
            ]
            predicted.append([float(planner.weights @ own), sum(own)])
            measured.append(subject.loss(*converted) - dense_loss)
            rows[f"plan {number}: FLOPs, predicted, measured"] = (
                f"{np.mean([flops(config) for config in configs]):.3f}, "
                f"{predicted[-1][0]:.4f}, {measured[-1]:+.4f}"
            )
            count(number + 1, arguments.plans)
    for i, name in enumerate(("predicted", "predicted without a trial")):
        correlation = spearmanr([pair[i] for pair in predicted], measured).statistic
        rows[f"rank correlation of {name} and measured"] = f"{correlation:.4f}"
    campaign.finish("Predicted and measured damage", rows, [], arguments.out, vars(arguments))


if __name__ == "__main__":
    main()
