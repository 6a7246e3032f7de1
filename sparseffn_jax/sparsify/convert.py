"""The conversion of dense FFNs to SparseFFNs, by :func:`sparsify`.

Closed forms come before gradients. Every layer is first fitted to calibration activations in closed
form; gradient steps then fit it to the outputs of its dense FFN, in parallel for all layers. Only
after that is the model trained on an end-to-end loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.decoder import FFN_NAME, Decoder, layers_of, replace_ffns
from sparseffn_jax.sparsify.calibration import check_calibration, collect_ffn_inputs
from sparseffn_jax.sparsify.dense import DenseFFN
from sparseffn_jax.sparsify.distill import distill_layers
from sparseffn_jax.sparsify.fit import fit_layer, is_whole

Params = Mapping[str, Any]
Fit = Callable[[DenseFFN, SparseFFNConfig, np.ndarray], tuple[SparseFFNConfig, dict[str, Any]]]


def sparsify(
    model: Decoder,
    params: Params,
    config: SparseFFNConfig | Sequence[SparseFFNConfig | None],
    calibration: Int[np.ndarray, "n t"],
    *,
    fit: Fit = fit_layer,
    distill_steps: int = 300,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[Decoder, dict[str, Any]]:
    """Replaces dense FFNs by SparseFFNs that start near them.

    Args:
      model: a decoder in which the layers to be replaced are dense.
      params: parameters of the decoder; they are not changed.
      config: one configuration for all layers, or a sequence with one entry for each layer, where
        ``None`` keeps a layer dense. The polynomial's radius is overwritten by the radius that the
        calibration activations need.
      calibration: token ids (n, t) of ordinary text; there should be ten tokens or more for each
        hidden unit.
      fit: function that fits one layer in closed form. It is called with the layer's dense FFN, its
        config and the FFN's inputs, and returns the config, in which the polynomial's radius may
        have changed, and float32 parameters.
      distill_steps: number of gradient steps of layer-wise distillation after the closed forms; 0
        leaves the distillation out.
      batch_size: number of windows in one forward pass of the dense model.
      seed: seed of the distillation's batches.

    Returns:
      The sparse model and its parameters. Only the leaves under a replaced ``mlp`` are new; they
      have the dtype of the leaves that they replace.

    Raises:
      ValueError: if the config does not fit the model or there is too little calibration text.

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
      >>> ffn = sf.size_ffn(d_model=32, d_ff=128, flops_ratio=0.5)
      >>> sparse, params = sf.sparsify(dense, params, ffn, text, distill_steps=0)
      >>> sparse.ffns[0].micro.core.width
      48
      >>> jax.jit(sparse.apply)({"params": params}, ids).shape
      (2, 8, 97)
    """
    configs = _per_layer(model, config)
    check_calibration(model, configs, calibration)
    inputs = collect_ffn_inputs(model, params, calibration, batch_size)
    layers = layers_of(model, params)
    dense, fitted, fitted_configs = {}, {}, list(configs)
    for i, layer_config in enumerate(configs):
        if layer_config is None:
            continue
        dense[i] = DenseFFN.from_params(
            layers[i][FFN_NAME], model.ffn_layout, layer_config.activation
        )
        fitted_configs[i], fitted[i] = fit(dense[i], layer_config, inputs[i])
    if distill_steps:
        trainable = {i: fitted_configs[i] for i in fitted if not is_whole(configs[i])}
        fitted |= distill_layers(
            trainable,
            {i: fitted[i] for i in trainable},
            {i: inputs[i] for i in trainable},
            {i: dense[i](inputs[i]) for i in trainable},
            steps=distill_steps,
            seed=seed,
        )
    for i, leaves in fitted.items():
        dtype = jax.tree.leaves(layers[i][FFN_NAME])[0].dtype
        fitted[i] = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), leaves)
    ffns = tuple(
        old if new is None else new
        for old, new in zip(model.ffns or (None,) * len(configs), fitted_configs, strict=True)
    )
    return model.clone(ffns=ffns), replace_ffns(model, params, fitted)


def _per_layer(model, config) -> tuple[SparseFFNConfig | None, ...]:
    spec = model.spec
    n_layer = spec.n_layer
    if isinstance(config, SparseFFNConfig):
        config = (config,) * n_layer
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
