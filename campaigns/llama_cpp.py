"""A sparse model in llama.cpp beside the dense one: greedy tokens, tokens a second, loss.

pip install xllamacpp
python campaigns/llama_cpp.py MODEL TEXT --sparse FOLDER --threads 2

Both models are exported as GGUF, and answer in turn in one process; medians count. Greedy tokens
are compared with those of this library on the sparse folder, in float32. Where the first one
differs, the row says how far apart the logits of both tokens are there. On a machine that does
other work too, threads that wait for each other tell little: give --threads 1, and look at the
time on the CPU.
"""

import argparse
import contextlib
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import campaign
import jax
import numpy as np
import xllamacpp  # pyright: ignore[reportMissingImports]
from rich.console import Console

import sparseffn_jax as sf
from sparseffn_jax.progress import counter, stage

# Tokens that are given before the greedy ones.
_PROMPT = 32


class LlamaCpp:
    """A GGUF file in llama.cpp, which answers requests of token ids.

    Args:
      file: the file.
      threads: threads of the computation.
      context: the most tokens of a request and its answer.
    """

    def __init__(self, file: Path, threads: int, context: int):
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.fit_params = context, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = 0
        self._server = xllamacpp.Server(params)

    def complete(self, tokens: np.ndarray, count: int) -> dict[str, Any]:
        """Returns the answer to a request for ``count`` greedy tokens, with ``cpu_seconds``."""
        request = {
            "prompt": tokens.tolist(),
            "n_predict": count,
            "temperature": 0.0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        url, body = f"{self._server.listening_address}/completion", json.dumps(request).encode()
        posted = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        started = time.process_time()
        with urllib.request.urlopen(posted) as answer:
            return json.load(answer) | {"cpu_seconds": time.process_time() - started}


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    campaign.add_subject(parser, calibration_tokens=0, window=512, validation_windows=32)
    parser.add_argument("--sparse", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["float16", "q8_0"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--generated-tokens", type=int, default=64)
    parser.add_argument("--files", type=Path, default=Path("runs/llama_cpp"))
    parser.add_argument("--out", type=Path, default=Path("runs/llama_cpp.json"))
    arguments = parser.parse_args()
    console, rows = Console(soft_wrap=True), {}
    subject = campaign.load_subject(arguments)
    sparse = sf.load_pretrained(arguments.sparse)
    ids = np.asarray(subject.held_out).ravel()[: arguments.prompt_tokens]

    with stage("losses", console):
        rows["loss, dense, float32"] = (
            f"{subject.loss(subject.dense.model(), subject.dense.params):.4f}"
        )
        rows["loss, sparse, float32"] = f"{subject.loss(sparse.model(), sparse.params):.4f}"
    prompt = ids[:_PROMPT]
    expected = np.asarray(
        sf.generate(sparse.model(), sparse.params, prompt[None], arguments.generated_tokens)
    )[0, _PROMPT:]

    for dtype in arguments.types:
        files = {}
        for name, loaded in (("dense", subject.dense), ("sparse", sparse)):
            files[name] = arguments.files / f"{name}-{dtype}.gguf"
            with stage(f"writing {files[name]}", console):
                sf.export_gguf(
                    files[name],
                    loaded.model(),
                    loaded.params,
                    tokenizer=arguments.model,
                    dtype=dtype,
                    overwrite=True,
                )
            rows[f"{dtype}, {name}, bytes"] = files[name].stat().st_size
        read = sf.load_pretrained(files["sparse"])
        rows[f"loss, sparse, {dtype}"] = f"{subject.loss(read.model(), read.params):.4f}"
        with _servers(files, arguments) as servers:
            answer = servers["sparse"].complete(prompt, arguments.generated_tokens)
            rows[f"{dtype}, greedy tokens"] = _compare(sparse, prompt, expected, answer["tokens"])
            rows |= _times(servers, ids, arguments, dtype, console)
    campaign.finish("In llama.cpp", rows, [], arguments.out, vars(arguments))


@contextlib.contextmanager
def _servers(
    files: dict[str, Path], arguments: argparse.Namespace
) -> Iterator[dict[str, LlamaCpp]]:
    context = arguments.prompt_tokens + arguments.generated_tokens + 1
    servers = {name: LlamaCpp(file, arguments.threads, context) for name, file in files.items()}
    try:
        yield servers
    finally:
        servers.clear()


def _compare(sparse: Any, prompt: np.ndarray, expected: np.ndarray, tokens: list[int]) -> str:
    differs = np.flatnonzero(expected != np.asarray(tokens))
    if not differs.size:
        return f"all {len(expected)} equal"
    first = int(differs[0])
    seen = np.concatenate([prompt, expected[:first]])[None]
    logits = jax.jit(sparse.model().apply)({"params": sparse.params}, seen)[0, -1]
    gap = float(logits[expected[first]] - logits[tokens[first]])
    return f"{first} of {len(expected)} equal; there the logits differ by {gap:.4f}"


def _times(
    servers: dict[str, LlamaCpp],
    ids: np.ndarray,
    arguments: argparse.Namespace,
    dtype: str,
    console: Console,
) -> dict[str, str]:
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with counter(f"timing {dtype}", console) as count:
        for repeat in range(arguments.repeats):
            for name, server in servers.items():
                answer = server.complete(ids, 1)
                read = answer["timings"]["prompt_per_second"], answer["cpu_seconds"] / len(ids)
                taken.setdefault(("prompt", name), []).append(read)
                answer = server.complete(ids[:1], arguments.generated_tokens)
                each = answer["cpu_seconds"] / arguments.generated_tokens
                written = answer["timings"]["predicted_per_second"], each
                taken.setdefault(("generation", name), []).append(written)
            count(repeat + 1, arguments.repeats)
    rows = {}
    for what in ("prompt", "generation"):
        dense, sparse = (np.array(taken[what, name]) for name in ("dense", "sparse"))
        speed = np.median(sparse[:, 0]) / np.median(dense[:, 0])
        rows[f"{dtype}, {what}, tokens a second"] = (
            f"dense {np.median(dense[:, 0]):.1f}, sparse {np.median(sparse[:, 0]):.1f}, "
            f"{speed:.2f}x"
        )
        saved = np.median(dense[:, 1]) / np.median(sparse[:, 1])
        rows[f"{dtype}, {what}, CPU milliseconds a token"] = (
            f"dense {1e3 * np.median(dense[:, 1]):.2f}, "
            f"sparse {1e3 * np.median(sparse[:, 1]):.2f}, {saved:.2f}x"
        )
    return rows


if __name__ == "__main__":
    main()
