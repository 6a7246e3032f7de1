"""What a family says of a model's sizes and of its dense FFN, in the same terms as all others."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The sizes that a model's config states, under the same names in all families.

    Attributes:
      n_layer: the number of blocks.
      n_positions: the largest number of tokens in a sequence.
      d_model: the number of channels that go into an FFN and come out of it.
      d_ff: the number of hidden units of the dense FFN.
      activation: the Hugging Face name of the dense FFN's activation.
      gated: whether the dense FFN is ``W2 (phi(Wg x) * (Wu x))`` instead of ``W2 phi(W1 x)``.
      ffn_bias: whether the dense FFN has biases.

    Example:
      >>> import sparseffn_jax as sf
      >>> from transformers import GPT2Config
      >>> spec = sf.GPT2LMHeadModel(GPT2Config()).spec
      >>> spec.n_layer, spec.d_model, spec.d_ff, spec.activation
      (12, 768, 3072, 'gelu_new')
    """

    n_layer: int
    n_positions: int
    d_model: int
    d_ff: int
    activation: str
    gated: bool
    ffn_bias: bool


@dataclasses.dataclass(frozen=True)
class FFNLayout:
    """The names that a family gives to the maps of its dense FFN, below ``mlp``.

    Attributes:
      up: the name of W1 or, if the FFN is gated, of Wu.
      down: the name of W2.
      gate: the name of Wg, or ``None`` if the FFN is not gated.
      transposed: whether kernels are stored as ``(out, in)``.
    """

    up: str
    down: str
    gate: str | None = None
    transposed: bool = False

    @property
    def up_maps(self) -> tuple[str, ...]:
        """The maps into the hidden units, in the order of ``SparseFFNConfig.up_maps``."""
        return (self.up,) if self.gate is None else (self.gate, self.up)
