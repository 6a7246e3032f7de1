"""The loss right after conversion, on text that calibration did not see, by size and by repair.

python campaigns/conversion.py MODEL TEXT --flops 0.4 0.6 0.8 --repair 0 0.5

A narrow FFN keeps a share of the hidden units and nothing else. In the other kind, "bypass", a
low-rank bypass takes the place of some of them.
"""

import argparse
import functools
from pathlib import Path

import campaign
from rich.console import Console

import sparseffn_jax as sf
from sparseffn_jax.bench.peers import narrow
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.progress import stage
from sparseffn_jax.sparsify.sizing import size_model

_KINDS = {"narrow": narrow, "bypass": functools.partial(size_model, bypass=True)}


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    campaign.add_subject(parser, calibration_tokens=16384, window=512, validation_windows=32)
    parser.add_argument("--flops", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    parser.add_argument("--ffn", nargs="+", choices=_KINDS, default=["narrow"])
    parser.add_argument("--repair", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--distill-steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/conversion.json"))
    arguments = parser.parse_args()
    subject = campaign.load_subject(arguments)
    dense, chosen = subject.dense, subject.chosen[:, :-1]
    console = Console(soft_wrap=True)
    model = dense.model()
    with stage("evaluating the dense model", console):
        dense_loss = subject.loss(model, dense.params)
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
                    rows[name] = f"{subject.loss(*converted) - dense_loss:+.4f}"
                console.print(f"{name}: {rows[name]}")
    campaign.finish("Loss over dense after conversion", rows, [], arguments.out, vars(arguments))


if __name__ == "__main__":
    main()
