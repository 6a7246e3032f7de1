"""Rotary position embeddings (Su et al. 2021, 2104.09864), and their scalings to longer contexts.

Each pair of channels is rotated by its frequency times the position. Shape letters: B batch, T
tokens, H heads, K head width, R channels of a head that are rotated.
"""

from collections.abc import Mapping
from typing import Any

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
}


def rotary_table(
    position_ids: Int[Array, "B T"], channels: int, config: Any | None = None
) -> Table:
    """Returns the sines and cosines of every position's angles, in float32.

    Args:
      position_ids: positions (B, T), counted from 0.
      channels: number R of channels of a head that are rotated; even.
      config: config of the model, with Hugging Face's ``rope_theta`` and ``rope_scaling``
        (transformers 4) or ``rope_parameters`` (transformers 5). ``None`` stands for a theta of
        10000 without scaling.

    Returns:
      The sines and the cosines, both (B, T, 1, R / 2).

    Raises:
      ValueError: if R is odd, or the config's scaling is of an unknown kind or incomplete.
    """
    if channels < 2 or channels % 2:
        raise ValueError(f"{channels} rotary channels of a head: expected a positive even number")
    parameters = {"rope_theta": 10000.0} if config is None else rope_parameters(config)
    frequencies = _frequencies(parameters, channels, config, position_ids)
    angles = position_ids[..., None, None].astype(jnp.float32) * frequencies
    return jnp.sin(angles), jnp.cos(angles)


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


def rope_parameters(config: Any) -> Mapping[str, Any]:
    """Checks a config's rotary settings and returns them in the form of transformers 5.

    Raises:
      ValueError: if the scaling is of an unknown kind or incomplete.
    """
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        scaling = getattr(config, "rope_scaling", None) or {}
        parameters = {"rope_theta": config.rope_theta, **scaling}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _NEEDED:
        raise ValueError(f"rope_type={kind!r}: expected one of {', '.join(_NEEDED)}")
    for name in ("rope_theta", *_NEEDED[kind]):
        value = parameters.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(
                f"rotary setting {name}={value!r}: rope_type={kind!r} needs a positive number"
            )
    return {**parameters, "rope_type": kind}


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
    if kind == "linear":
        return frequencies / parameters["factor"]
    if kind == "llama3":
        return _llama3(frequencies, parameters)
    return frequencies


def _llama3(frequencies, parameters):
    """Lowers the frequencies that turn rarely within the trained length (Llama 3.1)."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / parameters["factor"])
