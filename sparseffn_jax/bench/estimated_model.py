"""What models of sparse FFNs would gain on a GPU that is not there, by whole programs."""

import functools
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparseffn_jax.bench import pictures
from sparseffn_jax.bench.clock import FFNShare, step_config
from sparseffn_jax.bench.estimated import EstimatedFFNClock, estimate_layer, known_gpu
from sparseffn_jax.bench.layer import Mode
from sparseffn_jax.bench.model import ModelBenchSettings, models_of
from sparseffn_jax.bench.settings import begin_report
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.evaluate.fused_loss import mean_loss
from sparseffn_jax.evaluate.losses import forward
from sparseffn_jax.measure import records
from sparseffn_jax.measure.gpus import GPU, compile_for
from sparseffn_jax.measure.programs import Program
from sparseffn_jax.models.decoder import Decoder, init_cache, pack_ffns
from sparseffn_jax.models.generation import DecodeState, Sampling, append, as_data
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.train.step import init_state, make_stage, make_update
from sparseffn_jax.train.strategies import STEP_SCALARS

Pass = Literal["evaluation", "training step", "decoding"]
# What a layer does in each pass of a model.
_LAYER_PASS: Mapping[Pass, Mode] = types.MappingProxyType(
    {"evaluation": "forward", "training step": "training", "decoding": "decoding"}
)


class EstimatedModelClock(FFNShare):
    """What a whole model takes on a GPU that is not there; stands in for a ``ModelClock``.

    Args:
      model: a decoder whose layers are all dense, in the precision to estimate in.
      batch_size: windows in the batch.
      window: tokens in a window.
      clock: prices of FFNs on equally many tokens, and in the same passes.
      gpu: the GPU.
      train: whether a training step of all parameters counts instead of the evaluation.
    """

    def __init__(
        self,
        model: Decoder,
        batch_size: int,
        window: int,
        clock: EstimatedFFNClock,
        gpu: GPU,
        *,
        train: bool = False,
    ):
        self._model, self._gpu, self._train = model, gpu, train
        self._shape = batch_size, window
        self._dense = self._of(model)
        super().__init__(model.spec.n_layer, self._dense / clock.dense_seconds())

    def speedup(self, configs: Sequence[SparseFFNConfig | None]) -> float:
        """Returns the speed-up of the whole model.

        Args:
          configs: the configuration of each layer.
        """
        return self._dense / self._of(self._model.clone(ffns=tuple(configs)))

    def _of(self, model: Decoder) -> float:
        name: Pass = "training step" if self._train else "evaluation"
        return self._gpu.seconds(compile_pass(model, name, *self._shape, self._gpu))


def compile_pass(model: Decoder, name: Pass, batch_size: int, window: int, gpu: GPU) -> Program:
    """Compiles what a model does with a batch for a GPU.

    Weights that are only read lie in the precision of the computation, those that are trained in
    the model's.

    Args:
      model: a decoder.
      name: the pass: the loss of a batch; a training step of all parameters on it; or the next
        token of sequences whose cache has room for a window.
      batch_size: number of sequences.
      window: tokens in a sequence.
      gpu: the GPU, which need not be there.

    Raises:
      ModuleNotFoundError, RuntimeError: as :meth:`GPU.devices`.
    """
    if name != "training step":
        model = model.clone(param_dtype=model.dtype)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    if name == "decoding":
        step = functools.partial(_decoded, model)
        operands = _decoding(model, params, batch_size, window)
        return compile_for(gpu, step, *operands, donate_argnums=(0,))
    batch = jax.ShapeDtypeStruct((batch_size, window + 1), jnp.int32)
    if name == "evaluation":
        return compile_for(gpu, functools.partial(_loss, model), params, batch)
    config = step_config(batch_size)
    stage = make_stage(config, params, 0)
    state, frozen = jax.eval_shape(functools.partial(init_state, stage), params)
    update = make_update(model, stage, config)
    scalars = tuple(map(np.asarray, STEP_SCALARS))
    return compile_for(gpu, update, state, frozen, None, batch, *scalars, donate_argnums=(0,))


def _loss(model: Decoder, params: Any, ids: Any) -> Any:
    outputs, _ = forward(model, params, ids[:, :-1])
    return mean_loss(outputs, ids[:, 1:])[0]


def _decoded(
    model: Decoder, state: DecodeState, params: Any, packed: Any, settings: Any, ends: Any
) -> DecodeState:
    last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)
    return append(model, params, state, last, settings, ends, packed)


def _decoding(model: Decoder, params: Any, batch_size: int, window: int) -> tuple[Any, ...]:
    """Returns the shapes of what a decoding step takes: all as it is in the middle of a window."""
    vocabulary: int = model.config.vocab_size

    def operands(params: Any) -> tuple[Any, ...]:
        state = DecodeState(
            cache=init_cache(model, batch_size, window),
            tokens=jnp.zeros((batch_size, window), jnp.int32),
            length=jnp.int32(window // 2),
            padding=jnp.zeros(batch_size, jnp.int32),
            seen=jnp.zeros((batch_size, vocabulary), bool),
            done=jnp.zeros(batch_size, bool),
            key=jax.random.key(0),
        )
        packed = pack_ffns(model, params, batch_size, "gpu")
        settings = jax.tree.map(jnp.asarray, as_data(Sampling(), vocabulary))
        return state, params, packed, settings, jnp.zeros(1, jnp.int32)

    return jax.eval_shape(operands, params)


def promised_speedup(
    dense: Decoder, seconds: float, ffn: SparseFFNConfig, name: Pass, tokens: int, gpu: GPU
) -> tuple[float, float]:
    """Returns the speed-up of one FFN, and what it promises for a model that has it in every layer.

    Args:
      dense: a decoder whose layers are all dense.
      seconds: its time.
      ffn: the FFN that takes the place of each.
      name: the pass.
      tokens: number of tokens that go through the layers at once.
      gpu: the GPU.
    """
    before, after = (
        estimate_layer(config, _LAYER_PASS[name], tokens, dense.dtype, gpu).seconds
        for config in (size_model(dense.spec, 1.0), ffn)
    )
    return before / after, seconds / (seconds - dense.spec.n_layer * (before - after))


def estimate_model(
    dense: Decoder,
    compiled: Program,
    ffn: SparseFFNConfig,
    name: Pass,
    batch_size: int,
    window: int,
    gpu: GPU,
) -> dict[str, Any]:
    """Estimates what a model gains by a sparse FFN in every layer.

    Args:
      dense: a decoder whose layers are all dense.
      compiled: its program, as :func:`compile_pass` returns it.
      ffn: the FFN that takes the place of each.
      name: the pass.
      batch_size: number of sequences.
      window: tokens in a sequence.
      gpu: the GPU.

    Returns:
      A row of a report: the speed-up by the whole programs, and what the programs of one layer
      alone promise.
    """
    sparse = dense.clone(ffns=(ffn,) * dense.spec.n_layer)
    programs = {
        "dense": compiled,
        "sparse": compile_pass(sparse, name, batch_size, window, gpu),
    }
    seconds = {side: gpu.seconds(program) for side, program in programs.items()}
    tokens = batch_size * (1 if name == "decoding" else window)
    of_ffn, promised = promised_speedup(dense, seconds["dense"], ffn, name, tokens, gpu)
    row: dict[str, Any] = {
        "pass": name,
        "tokens": tokens,
        "speedup": seconds["dense"] / seconds["sparse"],
        "promised": promised,
        "ffn_speedup": of_ffn,
    }
    for side, program in programs.items():
        memory = program.memory
        row |= {
            f"{side}_seconds": seconds[side],
            f"{side}_kernels": program.launches,
            f"{side}_bytes": memory.arguments + memory.outputs + memory.temporary - memory.aliased,
            f"{side}_inputs_copied": program.inputs_moved,
        }
    return row


def run_model_estimate(settings: ModelBenchSettings, name: str, console: Console) -> dict[str, Any]:
    """Estimates on a GPU what :func:`run_model_bench` measures; writes ``model-NAME.json``.

    Args:
      settings: which model is compiled, and for how many tokens.
      name: the GPU's short name.
      console: shows the progress.

    Returns:
      What the file holds.

    Raises:
      CheckpointError, FileNotFoundError, ModuleNotFoundError, RuntimeError, ValueError: as
        :func:`run_model_bench` and :meth:`GPU.devices`.
    """
    gpu = known_gpu(name)
    records.make_folder(settings.out)
    dense, ffn = models_of(settings)
    rows = []
    for each in track(_LAYER_PASS, "compiling", console=console, transient=True):
        shape = settings.batch_size, settings.window
        if each == "decoding":
            shape = 1, settings.prompt + settings.decoded
        compiled = compile_pass(dense, each, *shape, gpu)
        rows.append(estimate_model(dense, compiled, ffn, each, *shape, gpu))
    result = {
        **begin_report(settings),
        "gpu": gpu.description,
        "ffn": ffn.to_dict(),
        "rows": rows,
    }
    records.write_json(settings.out / f"model-{name}.json", result)
    return result


def model_estimate_table(title: str, rows: Iterable[dict[str, Any]]) -> Table:
    """Returns a table of the rows of :func:`estimate_model`.

    Args:
      title: its title.
      rows: the rows.
    """
    table = Table(title=title, **pictures.NARROW_TABLE)
    table.add_column("pass", no_wrap=True)
    for column in ("tokens", "dense", "sparse", "FFNs", "promise", "model", "GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["pass"],
            str(row["tokens"]),
            *(f"{1e3 * row[f'{side}_seconds']:.2f}" for side in ("dense", "sparse")),
            *(f"{row[key]:.2f}x" for key in ("ffn_speedup", "promised", "speedup")),
            "/".join(f"{row[f'{side}_bytes'] / 2**30:.1f}" for side in ("dense", "sparse")),
        )
    table.caption = (
        "Not measured. Times in ms. FFNs: speed-up of a layer alone; promise: what it gives the "
        "model; model: by the model's programs; memory of dense/sparse"
    )
    return table
