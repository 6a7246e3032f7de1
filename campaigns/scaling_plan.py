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

from sparseffn_jax import size_ffn
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
        ratio = ffn_parameter_ratio(size.d_model, size.ffn // size.layers, arguments.flops)
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


def ffn_parameter_ratio(d_model: int, ffn_parameters: int, flops: float) -> float:
    """Returns the parameters of a SparseFFN of a FLOPs ratio over those of the dense FFN.

    A gated FFN of three matrices counts as the one of two matrices with as many parameters.

    Args:
      d_model: number of channels in and out.
      ffn_parameters: number of parameters of the dense FFN of one layer.
      flops: FLOPs of the SparseFFN over those of the dense FFN.
    """
    config = size_ffn(d_model, ffn_parameters // (2 * d_model), flops)
    spectral, micro = config.spectral, config.micro
    assert spectral is not None
    assert micro is not None
    assert micro.core is not None
    count = 2 * spectral.rank * (d_model + spectral.width) + 2 * d_model * micro.core.width
    return count / ffn_parameters


if __name__ == "__main__":
    main()
