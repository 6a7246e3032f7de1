"""The loss right after conversion, on text that calibration did not see, by size and by repair.

python campaigns/conversion.py MODEL TEXT --flops 0.4 0.6 0.8 --repair 0 0.5

A narrow FFN keeps a share of the hidden units and nothing else. It is what the default has to beat,
in which a low-rank bypass takes the place of some of the units.
"""

import argparse
from pathlib import Path
from typing import Any

import campaign
import numpy as np
from rich.console import Console

import sparseffn_jax as sf
from sparseffn_jax.bench.peers import narrow
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.progress import stage
from sparseffn_jax.sparsify.sizing import size_model

_KINDS = {"default": size_model, "narrow": narrow}


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", help="folder, GGUF file or hub name of a dense model")
    parser.add_argument("text", help="a text file; its validation part is kept for the loss")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    parser.add_argument("--ffn", nargs="+", choices=_KINDS, default=["default"])
    parser.add_argument("--repair", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--distill-steps", type=int, default=300)
    parser.add_argument("--validation-windows", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/conversion.json"))
    arguments = parser.parse_args()
    dense = sf.load_pretrained(arguments.model)
    windows = sf.load_windows(arguments.text, sf.load_tokenizer(arguments.model), arguments.window)
    order = np.random.default_rng(0).permutation(len(windows.train))
    chosen = windows.train[order[: arguments.calibration_tokens // arguments.window], :-1]
    held_out = windows.validation[: arguments.validation_windows]
    console = Console(soft_wrap=True)

    def loss(model: sf.Decoder, params: Any) -> float:
        return sf.evaluate_loss(model, params, held_out, batch_size=2)

    model = dense.model()
    with stage("evaluating the dense model", console):
        dense_loss = loss(model, dense.params)
    rows = {"dense, nats a token": f"{dense_loss:.4f}"}
    for kind in arguments.ffn:
        for flops in arguments.flops:
            ffn = _KINDS[kind](dense.spec, flops)
            for repair in arguments.repair:
                name = f"{kind} {flops_ratio(ffn):.3f}, repair {repair}"
                with stage(name, console):
                    converted = sf.sparsify(
                        model,
                        dense.params,
                        ffn,
                        chosen,
                        distill_steps=arguments.distill_steps,
                        repair=repair,
                    )
                    rows[name] = f"{loss(*converted) - dense_loss:+.4f}"
                console.print(f"{name}: {rows[name]}")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    campaign.finish("Loss over dense after conversion", rows, [], arguments.out, settings)


if __name__ == "__main__":
    main()
