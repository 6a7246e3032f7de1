"""Prints what each GPU sends in a training step, by model, number of GPUs and strategy.

    python campaigns/scaling_plan.py

The bytes come from the formulas in communication.py, which a test compares with the collectives
in compiled programs. Weights and activations travel in 16 bits, gradients in 32.
"""

import argparse
from pathlib import Path

from communication import MODELS, Plan, step_bytes
from rich.console import Console
from rich.table import Table

from sparseffn_jax import flops_ratio, size_ffn
from sparseffn_jax.measure.records import write_json

TENSOR = 8  # The GPUs of one node, which NVLink joins.


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, default=8192, help="tokens in one GPU's share of a batch"
    )
    parser.add_argument(
        "--flops", type=float, default=0.4, help="FLOPs of SparseFFN over the dense FFN's"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/scaling_plan.json"), help="JSON file to write"
    )
    arguments = parser.parse_args()
    table = Table(title=f"GB sent by each GPU in a step, {arguments.tokens} tokens a GPU")
    for column in ("model", "GPUs", "strategy", "dense", "SparseFFN", "saved"):
        table.add_column(column, justify="left" if column in ("model", "strategy") else "right")
    rows = []
    for name, size in MODELS.items():
        # Every weight is used once a token, so that the shares of weights and of FLOPs are equal. A
        # gated FFN of three matrices counts as the one of two with as many parameters.
        d_ff = size.ffn // size.layers // (2 * size.d_model)
        ratio = flops_ratio(size_ffn(size.d_model, d_ff, arguments.flops))
        for gpus in (8, 64, 1024):
            plans = {
                "data": Plan(data=gpus),
                "fsdp": Plan(fsdp=gpus),
                f"fsdp in tensor={TENSOR}": Plan(fsdp=gpus // TENSOR, tensor=TENSOR),
            }
            for strategy, plan in plans.items():
                # A node that shares its layers' work shares its batch too.
                tokens = arguments.tokens * plan.tensor
                dense, sparse = (
                    sum(step_bytes(size, plan, tokens, ffn_ratio).values())
                    for ffn_ratio in (1.0, ratio)
                )
                rows.append(
                    {
                        "model": name,
                        "gpus": gpus,
                        "strategy": strategy,
                        "dense_bytes": dense,
                        "sparse_bytes": sparse,
                        "ffn_parameter_ratio": ratio,
                    }
                )
                cells = (f"{dense / 1e9:.2f}", f"{sparse / 1e9:.2f}", f"{1 - sparse / dense:.0%}")
                table.add_row(name, str(gpus), strategy, *cells)
        table.add_section()
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"tokens": arguments.tokens, "rows": rows})


if __name__ == "__main__":
    main()
