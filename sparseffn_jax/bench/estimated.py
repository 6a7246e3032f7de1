"""What sparse FFNs would gain on a GPU that is not there, by the programs that run on it.

Nothing is timed: each program is compiled for the GPU, and its time is estimated kernel by kernel.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparseffn_jax.bench import pictures
from sparseffn_jax.bench.layer import DTYPES, Mode, grid, training_pass
from sparseffn_jax.bench.settings import FFNBenchSettings, begin_report, check_known
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.measure import records
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.measure.gpus import GPU, compile_for, gpus
from sparseffn_jax.models.decoder import Decoder, Dtype
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.sparsify.sizing import size_ffn, size_model

_MODES: tuple[Mode, ...] = ("forward", "training", "decoding")


def known_gpu(name: str) -> GPU:
    """Returns the GPU of a short name.

    Raises:
      ValueError: if it is not known.
    """
    if name not in gpus():
        raise ValueError(f"device={name!r} is not known: expected one of {', '.join(gpus())}")
    return gpus()[name]


class Estimate(NamedTuple):
    """What is known of a layer's program on a GPU.

    Attributes:
      seconds: its estimated time.
      kernels: number of kernels that run.
      bytes_moved: bytes of memory that they read or write.
      weights_copied: bytes of weights that are copied in every call.
      temporary: bytes of temporary memory.
    """

    seconds: float
    kernels: int
    bytes_moved: int
    weights_copied: int
    temporary: int


def estimate_layer(
    config: SparseFFNConfig, mode: Mode, tokens: int, dtype: Dtype, gpu: GPU
) -> Estimate:
    """Compiles one layer for a GPU and estimates its time.

    Args:
      config: configuration of the layer.
      mode: the pass; for decoding, weights are packed before the call.
      tokens: number of rows of the activations.
      dtype: dtype of weights and activations.
      gpu: the GPU, which need not be there.

    Raises:
      ModuleNotFoundError, RuntimeError: as :meth:`GPU.devices`.
    """
    layer = SparseFFN(config, dtype=dtype, param_dtype=dtype)
    x = jax.ShapeDtypeStruct((tokens, config.d_model), dtype)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    if mode == "decoding":
        pack = functools.partial(layer.pack, platform="gpu")
        variables = jax.eval_shape(lambda given: pack(given, tokens), variables)
    call = training_pass(layer) if mode == "training" else layer.apply
    program = compile_for(gpu, call, variables, x)
    return Estimate(
        gpu.seconds(program),
        program.launches,
        program.bytes_moved,
        program.inputs_moved,
        program.memory.temporary,
    )


def run_ffn_estimate(settings: FFNBenchSettings, name: str, console: Console) -> dict[str, Any]:
    """Estimates the grid of :func:`run_ffn_bench` on a GPU; writes ``ffn-NAME.json``.

    Args:
      settings: which layers are compiled, and for how many tokens.
      name: the GPU's short name.
      console: shows the progress.

    Returns:
      What the file holds.

    Raises:
      ModuleNotFoundError, RuntimeError: as :meth:`GPU.devices`.
      ValueError: if the GPU or a configuration is not known.
    """
    gpu = known_gpu(name)
    configs = grid(settings.d_model, settings.d_ff)
    check_known("configurations", settings.only, configs)
    records.make_folder(settings.out)
    dense = size_ffn(settings.d_model, settings.d_ff, 1.0)
    rows = []
    chosen = settings.only or tuple(configs)
    for mode in _MODES:
        tokens = 1 if mode == "decoding" else settings.tokens
        args = mode, tokens, DTYPES[settings.dtype], gpu
        baseline = estimate_layer(dense, *args)
        for each in track(chosen, f"compiling, {mode}", console=console, transient=True):
            estimate = estimate_layer(configs[each], *args)
            rows.append(
                {
                    "configuration": each,
                    "mode": mode,
                    "tokens": tokens,
                    "promised": 1.0 / flops_ratio(configs[each]),
                    "speedup": baseline.seconds / estimate.seconds,
                    **estimate._asdict(),
                }
            )
    result = {**begin_report(settings), "gpu": gpu.description, "rows": rows}
    records.write_json(settings.out / f"ffn-{name}.json", result)
    return result


def estimate_table(gpu: str, rows: Iterable[dict[str, Any]]) -> Table:
    """Returns a table of estimates.

    Args:
      gpu: the GPU's name.
      rows: the rows of :func:`run_ffn_estimate`.
    """
    table = Table(title=f"Estimated on {gpu}, from compiled programs", **pictures.NARROW_TABLE)
    table.add_column("configuration", no_wrap=True)
    for column in ("pass", "promised", "speed-up", "us", "kernels", "copied", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["configuration"],
            row["mode"],
            f"{row['promised']:.2f}x",
            f"{row['speedup']:.2f}x",
            f"{1e6 * row['seconds']:.1f}",
            str(row["kernels"]),
            f"{row['weights_copied'] / 2**20:.1f}",
            f"{row['temporary'] / 2**20:.1f}",
        )
    table.caption = "Not measured. MiB: weights that a call copies, temporary memory"
    return table


class EstimatedFFNClock:
    """The prices of a plan for a GPU that is not there; stands in for an ``FFNClock``.

    Args:
      model: a decoder whose layers are all dense, in the precision to estimate in.
      tokens: rows of activations.
      gpu: the GPU.
      train: whether forward and backward pass together count instead of the forward pass.
    """

    def __init__(self, model: Decoder, tokens: int, gpu: GPU, *, train: bool = False):
        self._model, self._tokens, self._gpu, self._train = model, tokens, gpu, train
        self._seconds: dict[SparseFFNConfig | None, float] = {}

    def prices(
        self,
        configs: Sequence[SparseFFNConfig | None],
        on_size: Callable[[int, int], None] | None = None,
    ) -> dict[SparseFFNConfig | None, float]:
        """Returns the time of each layer over that of the dense FFN.

        Args:
          configs: the layers; ``None`` stands for the dense FFN.
          on_size: function that is called with the numbers of sizes done and to be done.
        """
        prices = {}
        for i, config in enumerate(configs):
            prices[config] = self._of(config) / self._of(None)
            if on_size is not None:
                on_size(i + 1, len(configs))
        return prices

    def dense_seconds(self) -> float:
        """Returns what one dense FFN takes, in seconds."""
        return self._of(None)

    def speedup(self, configs: Sequence[SparseFFNConfig | None]) -> float:
        """Returns the speed-up of all layers' FFNs together.

        Args:
          configs: the configuration of each layer.
        """
        return len(configs) * self._of(None) / sum(map(self._of, configs))

    def _of(self, config: SparseFFNConfig | None) -> float:
        if config not in self._seconds:
            layer = size_model(self._model.spec, 1.0) if config is None else config
            mode: Mode = "training" if self._train else "forward"
            args = mode, self._tokens, self._model.dtype, self._gpu
            self._seconds[config] = estimate_layer(layer, *args).seconds
        return self._seconds[config]
