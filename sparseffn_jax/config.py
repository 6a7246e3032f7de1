"""These frozen dataclasses say what a SparseFFN is made of.

A config checks itself when it is built, can be hashed, and is read back exactly from its JSON.
Every mask in it is static: XLA compiles the masked program, and what is masked has no parameter.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np

from sparseffn_jax.ops.activations import get_activation
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.parsing import NamedFields, check_fields, parse_dataclass

Transform = Literal["low_rank", "block_circulant"]
_HIGHEST_DEGREE = 64  # Beyond it nothing is gained.
_BLOCK_SPARSE_PLANS = ("slice", "rows", "columns", "gather", "masked")


@dataclasses.dataclass(frozen=True)
class SpectralConfig:
    """The spectral branch is an FFN, ``down(activation(up(x)))``, with maps in a transform domain.

    A gated layer's branch is ``down(activation(gate(x)) * up(x))``. Without hidden units the branch
    is a bypass: one linear map from the layer's inputs to its outputs.

    Attributes:
      transform: ``"low_rank"`` writes the maps on axes that are adapted to the data, and keeps
        ``rank`` of them (the Karhunen-Loeve transform). ``"block_circulant"`` writes them on
        Fourier's axes within blocks of channels, where a mask may keep some of the
        ``block_size // 2 + 1`` frequencies.
      width: The branch has this many hidden units; with 0 it is a bypass. A block-circulant branch
        needs a multiple of ``block_size``.
      rank: The low-rank maps into the hidden units keep this many components; so does a bypass.
      down_rank: The low-rank map out of the hidden units keeps this many components; 0 stands for
        ``rank``.
      block_size: A circulant block has this many rows and columns; the number must divide
        ``d_model`` and ``width``.
      frequency_mask: Each of ``block_size // 2 + 1`` booleans says whether the block-circulant
        maps keep that frequency; ``None`` keeps all.
      implementation: The layer runs this plan: ``"two_gemms"`` or ``"merged"`` for low rank, and
        without hidden units also ``"joined"``, in which a bypass shares its products with a dense
        core; ``"fft"``, ``"dft"``, ``"split"`` or ``"dense"`` for block-circulant maps; with hidden
        units also ``"fused"``, kernels for Hopper GPUs. ``None`` lets the cost model choose.

    Example:
      >>> low_rank = SpectralConfig("low_rank", width=3072, rank=128)
      >>> circulant = SpectralConfig(
      ...     "block_circulant", width=8, block_size=4, frequency_mask=(True, False, True)
      ... )
      >>> circulant.frequencies
      (0, 2)
      >>> SpectralConfig("low_rank", rank=64).is_bypass
      True
    """

    transform: Transform = "low_rank"
    width: int = 0
    rank: int = 0
    down_rank: int = 0
    block_size: int = 0
    frequency_mask: tuple[bool, ...] | None = None
    implementation: str | None = None

    def __post_init__(self):
        check_fields(self)
        if self.width < 0:
            raise ValueError(f"spectral width={self.width}: expected 0 or a positive integer")
        others = {
            "low_rank": ("block_size", "frequency_mask"),
            "block_circulant": ("rank", "down_rank"),
        }
        for name in others[self.transform]:
            if getattr(self, name) not in (0, None):
                raise ValueError(
                    f"{name}={getattr(self, name)} has no meaning with transform="
                    f"{self.transform!r}: leave it out"
                )
        if self.transform == "low_rank":
            _check_positive("rank", self.rank)
            _check_positive("down_rank", self.down_rank or self.rank)
            if self.is_bypass and self.down_rank:
                raise ValueError(
                    f"down_rank={self.down_rank} has no meaning without hidden units (width=0): "
                    "leave it out"
                )
            plans = ("two_gemms", "merged", "joined" if self.is_bypass else "fused")
        else:
            self._check_blocks()
            plans = ("fft", "dft", "split", "dense", *(() if self.is_bypass else ("fused",)))
        _check_implementation(self.implementation, plans)

    def _check_blocks(self):
        _check_positive("block_size", self.block_size)
        if self.width % self.block_size:
            raise ValueError(
                f"spectral width={self.width} is not a multiple of block_size={self.block_size}"
            )
        if self.frequency_mask is None:
            return
        frequencies = self.block_size // 2 + 1
        if len(self.frequency_mask) != frequencies:
            raise ValueError(
                f"frequency_mask has {len(self.frequency_mask)} entries, but block_size="
                f"{self.block_size} has {frequencies} frequencies (block_size // 2 + 1)"
            )
        if not any(self.frequency_mask):
            raise ValueError("frequency_mask keeps no frequency: leave the spectral part out")

    @property
    def is_bypass(self) -> bool:
        """Tells whether the branch is one linear map, without hidden units."""
        return self.width == 0

    @property
    def frequencies(self) -> tuple[int, ...]:
        """Lists the rFFT frequencies that a block-circulant map keeps, in ascending order."""
        count = self.block_size // 2 + 1
        return tuple(
            f for f in range(count) if self.frequency_mask is None or self.frequency_mask[f]
        )


@dataclasses.dataclass(frozen=True)
class PolynomialConfig:
    """The spectral branch learns its activation as a polynomial, ``sum_k c_k T_k(u / radius)``.

    Attributes:
      degree: The Chebyshev polynomials ``T_k`` go up to this degree.
      degree_mask: Each of ``degree + 1`` booleans says whether the polynomial keeps that term;
        ``None`` keeps all.
      radius: The polynomial holds for inputs in ``[-radius, radius]``; beyond either end it goes
        on as its tangent line there.
      groups: The hidden units fall into this many groups, each with coefficients of its own; the
        number must divide the spectral width.

    Example:
      >>> polynomial = PolynomialConfig(degree=3, degree_mask=(True, True, False, True))
      >>> polynomial.degrees
      (0, 1, 3)
    """

    degree: int = 4
    degree_mask: tuple[bool, ...] | None = None
    radius: float = 4.0
    groups: int = 1

    def __post_init__(self):
        check_fields(self)
        _check_positive("polynomial degree", self.degree)
        if self.degree > _HIGHEST_DEGREE:
            raise ValueError(f"polynomial degree={self.degree}: expected at most {_HIGHEST_DEGREE}")
        _check_positive("polynomial groups", self.groups)
        if not 0.0 < self.radius < float("inf"):
            raise ValueError(f"polynomial radius={self.radius}: expected a positive number")
        if self.degree_mask is None:
            return
        if len(self.degree_mask) != self.degree + 1:
            raise ValueError(
                f"degree_mask has {len(self.degree_mask)} entries, but degree={self.degree} has "
                f"{self.degree + 1} terms (degree + 1)"
            )
        if not any(self.degree_mask):
            raise ValueError("degree_mask keeps no term: leave the polynomial part out")

    @property
    def degrees(self) -> tuple[int, ...]:
        """Lists the degrees that the polynomial keeps, in ascending order."""
        return tuple(
            k for k in range(self.degree + 1) if self.degree_mask is None or self.degree_mask[k]
        )


@dataclasses.dataclass(frozen=True)
class CoreConfig:
    """The core is a small or block-sparse FFN, ``W2 phi(W1 x + b1)``, beside the spectral branch.

    A gated layer's core is ``W2 (phi(Wg x + bg) * (Wu x + bu))``.

    Attributes:
      width: The core has this many hidden units. With all ``d_ff`` of them and no mask, it is the
        dense FFN itself.
      up_mask: This mask over ``(d_model, width)`` says which blocks of W1, or of both Wg and Wu,
        are kept; ``None`` keeps every block.
      down_mask: This mask over ``(width, d_model)`` says which blocks of W2 are kept; ``None``
        keeps every block.
      implementation: Maps with a mask run this plan: ``"slice"``, ``"rows"``, ``"columns"``,
        ``"gather"`` or ``"masked"``, as :func:`block_sparse_matmul` describes them. ``None`` lets
        the cost model choose, and is all that a core without a mask may have.

    Example:
      No output reads the last four of these eight hidden units.

      >>> core = CoreConfig(width=8, down_mask=BlockMask((4, 16), ((True,), (False,))))
      >>> core.without_dead_units()
      CoreConfig(width=4, up_mask=None, down_mask=None, implementation=None)
    """

    width: int
    up_mask: BlockMask | None = None
    down_mask: BlockMask | None = None
    implementation: str | None = None

    def __post_init__(self):
        check_fields(self)
        _check_positive("core width", self.width)
        _check_implementation(self.implementation, _BLOCK_SPARSE_PLANS)
        if self.implementation is not None and self.up_mask is None and self.down_mask is None:
            raise ValueError(
                f"implementation={self.implementation!r} has no meaning in a core without a mask: "
                "leave it out"
            )

    @property
    def runs_in_tiles(self) -> bool:
        """Tells whether the core runs, as a rule, in small products for an unstructured mask."""
        if self.implementation in ("masked", "gather"):
            return False
        core = self.without_dead_units()
        masks = (core.up_mask, core.down_mask)
        return any(mask is not None and not mask.is_structured for mask in masks)

    def without_dead_units(self) -> "CoreConfig":
        """Returns the core without the hidden units that no output reads.

        Masks of whole units leave a plain, narrower FFN, with no mask at all.
        """
        if self.down_mask is None:
            return self
        blocks_of = {
            "up_mask": None if self.up_mask is None else self.up_mask.block_shape[1],
            "down_mask": self.down_mask.block_shape[0],
        }
        group = math.lcm(*(side or 1 for side in blocks_of.values()))
        is_read = np.array(self.down_mask.blocks).any(axis=1)
        units = np.repeat(is_read, blocks_of["down_mask"]).reshape(-1, group).any(axis=1)
        masks: dict[str, BlockMask | None] = {}
        for name, side in blocks_of.items():
            if (mask := getattr(self, name)) is None:
                masks[name] = None
                continue
            kept = np.repeat(units, group // side)
            blocks = np.array(mask.blocks)
            blocks = blocks[:, kept] if name == "up_mask" else blocks[kept]
            if not blocks.any():
                return self
            masks[name] = None if blocks.all() else BlockMask.from_array(blocks, mask.block_shape)
        plan = self.implementation if any(masks.values()) else None
        smaller = CoreConfig(int(units.sum()) * group, **masks, implementation=plan)
        # Without the one mask, the other may allow a finer cut.
        return self if smaller == self else smaller.without_dead_units()


@dataclasses.dataclass(frozen=True)
class MicroRefinementConfig:
    """The micro-refinement adds a core FFN to the spectral branch, and corrects what both give.

    Attributes:
      core: This FFN of few hidden units, or of few blocks, is added to the spectral branch.
      corrections: Each of these masks over ``(d_model, d_model)`` adds one linear correction of
        the layer's output, ``y + y B``, in which B has the blocks that the mask keeps.
      implementation: The corrections, if there are any, run this plan; :class:`CoreConfig` lists
        the names. ``None`` lets the cost model choose.

    Example:
      >>> diagonal = BlockMask((4, 4), ((True, False), (False, True)))
      >>> micro = MicroRefinementConfig(core=CoreConfig(width=16), corrections=(diagonal,))
      >>> micro.corrections[0].density
      0.5
    """

    core: CoreConfig | None = None
    corrections: tuple[BlockMask, ...] = ()
    implementation: str | None = None

    def __post_init__(self):
        check_fields(self)
        if self.core is None and not self.corrections:
            raise ValueError(
                "micro-refinement needs a core or at least one correction: or leave it out"
            )
        _check_implementation(self.implementation, _BLOCK_SPARSE_PLANS)
        if self.implementation is not None and not self.corrections:
            raise ValueError(
                f"implementation={self.implementation!r} is the plan of corrections, but there are "
                "none: leave it out, or give it to the core"
            )


@dataclasses.dataclass(frozen=True)
class SparseFFNConfig(NamedFields):
    """A SparseFFN stands in for a dense feed-forward layer, ``d_model -> d_ff -> d_model``.

    Attributes:
      d_model: The layer takes and returns this many channels.
      d_ff: The dense FFN that the layer stands for has this many hidden units.
      activation: The activation phi goes by its Hugging Face name. The core uses it, and so does
        the spectral branch when ``polynomial`` is ``None``.
      spectral: This describes the spectral branch; ``None`` leaves it out.
      polynomial: The spectral branch learns this activation; with ``None`` it uses phi.
      micro: This describes the micro-refinement; ``None`` leaves it out.
      gated: If true, a hidden unit is ``phi(gate) * up``, made of two maps of the input, as in
        LLaMA.
      bias: If true, the maps have biases; a model whose FFN has none converts without any.

    Raises:
      ValueError: If a value is of another type than its field, or if the parts do not fit
        together. The message names the value and what was expected.
      TypeError: If a field is missing or unknown.

    Example:
      >>> spectral = SpectralConfig("low_rank", width=3072, rank=128)
      >>> config = SparseFFNConfig(d_model=768, d_ff=3072, spectral=spectral)
      >>> SparseFFNConfig.from_json(config.to_json()) == config
      True
      >>> SparseFFNConfig(d_model=768, d_ff="3072", spectral=spectral)
      Traceback (most recent call last):
      ValueError: d_ff='3072': expected an integer
    """

    d_model: int
    d_ff: int
    activation: str = "gelu_new"
    spectral: SpectralConfig | None = None
    polynomial: PolynomialConfig | None = None
    micro: MicroRefinementConfig | None = None
    gated: bool = False
    bias: bool = True

    def __post_init__(self):
        check_fields(self)
        _check_positive("d_model", self.d_model)
        _check_positive("d_ff", self.d_ff)
        get_activation(self.activation)
        if self.spectral is None and (self.micro is None or self.micro.core is None):
            raise ValueError(
                "a SparseFFN needs a spectral branch or a micro-refinement core: with neither, "
                "its output is constant"
            )
        if self.polynomial is not None:
            if self.spectral is None:
                raise ValueError("polynomial is the spectral branch's activation: add spectral")
            if self.spectral.is_bypass:
                raise ValueError(
                    "polynomial is the activation of the spectral branch's hidden units, but the "
                    "spectral width=0 leaves none: leave polynomial out, or give a width"
                )
            if self.spectral.width % self.polynomial.groups:
                raise ValueError(
                    f"polynomial groups={self.polynomial.groups} do not divide the spectral "
                    f"width={self.spectral.width}"
                )
        if self.spectral is not None:
            self._check_spectral(self.spectral)
        if self.micro is not None:
            self._check_micro(self.micro)

    def _check_spectral(self, spectral: SpectralConfig):
        if spectral.transform == "block_circulant":
            if self.d_model % spectral.block_size:
                raise ValueError(
                    f"block_size={spectral.block_size} does not divide d_model={self.d_model}"
                )
            return
        core = self.micro.core if self.micro is not None else None
        if spectral.implementation == "joined" and (
            core is None or core.up_mask is not None or core.down_mask is not None
        ):
            raise ValueError(
                "implementation='joined' joins a low-rank bypass with a core that has no mask: "
                "there is none, so leave it out"
            )
        for name in ("rank", "down_rank"):
            rank = getattr(spectral, name)
            limit = min(self.d_model, spectral.width or self.d_model)
            if rank > limit:
                raise ValueError(
                    f"{name}={rank} exceeds {limit}, the smaller of d_model={self.d_model} and "
                    f"the spectral width={spectral.width or self.d_model}"
                )

    def _check_micro(self, micro: MicroRefinementConfig):
        for i, mask in enumerate(micro.corrections):
            _check_mask_shape(f"corrections[{i}]", mask, (self.d_model, self.d_model))
        if micro.core is not None:
            width = micro.core.width
            _check_mask_shape("up_mask", micro.core.up_mask, (self.d_model, width))
            _check_mask_shape("down_mask", micro.core.down_mask, (width, self.d_model))

    @property
    def up_maps(self) -> tuple[str, ...]:
        """Names the maps into a hidden unit; the gate, on which phi acts, comes first."""
        return ("gate", "up") if self.gated else ("up",)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict from which :meth:`from_dict` rebuilds an equal config."""
        return dataclasses.asdict(self, dict_factory=_json_dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a config from :meth:`to_dict`'s output.

        Raises:
          ValueError: If a key is unknown or missing, if a value is of another type than its
            field, or if the values do not fit together.
        """
        return parse_dataclass(cls, values, "config")

    @classmethod
    def layers_from_json(cls, text: str) -> Self | tuple[Self | None, ...]:
        """Reads the configs of a model's layers.

        Args:
          text: One JSON object stands for every layer. A list has one entry for each layer: an
            object, or null for a layer that stays dense.

        Returns:
          The config of every layer; or, for a list, a tuple with a config or ``None`` for each.

        Raises:
          ValueError: If the text is not JSON, or if an object is not a config.
        """
        values = _load_json(text)
        if not isinstance(values, list):
            return parse_dataclass(cls, values, "config")
        return tuple(
            None if layer is None else parse_dataclass(cls, layer, f"layer {i}")
            for i, layer in enumerate(values)
        )

    def to_json(self) -> str:
        """Returns the config as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Builds a config from :meth:`to_json`'s output.

        Raises:
          ValueError: If the text is not JSON, or not a config, as :meth:`from_dict` says.
        """
        return parse_dataclass(cls, _load_json(text), "config")


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the config is not JSON: {error}") from error


def _digits(row: tuple[bool, ...]) -> str:
    return "".join("01"[block] for block in row)


def _json_dict(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {
        name: [_digits(row) for row in value] if name == "blocks" else value
        for name, value in items
    }


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value!r}: expected a positive integer")


def _check_implementation(implementation: str | None, plans: tuple[str, ...]) -> None:
    if implementation is not None and implementation not in plans:
        raise ValueError(
            f"implementation={implementation!r}: expected one of {', '.join(plans)}, or null"
        )


def _check_mask_shape(name: str, mask: BlockMask | None, shape: tuple[int, int]) -> None:
    if mask is not None and mask.shape != shape:
        raise ValueError(
            f"{name} covers {mask.shape} ({mask.grid[0]} x {mask.grid[1]} blocks of "
            f"{mask.block_shape[0]} x {mask.block_shape[1]}), but the weight is {shape}"
        )
