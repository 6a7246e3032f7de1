"""Sparse models for transformers: this file lies in the folder of each, beside its weights.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

It needs PyTorch and transformers, and nothing of sparseffn_jax, which writes the folder: Hugging
Face's own format except for the parameters under ``mlp`` and the key ``sparse_ffn`` of
config.json, a list with ``null`` or the parts of a :class:`SparseFFN` for each layer. What is
masked by blocks is multiplied as zeros; everything else is as small as it is stored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN


class _Sparse(nn.Module):
    """What makes the FFNs of a model sparse; it goes before transformers' class."""

    def __init__(self, config: Any):
        super().__init__(config)
        blocks: Any = self.transformer.h if hasattr(self, "transformer") else self.model.layers
        for block, ffn in zip(blocks, config.sparse_ffn, strict=True):
            if ffn is not None:
                block.mlp = SparseFFN(ffn)


class SparseGPT2Config(transformers.GPT2Config):
    """A GPT-2's config, with ``sparse_ffn``."""

    model_type = "sparseffn_gpt2"


class SparseGPT2LMHeadModel(_Sparse, transformers.GPT2LMHeadModel):
    """A GPT-2 with sparse FFNs."""

    config_class = SparseGPT2Config


class SparseGPTJConfig(transformers.GPTJConfig):
    """A GPT-J's config, with ``sparse_ffn``."""

    model_type = "sparseffn_gptj"


class SparseGPTJForCausalLM(_Sparse, transformers.GPTJForCausalLM):
    """A GPT-J with sparse FFNs."""

    config_class = SparseGPTJConfig


class SparseLlamaConfig(transformers.LlamaConfig):
    """A LLaMA's config, with ``sparse_ffn``."""

    model_type = "sparseffn_llama"


class SparseLlamaForCausalLM(_Sparse, transformers.LlamaForCausalLM):
    """A LLaMA with sparse FFNs."""

    config_class = SparseLlamaConfig


class SparseMistralConfig(transformers.MistralConfig):
    """A Mistral's config, with ``sparse_ffn``."""

    model_type = "sparseffn_mistral"


class SparseMistralForCausalLM(_Sparse, transformers.MistralForCausalLM):
    """A Mistral with sparse FFNs."""

    config_class = SparseMistralConfig


class SparseQwen2Config(transformers.Qwen2Config):
    """A Qwen2's config, with ``sparse_ffn``."""

    model_type = "sparseffn_qwen2"


class SparseQwen2ForCausalLM(_Sparse, transformers.Qwen2ForCausalLM):
    """A Qwen2 with sparse FFNs."""

    config_class = SparseQwen2Config


class SparsePhi3Config(transformers.Phi3Config):
    """A Phi-3's config, with ``sparse_ffn``."""

    model_type = "sparseffn_phi3"


class SparsePhi3ForCausalLM(_Sparse, transformers.Phi3ForCausalLM):
    """A Phi-3 with sparse FFNs."""

    config_class = SparsePhi3Config


# Families that older versions of transformers lack, which read the folders of all others.

if hasattr(transformers, "Qwen3Config"):

    class SparseQwen3Config(transformers.Qwen3Config):
        """A Qwen3's config, with ``sparse_ffn``."""

        model_type = "sparseffn_qwen3"

    class SparseQwen3ForCausalLM(_Sparse, transformers.Qwen3ForCausalLM):
        """A Qwen3 with sparse FFNs."""

        config_class = SparseQwen3Config


if hasattr(transformers, "SmolLM3Config"):

    class SparseSmolLM3Config(transformers.SmolLM3Config):
        """A SmolLM3's config, with ``sparse_ffn``."""

        model_type = "sparseffn_smollm3"

    class SparseSmolLM3ForCausalLM(_Sparse, transformers.SmolLM3ForCausalLM):
        """A SmolLM3 with sparse FFNs."""

        config_class = SparseSmolLM3Config


if hasattr(transformers, "Gemma3TextConfig"):

    class SparseGemma3TextConfig(transformers.Gemma3TextConfig):
        """A Gemma 3's config, with ``sparse_ffn``."""

        model_type = "sparseffn_gemma3_text"

    class SparseGemma3ForCausalLM(_Sparse, transformers.Gemma3ForCausalLM):
        """A Gemma 3 with sparse FFNs."""

        config_class = SparseGemma3TextConfig


class SparseFFN(nn.Module):
    """``y = down(poly(up(x) + bias)) + core(x) + bias``, then ``y = y + y B_k``.

    Gated, hidden units are ``poly(gate(x)) * up(x)``. Parameters are called as they are stored.

    Args:
      config: ``SparseFFNConfig.to_dict()`` of one layer, an entry of ``sparse_ffn``.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        d_model, micro = config["d_model"], config["micro"] or {"core": None, "corrections": []}
        self.has_spectral = config["spectral"] is not None
        if self.has_spectral:
            branch = SpectralBranch if config["spectral"]["width"] else Bypass
            self.spectral = branch(config)
        self.has_core = micro["core"] is not None
        if self.has_core:
            self.core = Core(config, micro["core"])
        self.corrections = [f"correction_{i}" for i in range(len(micro["corrections"]))]
        for name, mask in zip(self.corrections, micro["corrections"], strict=True):
            self.add_module(name, BlockSparseLinear(d_model, d_model, Mask.read(mask)))
        self.bias = _empty(d_model) if config["bias"] else 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x) + self.bias
        if self.has_spectral:
            y = y + self.spectral(x)
        if self.has_core:
            y = y + self.core(x)
        for name in self.corrections:
            y = y + getattr(self, name)(y)
        return y


class HiddenLayer(nn.Module):
    """Maps ``gate``, if gated, and ``up`` into hidden units, and ``down`` out of them."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.is_gated = config["gated"]
        self.phi: Callable[[Tensor], Tensor] = ACT2FN[config["activation"]]

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x) + getattr(self.up, "bias", 0.0)
        if self.is_gated:
            up = self.activate(self.gate(x) + getattr(self.gate, "bias", 0.0)) * up
        else:
            up = self.activate(up)
        return self.down(up)

    def activate(self, u: Tensor) -> Tensor:
        return self.phi(u)


class SpectralBranch(HiddenLayer):
    """The spectral branch, whose activation may be a polynomial."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        d_model, branch = config["d_model"], config["spectral"]
        width, rank = branch["width"], branch["rank"]
        for name in ("gate", "up") if self.is_gated else ("up",):
            self.add_module(name, _spectral_map(d_model, width, rank, branch, config["bias"]))
        self.down = _spectral_map(width, d_model, branch["down_rank"] or rank, branch, False)
        self.polynomial_config = config["polynomial"]
        if (polynomial := self.polynomial_config) is not None:
            self.degrees = _kept(polynomial["degree_mask"], polynomial["degree"] + 1)
            self.polynomial = _empty(polynomial["groups"], len(self.degrees))

    def activate(self, u: Tensor) -> Tensor:
        if self.polynomial_config is None:
            return self.phi(u)
        return chebyshev(u, self.polynomial, self.degrees, self.polynomial_config["radius"])


class Bypass(nn.Module):
    """The spectral branch without hidden units: one linear map."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        d_model, branch = config["d_model"], config["spectral"]
        self.bypass = _spectral_map(d_model, d_model, branch["rank"], branch, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bypass(x)


class Core(HiddenLayer):
    """A narrower FFN, dense or with block masks."""

    def __init__(self, config: Mapping[str, Any], core: Mapping[str, Any]):
        super().__init__(config)
        width, up_mask, down_mask = _without_dead_units(
            core["width"], Mask.read(core["up_mask"]), Mask.read(core["down_mask"])
        )
        for name in ("gate", "up") if self.is_gated else ("up",):
            linear = BlockSparseLinear(config["d_model"], width, up_mask, config["bias"])
            self.add_module(name, linear)
        self.down = BlockSparseLinear(width, config["d_model"], down_mask)


def chebyshev(u: Tensor, coefficients: Tensor, degrees: Sequence[int], radius: float) -> Tensor:
    """Returns ``sum_k c_k T_k(u / radius)``, outside ``[-radius, radius]`` its tangent lines.

    Args:
      u: ``(..., m)``; evaluated in float32, returned in its own dtype.
      coefficients: ``(groups, len(degrees))``, a row for each group of ``m / groups`` channels.
      degrees: the kept degrees, ascending.
      radius: above 0.
    """
    coefficients = coefficients.float().repeat_interleave(u.shape[-1] // len(coefficients), dim=0)
    dtype, u = u.dtype, u.float()
    inside = u.clamp(-radius, radius)
    t = inside / radius
    terms = [torch.ones_like(t), t]
    while len(terms) <= degrees[-1]:
        terms.append(2 * t * terms[-1] - terms[-2])
    y = torch.zeros_like(u)
    for k, c in zip(degrees, coefficients.T, strict=True):
        # T_k'(1) = k^2 and T_k'(-1) = (-1)^(k+1) k^2.
        slope = torch.where(u > 0, 1.0, (-1.0) ** (k + 1)) * k**2 / radius
        y = y + c * (terms[k] + slope * (u - inside))
    return y.to(dtype)


class LowRankMap(nn.Module):
    """Projects on ``rank`` axes, and maps those to the outputs."""

    def __init__(self, channels: int, features: int, rank: int, bias: bool):
        super().__init__()
        if bias:
            self.bias = _empty(features)
        self.axes, self.filter = _empty(channels, rank), _empty(rank, features)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.axes @ self.filter


class BlockCirculantMap(nn.Module):
    """Multiplies the rFFT of every block of b channels by a filter at the kept frequencies.

    In float32: PyTorch has no FFT of bfloat16.
    """

    def __init__(
        self, channels: int, features: int, block_size: int, frequencies: list[int], bias: bool
    ):
        super().__init__()
        if bias:
            self.bias = _empty(features)
        self.block_size, self.frequencies = block_size, frequencies
        # Where the filter has an imaginary part: DC and, for even b, Nyquist have none.
        self.complex = [i for i, f in enumerate(frequencies) if 2 * f % block_size]
        blocks = channels // block_size, features // block_size
        self.real = _empty(len(frequencies), *blocks)
        if self.complex:
            self.imag = _empty(len(self.complex), *blocks)

    def forward(self, x: Tensor) -> Tensor:
        b = self.block_size
        real = self.real.float()
        imag = torch.zeros_like(real)
        if self.complex:
            imag[self.complex] = self.imag.float()
        spectrum = torch.fft.rfft(x.float().unflatten(-1, (-1, b)))[..., self.frequencies]
        filtered = torch.einsum("...pf,fpq->...qf", spectrum, torch.complex(real, imag))
        full = filtered.new_zeros(*filtered.shape[:-1], b // 2 + 1)
        full[..., self.frequencies] = filtered
        return torch.fft.irfft(full, n=b).flatten(-2).to(x.dtype)


class Mask(NamedTuple):
    """Which blocks of a weight matrix live: the sides of a block, and a grid of booleans."""

    block_shape: tuple[int, int]
    blocks: Tensor

    @classmethod
    def read(cls, mask: Mapping[str, Any] | None) -> "Mask | None":
        """Reads config.json's form, in which a row of the grid is a string of 0 and 1."""
        if mask is None:
            return None
        rows = [[digit == "1" for digit in row] for row in mask["blocks"]]
        # Whatever device the weights are made on: these are numbers to reckon with.
        return cls(tuple(mask["block_shape"]), torch.tensor(rows, device="cpu"))

    def of_units(self, axis: int, kept: Tensor) -> "Mask":
        """Returns the mask over those rows or columns that are kept, whole blocks of them."""
        blocks = kept[:: self.block_shape[axis]].nonzero().flatten()
        return self._replace(blocks=self.blocks.index_select(axis, blocks))

    def stored(self) -> Tensor:
        """Returns where in the flattened matrix every stored weight belongs, in stored shape.

        If what lives is whole block rows and columns, one matrix without the others is stored;
        otherwise the living blocks, ``(n, bi, bo)``, by output block and then by input block.
        """
        (bi, bo), (rows, columns) = self.block_shape, self.blocks.shape
        places = torch.arange(rows * bi * columns * bo, device="cpu").view(rows, bi, columns, bo)
        live_rows, live_columns = self.blocks.any(1), self.blocks.any(0)
        if self.blocks.sum() == live_rows.sum() * live_columns.sum():
            return places[live_rows][:, :, live_columns].flatten(2).flatten(0, 1)
        return places.permute(2, 0, 1, 3)[self.blocks.T]


class BlockSparseLinear(nn.Module):
    """A linear map whose kernel, ``(in, out)``, holds only the living blocks."""

    def __init__(self, channels: int, features: int, mask: Mask | None, bias: bool = False):
        super().__init__()
        if bias:
            self.bias = _empty(features)
        self.shape, self.mask = (channels, features), mask
        self.kernel = _empty(*(self.shape if mask is None else mask.stored().shape))
        # No buffer: transformers would not fill one that is not stored.
        self.places: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return x @ self.kernel
        if self.places is None or self.places.device != x.device:
            # Training may go on with what evaluation has made.
            with torch.inference_mode(False):
                self.places = self.mask.stored().flatten().to(x.device)
        dense = self.kernel.new_zeros(math.prod(self.shape))
        return x @ dense.scatter(0, self.places, self.kernel.flatten()).view(self.shape)


def _without_dead_units(
    width: int, up: Mask | None, down: Mask | None
) -> tuple[int, Mask | None, Mask | None]:
    """Drops the hidden units that no output reads: they are not stored.

    In groups that both masks' blocks divide, until nothing changes: a mask that has become all
    ones is none, and without it the other may allow a finer cut.
    """
    changed = True
    while changed and down is not None:
        side = down.block_shape[0]
        group = math.lcm(side, 1 if up is None else up.block_shape[1])
        kept = down.blocks.any(1).repeat_interleave(side).view(-1, group).any(1)
        kept = kept.repeat_interleave(group)
        smaller = up and up.of_units(1, kept), down.of_units(0, kept)
        if any(mask is not None and not mask.blocks.any() for mask in smaller):
            break
        masks = [None if mask is None or mask.blocks.all() else mask for mask in smaller]
        changed = not kept.all() or masks.count(None) > (up, down).count(None)
        width, (up, down) = int(kept.sum()), masks
    return width, up, down


def _spectral_map(
    channels: int, features: int, rank: int, branch: Mapping[str, Any], bias: bool
) -> nn.Module:
    if branch["transform"] == "low_rank":
        return LowRankMap(channels, features, rank, bias)
    b = branch["block_size"]
    frequencies = _kept(branch["frequency_mask"], b // 2 + 1)
    return BlockCirculantMap(channels, features, b, frequencies, bias)


def _kept(mask: Sequence[bool] | None, count: int) -> list[int]:
    return [i for i in range(count) if mask is None or mask[i]]


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))
