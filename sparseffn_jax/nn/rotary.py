"""Rotary position embeddings (Su et al. 2021, 2104.09864), and their scalings to longer contexts.

Each pair of channels is rotated by its frequency times the position. Shape letters: B batch, T
tokens, H heads, K head width, R channels of a head that are rotated.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Table = tuple[Float[Array, "B T 1 R2"], Float[Array, "B T 1 R2"]]

# What each kind of scaling needs, under the names of Hugging Face's ``rope_scaling``.
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "longrope": ("original_max_position_embeddings",),
}
# What longrope's factors are called after: those for texts longer than the original length first.
_LENGTHS = ("long", "short")
# The original length and the high_freq_factor of all of Meta's models of LLaMA 3.1 and 3.2.
_LLAMA3 = (8192.0, 4.0)


def rotary_table(
    position_ids: Int[Array, "B T"],
    channels: int,
    config: Any | None = None,
    layer_type: str | None = None,
) -> Table:
    """Returns the sines and cosines of every position's angles, in float32.

    Args:
      position_ids: positions (B, T), counted from 0.
      channels: number R of channels of a head that are rotated; even.
      config: config of the model, with Hugging Face's ``rope_theta`` and ``rope_scaling``
        (transformers 4) or ``rope_parameters`` (transformers 5). ``None`` stands for a theta of
        10000 without scaling.
      layer_type: which layers the table is for, as :func:`rope_parameters` takes it.

    Returns:
      The sines and the cosines, both (B, T, 1, R / 2).

    Raises:
      ValueError: if R is odd, or the config's scaling is of an unknown kind or incomplete.
    """
    if channels < 2 or channels % 2:
        raise ValueError(f"{channels} rotary channels of a head: expected a positive even number")
    parameters = {"rope_theta": 10000.0} if config is None else rope_parameters(config, layer_type)
    frequencies = _frequencies(parameters, channels, config, position_ids)
    angles = position_ids[..., None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if parameters.get("rope_type") == "longrope":
        factor = _attention_factor(parameters, config)
        sin, cos = factor * sin, factor * cos
    # Without it XLA's CPU compiler computes sine and cosine anew for every head of every layer.
    return jax.lax.optimization_barrier((sin, cos))


def rotate(
    x: Float[Array, "B T H K"], table: Table, *, interleaved: bool
) -> Float[Array, "B T H K"]:
    """Rotates the first R channels of every head and leaves the others unchanged.

    Args:
      x: queries or keys; they are rotated in float32.
      table: sines and cosines as :func:`rotary_table` returns them.
      interleaved: whether the two channels of a pair are neighbours, as in GPT-J; otherwise they
        are R / 2 channels apart, as in LLaMA.

    Returns:
      An array of the shape and dtype of ``x``.
    """
    sin, cos = table
    channels = 2 * sin.shape[-1]
    turned, passed = x[..., :channels].astype(jnp.float32), x[..., channels:]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = jnp.split(turned, 2, axis=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    if interleaved:
        turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), passed], axis=-1)


def rope_parameters(config: Any, layer_type: str | None = None) -> Mapping[str, Any]:
    """Checks a config's rotary settings and returns them in the form of transformers 5.

    Args:
      config: the config, as :func:`rotary_table` takes it.
      layer_type: which layers are meant, in a config that has settings for each of its
        ``layer_types``.

    Raises:
      ValueError: if the scaling is of an unknown kind or incomplete.
    """
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        parameters = _older_parameters(config, layer_type)
    elif layer_type is not None:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    original = getattr(config, "original_max_position_embeddings", None)
    if kind == "longrope" and original is not None:
        parameters = {"original_max_position_embeddings": original, **parameters}
    if kind not in _NEEDED:
        raise ValueError(f"rope_type={kind!r}: expected one of {', '.join(_NEEDED)}")
    for name in ("rope_theta", *_NEEDED[kind]):
        value = parameters.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(
                f"rotary setting {name}={value!r}: rope_type={kind!r} needs a positive number"
            )
    return {**parameters, "rope_type": kind}


def _older_parameters(config: Any, layer_type: str | None) -> Mapping[str, Any]:
    """Returns the rotary settings of a config of transformers 4."""
    if layer_type == "sliding_attention":
        return {"rope_theta": config.rope_local_base_freq}
    return {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}


def rope_positions(config: Any) -> int:
    """Returns how many positions a config's model can tell apart.

    With linear and dynamic scaling ``max_position_embeddings`` is the number before scaling, so
    that it is multiplied by the scaling's factor.

    Raises:
      ValueError: if the scaling is of an unknown kind or incomplete.
    """
    parameters = rope_parameters(config)
    scaled = parameters["rope_type"] in ("linear", "dynamic")
    return int(config.max_position_embeddings * (parameters["factor"] if scaled else 1))


def longrope_border(config: Any, layer_type: str | None = None) -> int | None:
    """Returns the longest text, in tokens, with a config's short LongRoPE frequencies.

    Longer texts have the long ones, from their first token on: what was computed before a text has
    crossed the border, such as a cache, does not fit what comes after. ``None`` means that the
    config has no such scaling.
    """
    parameters = rope_parameters(config, layer_type)
    has_border = parameters["rope_type"] == "longrope"
    return parameters["original_max_position_embeddings"] if has_border else None


def longrope_attention_factor(positions: int, original: int) -> float:
    """Returns what LongRoPE multiplies sines and cosines by (Ding et al. 2024, 2402.13753).

    Args:
      positions: the longest text.
      original: the longest text of pretraining.
    """
    scale = positions / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def llama3_scaling(divisors: np.ndarray, theta: float) -> dict[str, str | float] | None:
    """Finds the scaling of kind ``llama3`` that divides each frequency by a given number.

    Scalings whose lengths and frequency factors have the same ratios are one and the same;
    returned is the one whose ``low_freq_factor`` is 1, as in all of Meta's models.

    Args:
      divisors: what the frequencies are divided by (R / 2), the fastest rotation first.
      theta: the base of the frequencies.

    Returns:
      The settings under Hugging Face's names, or ``None`` if nothing is divided.

    Raises:
      ValueError: if no such scaling is found.
    """
    divisors = divisors.astype(np.float64)
    if np.all(divisors == 1.0):
        return None
    if not np.all(divisors >= 1.0):
        raise ValueError(f"a rotary frequency divided by {divisors.min()}: expected at least 1")
    turns = theta ** (-np.arange(len(divisors)) / len(divisors)) / (2 * np.pi)
    factor = divisors.max()
    # Meta's first: too few frequencies may lie where length and factor show.
    for length, high in (_LLAMA3, _fit_llama3(divisors, turns, factor)):
        settings = {
            "factor": float(np.float32(factor)),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": round(length),
        }
        scaled = _llama3(turns * 2 * np.pi, settings)
        if np.allclose(turns * 2 * np.pi / divisors, scaled, rtol=1e-4, atol=0):
            return {"rope_type": "llama3", **settings}
    raise ValueError(
        f"rotary frequencies divided by {divisors.min():.6g} to {factor:.6g}: expected the scaling "
        "of LLaMA 3; other scalings of single frequencies are not known"
    )


def llama3_divisors(channels: int, parameters: Mapping[str, Any]) -> Float[np.ndarray, " R2"]:
    """Returns what each frequency is divided by in the scaling of kind ``llama3``, in float32.

    Args:
      channels: number R of channels of a head that are rotated.
      parameters: settings that :func:`rope_parameters` returned.
    """
    frequencies = parameters["rope_theta"] ** (-np.arange(0, channels, 2) / channels)
    return (frequencies / _llama3(frequencies, parameters)).astype(np.float32)


def _fit_llama3(divisors, turns, factor):
    """Fits length and ``high_freq_factor`` to the frequencies between kept and fully divided."""
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (kept > 1e-3) & (kept < 1 - 1e-3)
    if between.sum() < 2:
        return _LLAMA3
    slope, constant = np.polyfit(turns[between], kept[between], 1)
    if constant >= 0:
        return _LLAMA3
    high = float(1 - 1 / constant)
    return slope * (high - 1), round(high, 3)


def _frequencies(parameters, channels, config, position_ids):
    kind, theta = parameters.get("rope_type", "default"), parameters["rope_theta"]
    exponents = np.arange(0, channels, 2) / channels
    if kind == "dynamic":
        # Neural tangent kernel scaling: the base grows with the length, once it exceeds what the
        # model was trained on. The length is the call's: cached keys keep the base they had.
        trained = config.max_position_embeddings
        length = jnp.maximum(position_ids.max() + 1, trained).astype(jnp.float32)
        grown = parameters["factor"] * (length / trained - 1.0) + 1.0
        return 1.0 / (theta * grown ** (channels / max(channels - 2, 1))) ** exponents
    frequencies = theta**-exponents
    if kind == "longrope":
        long, short = (_factors(parameters, f"{name}_factor", channels) for name in _LENGTHS)
        is_long = position_ids.max() >= parameters["original_max_position_embeddings"]
        # The length is the call's, as above.
        return frequencies / jnp.where(is_long, long, short)
    if kind == "linear":
        return frequencies / parameters["factor"]
    if kind == "llama3":
        return _llama3(frequencies, parameters)
    return frequencies


def _factors(parameters, name, channels):
    factors = parameters.get(name)
    is_list = isinstance(factors, list | tuple) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in factors
    )
    if not is_list or len(factors) != channels // 2:
        raise ValueError(
            f"rotary setting {name}={str(factors)[:80]}: longrope needs {channels // 2} positive "
            "numbers, one for each pair of channels"
        )
    return jnp.asarray(factors, jnp.float32)


def _attention_factor(parameters, config):
    original = parameters["original_max_position_embeddings"]
    scale = config.max_position_embeddings / original
    # Versions of transformers differ in which of the two counts.
    if not math.isclose(factor := parameters.get("factor") or scale, scale):
        raise ValueError(
            f"rotary setting factor={factor}: longrope needs max_position_embeddings="
            f"{config.max_position_embeddings} over original_max_position_embeddings={original}, "
            f"{scale:g}, or none"
        )
    given = parameters.get("attention_factor")
    return given or longrope_attention_factor(config.max_position_embeddings, original)


def _llama3(frequencies, parameters):
    """Lowers the frequencies that turn rarely within the trained length (Llama 3.1)."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / parameters["factor"])
