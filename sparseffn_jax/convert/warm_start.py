"""Dense FFNs in, SparseFFNs out: :func:`sparsify`.

Closed forms come before gradients. For each layer, on calibration activations: the units whose
loss would cost most go to the core as they are; the spectral expansion takes the other units'
weights in the transform domain; the polynomial is fitted to what those units really output; the
output weights of all branches are regressed jointly on the dense FFN's outputs. Then every
SparseFFN regresses its dense FFN's outputs by gradient, in parallel for all layers, before any
end-to-end loss sees it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseffn_jax.config import (
    CoreConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.convert import closed_form
from sparseffn_jax.convert.closed_form import Moments
from sparseffn_jax.convert.distill import distill_layers
from sparseffn_jax.nn.decoder import Decoder, FFNLayout, layers_of, replace_ffns
from sparseffn_jax.ops import polynomial, spectral
from sparseffn_jax.ops.activations import get_activation
from sparseffn_jax.ops.block_sparse import BlockMask, decompress

Params = Mapping[str, Any]
Start = Literal["select", "refit"]
# Share of the pre-activations that lie inside the polynomial's interval.
_INSIDE = 0.999
_BACKFITTING_TURNS = 4
_POLYNOMIAL_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear map's weight and bias, ``x weight + bias``, in float64.

    Attributes:
      weight: (i, o).
      bias: (o,); zero where the model has none.
    """

    weight: Float[np.ndarray, "i o"]
    bias: Float[np.ndarray, " o"]

    def __call__(self, x: Float[np.ndarray, "n i"]) -> Float[np.ndarray, "n o"]:
        """Returns the outputs in float32."""
        return x @ _f32(self.weight) + _f32(self.bias)

    def outputs(self, chosen: Int[np.ndarray, " k"]) -> "Linear":
        """Returns the map to the chosen outputs alone."""
        return Linear(self.weight[:, chosen], self.bias[chosen])


@dataclasses.dataclass(frozen=True)
class DenseFFN:
    """A dense FFN: ``contract(phi(expand(x)))`` or, gated, ``contract(phi(gate(x)) * up(x))``.

    Attributes:
      expansions: the maps into the m hidden units, ``(expand,)`` or ``(gate, up)``.
      contract: the map out of them.
      activation: phi, by its Hugging Face name.
    """

    expansions: tuple[Linear, ...]
    contract: Linear
    activation: str

    @classmethod
    def from_params(cls, mlp: Params, layout: FFNLayout, activation: str) -> "DenseFFN":
        """Reads a layer's ``mlp`` parameters, whatever its family calls them."""

        def linear(name: str) -> Linear:
            weight = np.asarray(mlp[name]["kernel"], np.float64)
            weight = weight.T if layout.transposed else weight
            bias = mlp[name].get("bias", np.zeros(weight.shape[1]))
            return Linear(weight, np.asarray(bias, np.float64))

        names = (layout.expand,) if layout.gate is None else (layout.gate, layout.expand)
        return cls(tuple(map(linear, names)), linear(layout.contract), activation)

    @property
    def width(self) -> int:
        """Hidden units."""
        return len(self.contract.weight)

    def __call__(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """Returns the FFN's outputs in float32."""
        return self.contract(self.hidden([expand(x) for expand in self.expansions])[0])

    def hidden(
        self, preactivations: Sequence[Float[np.ndarray, "n m"]]
    ) -> tuple[Float[np.ndarray, "n m"], list[Float[np.ndarray, "n m"]]]:
        """Returns the hidden units, and their slopes in each of the pre-activations."""
        value, slope = map(np.asarray, _activation_and_slope(self.activation)(preactivations[0]))
        if len(preactivations) == 1:
            return value, [slope]
        up = preactivations[1]
        return value * up, [slope * up, value]


def sparsify(
    model: Decoder,
    params: Params,
    config: SparseFFNConfig | Sequence[SparseFFNConfig | None],
    calibration: Int[np.ndarray, "n t"],
    *,
    start: Start = "refit",
    distill_steps: int = 300,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[Decoder, dict[str, Any]]:
    """Replaces dense FFNs by SparseFFNs that start near them.

    Args:
      model: a model whose layers to be replaced are dense.
      params: its parameters; not changed.
      config: for every layer, or one a layer, ``None`` keeping that layer dense. The
        polynomial's radius is overwritten by what the calibration activations need.
      calibration: (n, t) token ids of ordinary text; some 10 tokens a hidden unit or more.
      start: ``"refit"``, the closed forms; or ``"select"``, plain selection without data-driven
        weights: the most important units as they are, truncated SVD, the activation's own
        polynomial.
      distill_steps: gradient steps of layer-wise distillation after the closed forms; 0 for none.
      batch_size: windows in one forward pass of the dense model.
      seed: of the distillation's batches.

    Returns:
      The sparse model, and its parameters with fresh leaves only under the replaced ``mlp``, in
      the dtype of what they replace.

    Raises:
      ValueError: if the config does not fit the model or there is too little calibration text.
    """
    configs = _per_layer(model, config)
    _check_calibration(model, configs, calibration)
    inputs = collect_ffn_inputs(model, params, calibration, batch_size)
    layers = layers_of(model, params)
    dense, fitted, fitted_configs = {}, {}, list(configs)
    for i, layer_config in enumerate(configs):
        if layer_config is None:
            continue
        dense[i] = DenseFFN.from_params(
            layers[i]["mlp"], model.ffn_layout, layer_config.activation
        )
        fitted_configs[i], fitted[i] = fit_layer(dense[i], layer_config, inputs[i], start)
    if distill_steps:
        trainable = {i: fitted_configs[i] for i in fitted if not _is_whole(configs[i])}
        fitted |= distill_layers(
            trainable,
            {i: fitted[i] for i in trainable},
            {i: inputs[i] for i in trainable},
            {i: dense[i](inputs[i]) for i in trainable},
            steps=distill_steps,
            seed=seed,
        )
    for i, leaves in fitted.items():
        dtype = jax.tree.leaves(layers[i]["mlp"])[0].dtype
        fitted[i] = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), leaves)
    ffns = tuple(
        old if new is None else new
        for old, new in zip(model.ffns or (None,) * len(configs), fitted_configs, strict=True)
    )
    return model.clone(ffns=ffns), replace_ffns(model, params, fitted)


def collect_ffn_inputs(
    model: Decoder,
    params: Params,
    tokens: Int[np.ndarray, "n t"],
    batch_size: int,
) -> list[Float[np.ndarray, "nt d"]]:
    """Returns what each layer's FFN receives on the given text, in float32 on the host."""

    @jax.jit
    def forward(params: Params, tokens: Array) -> list[Array]:
        out: Any = model.apply({"params": params}, tokens, mutable=["intermediates"])
        return [layer["ffn_input"][0] for layer in layers_of(model, out[1]["intermediates"])]

    parts = [[] for _ in range(model.spec.n_layer)]
    for start in range(0, len(tokens), batch_size):
        for part, x in zip(parts, forward(params, tokens[start : start + batch_size]), strict=True):
            part.append(np.asarray(x, np.float32).reshape(-1, x.shape[-1]))
    return [np.concatenate(part) for part in parts]


def fit_layer(
    dense: DenseFFN, config: SparseFFNConfig, x: Float[np.ndarray, "n d"], start: Start
) -> tuple[SparseFFNConfig, dict[str, Any]]:
    """Fits one SparseFFN to one dense FFN on its inputs ``x``.

    Returns:
      The config with the polynomial's fitted radius, and float32 parameters.
    """
    if _is_whole(config):
        # The dense FFN itself: its own weights, to the bit.
        leaves: dict[str, Any] = {"core_contract": {"kernel": dense.contract.weight}}
        biases = {"bias": dense.contract.bias}
        for which, linear in zip(config.expansions, dense.expansions, strict=True):
            leaves[f"core_expand{which}"] = {"kernel": linear.weight}
            biases[f"core_bias{which}"] = linear.bias
        return config, jax.tree.map(_f32, leaves | (biases if config.bias else {}))
    fit = _Fit(dense, config, x, start)
    fit.choose_units()
    if config.spectral is not None:
        fit.expand_spectral(config.spectral)
    if config.micro is not None and config.micro.core is not None:
        fit.expand_core(config.micro.core)
    fit.contract_all()
    fit.add_steps()
    return fit.config, jax.tree.map(_f32, fit.params)


class _Fit:
    """The state of fitting one layer: what is decided so far, in the order of the methods."""

    def __init__(
        self, dense: DenseFFN, config: SparseFFNConfig, x: Float[np.ndarray, "n d"], start: Start
    ):
        self.dense, self.config, self.x = dense, config, x
        self.refits = start == "refit"
        self.hidden, slopes = dense.hidden([expand(x) for expand in dense.expansions])
        norms = np.linalg.norm(dense.contract.weight, axis=1)
        # The output variance that each hidden unit carries, summed over channels. Without a bias
        # nothing can stand in for a lost unit's mean, so that it counts too.
        spread = self.hidden.std(0, dtype=np.float64) if config.bias else _rms(self.hidden)
        self.importance = (spread * norms) ** 2
        self.sensitivities = [_floored(_rms(slope) * norms) for slope in slopes]
        self.params: dict[str, Any] = {}
        # What the output weights of each branch act on.
        self.spectral_features = self.core_features = np.zeros((len(x), 0), np.float32)

    def choose_units(self) -> None:
        """Splits the hidden units between the core and the spectral branch."""
        core = self.config.micro.core if self.config.micro is not None else None
        branch = self.config.spectral
        importance = self.importance.copy()
        core_width = 0 if core is None else core.width
        if core is not None and branch is not None and self.refits:
            # The core takes the units that the spectral branch would serve worst.
            ranked = np.argsort(-self._spectral_error(branch), kind="stable")
        else:
            ranked = np.argsort(-importance, kind="stable")
        self.core_units = np.sort(ranked[:core_width])
        if branch is not None:
            # Units outside the core first, then the core's own, each by importance.
            importance[self.core_units] -= importance.max() + 1.0
            self.spectral_units = np.sort(np.argsort(-importance, kind="stable")[: branch.width])

    def expand_spectral(self, branch: SpectralConfig) -> None:
        """Fits the expansion and the polynomial, and computes what they output."""
        units, us = self.spectral_units, []
        for which, full, sensitivity in self._expansions():
            linear = full.outputs(units)
            factors, weight = self._expansion(branch, linear.weight, sensitivity[units])
            us.append(self._mapped(f"expand_bias{which}", linear, weight))
            self.params[f"expand{which}"] = factors
        if self.config.polynomial is None:
            self.spectral_features = self.dense.hidden(us)[0]
            return
        # What the channel should say: the true unit's output, of which u knows only a part.
        target = self.hidden[:, units] if self.refits else self.dense.hidden(us)[0]
        weights = np.linalg.norm(self.dense.contract.weight[units], axis=1) ** 2
        fitted, coefficients = fit_polynomial(self.config.polynomial, us, target, weights)
        self.config = dataclasses.replace(self.config, polynomial=fitted)
        self.params["polynomial"] = coefficients
        features = polynomial.chebyshev(
            jnp.asarray(us[0]),
            jnp.asarray(coefficients, jnp.float32),
            degrees=fitted.degrees,
            radius=fitted.radius,
        )
        self.spectral_features = np.asarray(features) * (us[1] if self.config.gated else 1.0)

    def expand_core(self, core: CoreConfig) -> None:
        """Takes over the core units' input weights and computes what they output."""
        us = []
        for which, full, _ in self._expansions():
            linear = full.outputs(self.core_units)
            weight = linear.weight
            if (mask := core.expand_mask) is not None:
                weight = closed_form.masked_regression(self._input_moments(weight), mask)
            us.append(self._mapped(f"core_bias{which}", linear, weight))
            self.params[f"core_expand{which}"] = {"kernel": _compress(weight, mask)}
        if core.expand_mask is None:
            self.core_features = self.hidden[:, self.core_units]
        else:
            self.core_features = self.dense.hidden(us)[0]

    def contract_all(self) -> None:
        """Fits the output weights of both branches, jointly, and the bias."""
        config, d_model = self.config, self.config.d_model
        branch = config.spectral
        core = config.micro.core if config.micro is not None else None
        features = np.concatenate([self.spectral_features, self.core_features], axis=1)
        target = self.dense.contract(self.hidden)
        moments = Moments.of(features, target, centred=config.bias)
        ours = slice(0, self.spectral_features.shape[1])
        cores = slice(ours.stop, None)
        weight = np.zeros((features.shape[1], d_model))
        mask = core.contract_mask if core is not None else None
        if not self.refits:
            weight[cores] = self.dense.contract.weight[self.core_units]
            if mask is not None:
                weight[cores] = _mask_out(weight[cores], mask)
            if branch is not None:
                plain = _unit_moments(self.dense.contract.weight[self.spectral_units])
                factors, weight[ours] = self._contraction(branch, plain)
                self.params["contract"] = factors
            bias = self.dense.contract.bias
        else:
            # Unmasked, the core's weights can be solved for exactly at any spectral part;
            # masked, the two take turns.
            for _ in range(1 if mask is None or branch is None else _BACKFITTING_TURNS):
                if branch is not None:
                    if core is None:
                        left = moments
                    elif mask is None:
                        left = moments.without(ours, cores)
                    else:
                        left = moments.residual(ours, cores, weight[cores])
                    factors, weight[ours] = self._contraction(branch, left)
                    self.params["contract"] = factors
                if core is not None:
                    left = moments.residual(cores, ours, weight[ours])
                    weight[cores] = closed_form.masked_regression(left, mask)
            bias = moments.y_mean - moments.x_mean @ weight
        if core is not None:
            self.params["core_contract"] = {"kernel": _compress(weight[cores], mask)}
        if config.bias:
            self.params["bias"] = bias
        self.output, self.target = features @ _f32(weight) + _f32(bias), target

    def add_steps(self) -> None:
        """Regresses what is left of the error on the output, step by step."""
        for i, mask in enumerate(self.config.micro.steps if self.config.micro is not None else ()):
            weight = np.zeros(mask.shape)
            if self.refits:
                # Not centred: the step sees the output with its mean and adds no bias.
                error = self.target - self.output
                n, zeros = len(error), np.zeros(mask.shape[0])
                moments = Moments(
                    (self.output.T @ self.output / n).astype(np.float64),
                    (self.output.T @ error / n).astype(np.float64),
                    zeros,
                    zeros,
                )
                weight = closed_form.masked_regression(moments, mask)
                self.output = self.output + self.output @ _f32(weight)
            self.params[f"step_{i}"] = {"kernel": _compress(weight, mask)}

    @functools.cached_property
    def x_moments(self) -> Moments:
        return Moments.of(self.x, self.x[:, :0], centred=self.config.bias)

    def _expansions(self):
        return zip(self.config.expansions, self.dense.expansions, self.sensitivities, strict=True)

    def _mapped(self, name, linear, weight):
        """Returns what ``weight`` in place of the map's own makes of x, the means kept."""
        if not self.config.bias:
            return self.x @ _f32(weight)
        lost = self.x_moments.x_mean @ (linear.weight - weight)
        self.params[name] = linear.bias + lost * self.refits
        return Linear(weight, self.params[name])(self.x)

    def _input_moments(self, weight):
        if not self.refits:
            return _unit_moments(weight)
        xx, mean = self.x_moments.xx, self.x_moments.x_mean
        return Moments(xx, xx @ weight, mean, mean @ weight)

    def _expansion(self, branch, weight, sensitivity):
        moments = self._input_moments(weight)
        if branch.transform == "klt":
            scale = sensitivity if self.refits else np.ones(weight.shape[1])
            axes, filter = closed_form.whitened_svd(weight, moments.xx, branch.rank, scale)
            return {"axes": axes, "filter": filter}, axes @ filter
        return _fit_dft(branch, moments)

    def _contraction(self, branch, moments):
        if branch.transform == "klt":
            rank = branch.contract_rank or branch.rank
            axes, filter = closed_form.reduced_rank_regression(moments, rank)
            return {"axes": axes, "filter": filter}, axes @ filter
        return _fit_dft(branch, moments)

    def _spectral_error(self, branch):
        """Returns each unit's share of the output error if the spectral branch had it."""
        error = np.zeros(self.dense.width)
        for _, linear, sensitivity in self._expansions():
            _, weight = self._expansion(branch, linear.weight, sensitivity)
            lost = linear.weight - weight
            variance = np.einsum("dm,de,em->m", lost, self.x_moments.xx, lost, optimize=True)
            error += variance * sensitivity**2
        return error


def fit_polynomial(
    config: PolynomialConfig,
    us: Sequence[Float[np.ndarray, "n m"]],
    target: Float[np.ndarray, "n m"],
    weights: Float[np.ndarray, " m"],
) -> tuple[PolynomialConfig, Float[np.ndarray, "groups k"]]:
    """Fits the polynomial to what the branch should output, by least squares weighted by channel.

    Args:
      config: of the polynomial.
      us: the branch's pre-activations, ``(u,)``, or ``(gate, up)`` where units are ``poly(gate) *
        up``.
      target: what its hidden units should be.
      weights: of each channel's squared error.

    Returns:
      The config with the radius that holds nearly all pre-activations, and the coefficients.
    """
    # A sample of tokens is plenty for a handful of coefficients.
    sample = slice(None, None, max(1, len(target) // _POLYNOMIAL_TOKENS))
    u, *up = (part[sample] for part in us)
    target = target[sample]
    radius = max(round(float(np.quantile(np.abs(u), _INSIDE)), 3), 1e-3)
    groups, terms = config.groups, len(config.degrees)
    xx, xy = np.zeros((groups, terms, terms)), np.zeros((groups, terms))
    for start in range(0, len(u), 1024):
        rows = slice(start, start + 1024)
        basis = polynomial.basis(u[rows], config.degrees, radius)
        if up:
            basis *= up[0][rows][..., None]
        basis = basis.reshape(len(basis), groups, -1, terms)
        weighted = basis * weights.reshape(groups, -1, 1)
        xx += np.einsum("ngmk,ngml->gkl", weighted, basis, optimize=True)
        wanted = target[rows].reshape(len(basis), groups, -1)
        xy += np.einsum("ngmk,ngm->gk", weighted, wanted, optimize=True)
    coefficients = np.stack(
        [closed_form.ridge_solve(a, b[:, None], 1e-6)[:, 0] for a, b in zip(xx, xy, strict=True)]
    )
    return dataclasses.replace(config, radius=radius), coefficients


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


def _check_calibration(model, configs, calibration) -> None:
    if calibration.ndim != 2 or calibration.shape[1] > model.spec.n_positions:
        raise ValueError(
            f"calibration has shape {calibration.shape}: expected (windows, tokens) with at most "
            f"n_positions={model.spec.n_positions} tokens"
        )
    if calibration.max() >= model.config.vocab_size:
        raise ValueError(
            f"calibration holds token id {calibration.max()}, but the model has vocab_size="
            f"{model.config.vocab_size}: was it tokenised with another tokenizer?"
        )
    widest = max((layer.d_ff for layer in configs if layer is not None), default=0)
    if calibration.size < 2 * widest:
        raise ValueError(
            f"{calibration.size} calibration tokens are too few to fit {widest} hidden units: "
            f"give at least {2 * widest}, better ten times as many"
        )


def _is_whole(config: SparseFFNConfig | None) -> bool:
    """Whether the config is the dense FFN itself."""
    if config is None or config.spectral is not None or config.micro is None:
        return False
    core = config.micro.core
    return (
        core is not None
        and not config.micro.steps
        and core.width == config.d_ff
        and core.expand_mask is None
        and core.contract_mask is None
    )


def _fit_dft(branch: SpectralConfig, moments: Moments):
    real, imag = closed_form.block_circulant_regression(
        moments, branch.block_size, branch.frequencies
    )
    weight = spectral.circulant_matrix(
        jnp.asarray(real, jnp.float32),
        jnp.asarray(imag, jnp.float32),
        branch.block_size,
        branch.frequencies,
    )
    # As the module has it: no leaf where no frequency has an imaginary part.
    factors = {"real": real} | ({"imag": imag} if len(imag) else {})
    return factors, np.asarray(weight, np.float64)


def _unit_moments(weight):
    """Moments of white inputs: regression on them is approximation of the weight itself."""
    identity, zeros = np.eye(weight.shape[0]), np.zeros(weight.shape[0])
    return Moments(identity, weight, zeros, np.zeros(weight.shape[1]))


def _compress(weight, mask: BlockMask | None):
    return weight if mask is None else mask.compress(weight)


def _mask_out(weight, mask: BlockMask):
    return np.asarray(decompress(jnp.asarray(mask.compress(weight)), mask))


def _rms(x):
    return np.sqrt(np.mean(np.square(x), 0, dtype=np.float64))


def _floored(sensitivity):
    """How strongly an error of each pre-activation moves the output, root mean square.

    A unit that never fires must not divide by zero where this scale is undone.
    """
    floor = 1e-3 * sensitivity.mean() + np.finfo(np.float64).tiny
    return np.maximum(sensitivity, floor)


@functools.cache
def _activation_and_slope(name):
    phi = get_activation(name)
    return jax.jit(lambda u: jax.jvp(phi, (u,), (jnp.ones_like(u),)))


def _f32(x):
    return np.asarray(x, np.float32)
