"""The conversion of dense FFNs to SparseFFNs, by :func:`sparsify`.

The layers are converted one after the other, each on the inputs that the layers converted before it
really give. Closed forms come before gradients: a layer is first fitted to calibration activations
in closed form, then by gradient steps on the same inputs and targets. Only after that is the model
trained on an end-to-end loss.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sparseffn_jax.checkpoints.pretrained import Pretrained
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.defaults import REPAIR
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.measure.records import versions
from sparseffn_jax.models.decoder import Decoder, Dtype, ffn_module
from sparseffn_jax.sparsify.calibration import check_calibration
from sparseffn_jax.sparsify.dense import DenseFFN
from sparseffn_jax.sparsify.distill import distill_layer
from sparseffn_jax.sparsify.fit import fit_layer, is_whole
from sparseffn_jax.sparsify.layers import ConvertedLayer, convert_layers
from sparseffn_jax.sparsify.partial import PartialConversion
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.sparsify.streams import LayerActivations, Place

Params = Mapping[str, Any]
Config = float | SparseFFNConfig | Sequence[SparseFFNConfig | None]
Tokens = Int[np.ndarray, "n t"] | Int[np.ndarray, " n"]
Fit = Callable[
    [DenseFFN, SparseFFNConfig, LayerActivations], tuple[SparseFFNConfig, dict[str, Any]]
]


def sparsify(
    model: Decoder | Pretrained,
    params: Params | Config | None = None,
    config: Config | Tokens | None = None,
    calibration: Tokens | None = None,
    *,
    fit: Fit = fit_layer,
    distill_steps: int = 300,
    repair: float = REPAIR,
    batch_size: int = 8,
    seed: int = 0,
    stream_dtype: Dtype = np.float32,
    place: Place = jnp.asarray,
    work_dir: Path | None = None,
    on_layer: Callable[[ConvertedLayer], None] | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """Replaces dense FFNs by SparseFFNs that start near them.

    It is called as ``sparsify(model, params, config, calibration)`` or, with what
    :func:`load_pretrained` returns, as ``sparsify(pretrained, config, calibration)``. Beside the
    parameters, memory holds the two residual streams of the calibration text (the dense model's and
    the converted model's), the inputs and targets of one layer, and one layer's work.

    Args:
      model: a decoder in which the layers to be replaced are dense; or a :class:`Pretrained`, which
        brings its parameters.
      params: parameters of the decoder, in memory or loaded on demand; they are not changed.
      config: one configuration for all layers, or a sequence with one entry for each layer, where
        ``None`` keeps a layer dense. The polynomial's radius is overwritten by the radius that the
        calibration activations need. A number is the share of its FLOPs that every layer keeps, for
        which :func:`size_ffn` finds the configuration.
      calibration: token ids (n, t) of ordinary text; there should be ten tokens or more for each
        hidden unit. One row (n,) is cut into windows of the default length, the smaller of
        n_positions and 1024.
      fit: function that fits one layer in closed form. It is called with the layer's dense FFN, its
        config and the layer's activations, and returns the config, in which the polynomial's radius
        may have changed, and float32 parameters.
      distill_steps: number of gradient steps for each layer after its closed form; 0 leaves them
        out.
      repair: share, from 0 to 1, of what the layers before have lost that a layer is fitted to make
        up for: 0 fits every layer to what its dense FFN returns on the same inputs.
      batch_size: number of windows in one forward pass; it changes the result by rounding alone.
      seed: seed of the gradient steps' batches.
      stream_dtype: dtype in which the residual streams and one layer's activations are stored, in
        host memory.
      place: function that puts a batch of windows, or a chunk of tokens, on the devices: on a mesh,
        ``lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))``, whose number of
        devices must divide ``batch_size`` and the numbers of windows and tokens.
      work_dir: folder in which converted layers are kept, so that the same call after a stop goes
        on where it was, to the same result bit for bit; the caller deletes it in the end. If
        ``params`` are loaded on demand, the new leaves are too, from this folder.
      on_layer: function that is called after each converted layer.

    Returns:
      The sparse model and its parameters. Only the leaves under a replaced ``mlp`` are new; they
      have the dtype of the leaves that they replace.

    Raises:
      ValueError: if the config does not fit the model, there is too little calibration text, or
        ``work_dir`` holds a stopped conversion of another model or with other settings.
      TypeError: if an argument is missing or of another kind.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import sparseffn_jax as sf
      >>> from transformers import GPT2Config
      >>> config = GPT2Config(
      ...     vocab_size=97, n_positions=16, n_embd=32, n_layer=1, n_head=2,
      ...     bos_token_id=0, eos_token_id=0,
      ... )
      >>> dense = sf.GPT2LMHeadModel(config)
      >>> ids = jnp.zeros((2, 8), int)
      >>> params = jax.jit(dense.init)(jax.random.key(0), ids)["params"]
      >>> text = np.random.default_rng(0).integers(97, size=(80, 16))
      >>> sparse, params = sf.sparsify(dense, params, 0.5, text, distill_steps=0)
      >>> sparse.ffns[0].micro.core.width
      64
      >>> jax.jit(sparse.apply)({"params": params}, ids).shape
      (2, 8, 97)
    """
    model, params, config, windows = _arguments(model, params, config, calibration)
    if not callable(fit):
        raise TypeError(f"fit={fit!r}: expected a function, such as the default, fit_layer")
    configs = _per_layer(model, config)
    check_calibration(model, configs, windows)

    def fit_one(layer: int, dense: DenseFFN, activations: LayerActivations):
        config = configs[layer]
        assert config is not None
        fitted, leaves = fit(dense, config, activations)
        steps = 0 if is_whole(fitted) else distill_steps
        module = ffn_module(model.clone(ffns=(fitted,) * len(configs), dtype=jnp.float32), layer)
        return fitted, distill_layer(
            module.clone(name=None), leaves, activations, steps=steps, seed=seed
        )

    partial = None
    if work_dir is not None:
        settings = {
            "model": model.config.to_dict(),
            "ffns": [None if layer is None else layer.to_dict() for layer in configs],
            "calibration": hashlib.sha256(windows.tobytes()).hexdigest(),
            "fit": getattr(fit, "__name__", type(fit).__name__),
            "distill_steps": distill_steps,
            "repair": repair,
            "batch_size": batch_size,
            "seed": seed,
            "dtypes": [np.dtype(dtype).name for dtype in (model.dtype, stream_dtype)],
            "versions": versions(),
        }
        partial = PartialConversion(work_dir, settings)
    return convert_layers(
        model,
        params,
        [i for i, layer in enumerate(configs) if layer is not None],
        fit_one,
        windows,
        repair=repair,
        batch_size=batch_size,
        stream_dtype=stream_dtype,
        place=place,
        partial=partial,
        on_layer=on_layer,
    )


def _arguments(model: Any, *arguments: Any) -> tuple[Decoder, Params, Any, Any]:
    """Returns model, params, config and calibration, whichever way they were given."""
    names = ["params", "config", "calibration"][isinstance(model, Pretrained) :]
    given = [each for each in arguments if each is not None]
    if len(given) != len(names):
        raise TypeError(
            f"sparsify takes {', '.join(names)} beside a {type(model).__name__}: {len(given)} of "
            f"{len(names)} are given"
        )
    if isinstance(model, Pretrained):
        model, given = model.model(), [model.params, *given]
    params, config, calibration = given
    if isinstance(config, int | float):
        config = size_model(model.spec, config)
    return model, params, config, _as_windows(model, calibration)


def _as_windows(model: Decoder, calibration: Any) -> Int[np.ndarray, "n t"]:
    ids = np.asarray(calibration)
    if ids.dtype.kind not in "iu":
        what = "a text" if isinstance(calibration, str) else f"of type {ids.dtype.name}"
        raise TypeError(
            f"calibration is {what}: expected token ids (n, t) or (n,), as a tokenizer's encode "
            "returns them"
        )
    if ids.ndim != 1:
        return ids
    # Too short a text is one window, which is refused for what it lacks.
    window = min(check_window(None, model.spec.n_positions), max(1, len(ids)))
    return ids[: len(ids) // window * window].reshape(-1, window)


def _per_layer(model, config) -> tuple[SparseFFNConfig | None, ...]:
    spec = model.spec
    n_layer = spec.n_layer
    if isinstance(config, SparseFFNConfig):
        config = (config,) * n_layer
    if not isinstance(config, Sequence) or isinstance(config, str):
        raise TypeError(
            f"config is a {type(config).__name__}: expected the share of the FLOPs that stays, "
            "such as 0.4, a SparseFFNConfig, or one for each layer"
        )
    if len(config) != n_layer:
        raise ValueError(f"{len(config)} FFN configs for a model of n_layer={n_layer}")
    for i, (layer, ffn) in enumerate(zip(config, model.ffns or (None,) * n_layer, strict=True)):
        if layer is None:
            continue
        if ffn is not None:
            raise ValueError(f"layer {i} is already sparse: sparsify the dense checkpoint instead")
        for name in ("d_model", "d_ff", "activation", "gated"):
            if getattr(layer, name) != getattr(spec, name):
                raise ValueError(
                    f"the FFN config of layer {i} has {name}={getattr(layer, name)!r}, but the "
                    f"model has {getattr(spec, name)!r}"
                )
        if spec.ffn_bias and not layer.bias:
            raise ValueError(
                f"the FFN config of layer {i} has bias=False, but the model's FFN has biases that "
                "it must start from"
            )
        for name, width in (
            ("core", layer.micro.core.width if layer.micro and layer.micro.core else 0),
            ("spectral", layer.spectral.width if layer.spectral else 0),
        ):
            if width > layer.d_ff:
                raise ValueError(
                    f"the {name} width={width} of layer {i} exceeds the d_ff={layer.d_ff} hidden "
                    "units that it could start from"
                )
    return tuple(config)
