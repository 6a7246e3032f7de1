"""The parts that all model families share: feed-forward layer, stack of blocks, head and cache.

A family is a subclass of :class:`Decoder`. Its parameter tree has the names, shapes and layouts of
transformers 4.57's Flax class, so that a tree from there applies unchanged. Shape letters in
comments and names of this package: B batch, T tokens, S cached tokens, H heads, K head width, D
``d_model``, V vocabulary.
"""

import contextlib
import contextvars
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.models.gguf import GGUFLayout
from sparseffn_jax.models.names import NameMap
from sparseffn_jax.models.spec import DecoderSpec, FFNLayout
from sparseffn_jax.nn.head import Head
from sparseffn_jax.nn.parts import dot_general_f32
from sparseffn_jax.nn.paths import ShardingRule
from sparseffn_jax.nn.sparse_ffn import PACKED, SparseFFN
from sparseffn_jax.ops.plans.costs import Platform

Dtype = Any
# What every family calls the feed-forward layer of a block.
FFN_NAME = "mlp"
FFN = SparseFFNConfig | Callable[..., nn.Module] | None


class Decoder(nn.Module):
    """A decoder with a language-model head; the base class of the model families.

    A family is a subclass that defines the class attributes below and :meth:`spec_of`, and whose
    ``setup`` makes the body and, unless embeddings are tied, ``lm_head``. The body's method
    ``embed`` returns what goes into the first block and the table of rotary positions, if any. The
    family becomes known to the library by :func:`sparseffn_jax.models.families.register`.

    Attributes:
      config: the model's config, of the class ``config_class``; every field that changes numbers
        is honoured.
      ffns: one entry for each layer: ``None`` keeps the dense FFN, a ``SparseFFNConfig`` puts a
        ``SparseFFN`` in its place, and any callable is called with ``name``, ``dtype`` and
        ``param_dtype`` and returns the module to use, which maps ``(B, T, D)`` to ``(B, T, D)``.
        The empty tuple keeps every layer dense.
      dtype: the dtype of the computation. Norms' statistics, softmax and logits are always
        float32.
      param_dtype: the dtype of the parameters.
      remat: whether each block is computed again in the backward pass, so that its activations
        need not be stored.
      config_class: the class of the family's configs, whose ``model_type`` is the family's name.
      layer_path: the names of the body and of the collection of its blocks, under which a layer's
        number leads to its part of the parameters, the cache and the intermediates.
      ffn_layout: the names of the dense FFN's maps.
      d_ff_key: the config's key for the hidden width of the dense FFN.
      ffn_bias_key: the config's key that says whether the dense FFN has biases; ``None`` if there
        is none.
      block: the class of the blocks.
      names: the names of the family's tensors in checkpoints.
      sharding: how the family's own parameters, those of SparseFFNs left out, are dealt out on a
        mesh of devices; see :data:`sparseffn_jax.nn.paths.ShardingRule`. A parameter that no rule
        names is whole on every device.
      attention: the name of the attention in a block.
      norms: the names of the norms in the blocks and after them.
      gguf: how GGUF files hold the family's models; ``None`` if there are no such files. It says
        nothing of a subclass, which is of another architecture.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import GPT2Config
      >>> config = GPT2Config(
      ...     vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=2,
      ...     bos_token_id=0, eos_token_id=0,
      ... )
      >>> ffn = sf.size_ffn(d_model=32, d_ff=128, flops_ratio=0.5)
      >>> model = sf.GPT2LMHeadModel(config, ffns=(ffn, None))  # The second layer stays dense.
      >>> isinstance(model, sf.Decoder)
      True
      >>> ids = jnp.zeros((2, 8), int)
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> model.apply({"params": params}, ids).shape
      (2, 8, 97)
    """

    config: Any
    ffns: tuple[FFN, ...] = ()
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False

    config_class: ClassVar[type]
    layer_path: ClassVar[tuple[str, str]]
    ffn_layout: ClassVar[FFNLayout]
    d_ff_key: ClassVar[str]
    ffn_bias_key: ClassVar[str | None] = None
    block: ClassVar[type["Block"]]
    names: ClassVar[NameMap]
    sharding: ClassVar[tuple[ShardingRule, ...]]
    attention: ClassVar[str]
    norms: ClassVar[tuple[str, ...]]
    gguf: ClassVar[GGUFLayout | None] = None

    @staticmethod
    def spec_of(config: Any) -> DecoderSpec:
        """Returns the sizes that a config of this family states.

        Raises:
          ValueError: if the family's model cannot honour the config.
        """
        raise NotImplementedError

    @staticmethod
    def layer_kind(config: Any, layer: int) -> Hashable:
        """Returns what a block computes by its number: those of one kind are one program."""
        del config, layer
        return None

    @staticmethod
    def cache_border(config: Any) -> int | None:
        """Returns the longest text whose cache is of no use to longer ones; ``None`` is none."""
        del config
        return None

    @property
    def spec(self) -> DecoderSpec:
        """The sizes that the model's config states, under the same names in all families."""
        return self.spec_of(self.config)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
        init_cache: bool = False,
    ) -> Float[Array, "B T V"]:
        """Returns the logits of every position's next token, in float32.

        Args:
          input_ids: token ids (B, T) below ``vocab_size``.
          attention_mask: 1 for real tokens, 0 for padding. When decoding it covers the whole cache,
            so that S is the cache's length; otherwise, and where the cache begins, S = T. ``None``
            means that there is no padding.
          position_ids: positions (B, T) below ``n_positions``. By default they count from 0, or
            from the first free position of the cache if there is one; with padding on the left
            they must be given.
          deterministic: whether dropout is off; ``False`` applies the config's dropout rates and
            needs an rng named ``"dropout"``.
          init_cache: whether the key/value cache begins with these tokens. Where there is none, an
            empty one is created, as the function :func:`init_cache` does; one that exists is taken
            for empty, which needs less time and memory than to attend to what it holds.

        Returns:
          Logits (B, T, V).

        Raises:
          ValueError: if the config asks for a feature that the family lacks, if the number of
            entries of ``ffns`` is not that of the layers, if the tokens exceed ``n_positions`` or
            the cache, or if ``attention_mask`` does not cover the keys.
        """
        x = self.last_hidden_state(
            input_ids, attention_mask, position_ids, deterministic, init_cache
        )
        # Initialisation makes the parameters of a head of its own by calling it.
        return self.head().logits(x) if self.config.tie_word_embeddings else self.lm_head(x)

    def last_hidden_state(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
        init_cache: bool = False,
    ) -> Float[Array, "B T D"]:
        """Returns what :meth:`head` maps to the logits: the states behind the last norm.

        The arguments and the errors are those of :meth:`__call__`.

        Returns:
          Hidden states (B, T, D) in the model's ``dtype``.
        """
        n_positions = self.spec.n_positions
        if input_ids.shape[1] > n_positions:
            raise ValueError(f"{input_ids.shape[1]} tokens do not fit n_positions={n_positions}")
        if position_ids is None:
            start = 0 if init_cache else self._cached_tokens()
            position_ids = jnp.broadcast_to(start + jnp.arange(input_ids.shape[1]), input_ids.shape)
        body = getattr(self, self.layer_path[0])
        return body(input_ids, attention_mask, position_ids, deterministic, init_cache)

    def head(self) -> Head:
        """Returns the model's language-model head, of which a tied one shares the embedding."""
        if self.config.tie_word_embeddings:
            embedding = getattr(self, self.layer_path[0]).token_embedding
            return Head(embedding, tied=True, dtype=self.dtype)
        leaves = self.lm_head.variables["params"]
        return Head(leaves["kernel"], leaves.get("bias"), dtype=self.dtype)

    def embed(
        self, input_ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """Returns what goes into the first block, and the rotary table that all blocks take.

        Call it as ``model.apply({"params": params}, input_ids, method="embed")``. Positions count
        from 0; the table is that of one sequence, (1, T, 1, R / 2), or ``None`` if the family has
        none.
        """
        body = getattr(self, self.layer_path[0])
        positions = jnp.arange(input_ids.shape[1])[None]
        x, table = body.embed(input_ids, jnp.broadcast_to(positions, input_ids.shape), True)
        return x, jax.tree.map(lambda part: part[:1], table)

    def _cached_tokens(self) -> Int[Array, ""] | int:
        # Every layer's cache holds the same positions.
        cached: dict[Any, Any] = flatten_dict(self.variables.get("cache", {}))
        return next((leaf for path, leaf in cached.items() if path[-1] == "cache_index"), 0)

    def _body_settings(self) -> tuple[Any, tuple[FFN, ...], Dtype, Dtype, bool]:
        n_layer = self.spec.n_layer
        if self.ffns and len(self.ffns) != n_layer:
            raise ValueError(
                f"ffns has {len(self.ffns)} entries, but the model has n_layer={n_layer}: "
                "give one entry a layer (None keeps a layer dense), or an empty tuple"
            )
        ffns = self.ffns or (None,) * n_layer
        return self.config, ffns, self.dtype, self.param_dtype, self.remat

    def _untied_head(self, use_bias: bool = False) -> nn.Dense:
        return nn.Dense(
            self.config.vocab_size,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(self.config.initializer_range),
            dot_general=dot_general_f32,
        )


class Block(nn.Module):
    """Base class of the families' blocks, which hold attention and a feed-forward module.

    Attributes:
      config: the model's config.
      layer_index: the layer's number, from 0.
      ffn: the layer's entry of :attr:`Decoder.ffns`.
      dtype: the dtype of the computation.
      param_dtype: the dtype of the parameters.
      mlp: function that makes the dense FFN from the config, ``name``, ``dtype`` and
        ``param_dtype``.
    """

    config: Any
    layer_index: int
    ffn: FFN
    dtype: Dtype
    param_dtype: Dtype

    mlp: ClassVar[Callable[..., nn.Module]]

    def feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Runs the layer's feed-forward module, where calibration and profiles can see it."""
        # Costs nothing unless a caller makes the collection mutable (calibration does).
        self.sow("intermediates", "ffn_input", x)
        with jax.named_scope("ffn"):
            y = make_ffn(self.ffn, self.mlp, self.config, self.dtype, self.param_dtype)(x)
        self.sow("intermediates", "ffn_output", y)
        return y

    def behind_ffn(self, y: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns what a block adds to the residual stream, given what its FFN returns."""
        return y

    def before_norm(
        self, y: Float[Array, "*B D"], error: Float[Array, "*B D"]
    ) -> Float[Array, "*B D"]:
        """Returns what outputs ``y`` of the FFN must change by for an error of the stream.

        Args:
          y: what the FFN returns.
          error: what :meth:`behind_ffn` should return more.
        """
        del y
        return error


class BlockCollection(nn.Module):
    """The stack of a model's blocks, which are named ``0``, ``1`` and so on.

    Attributes:
      block: the family's class of blocks.
      config: the model's config.
      ffns: one entry for each layer, as in :attr:`Decoder.ffns`.
      dtype: the dtype of the computation.
      param_dtype: the dtype of the parameters.
      remat: whether each block is computed again in the backward pass.
    """

    block: type[Block]
    config: Any
    ffns: tuple[FFN, ...]
    dtype: Dtype
    param_dtype: Dtype
    remat: bool

    @nn.compact
    def __call__(self, x, attention_mask, rotary_table, deterministic, init_cache):
        # Static arguments are counted with `self` as number 0.
        block = self.block
        if (gather := _gather.get()) is not None and not self.is_initializing():
            # Inside of what is computed again: the backward pass gathers a second time, and no more
            # than one block's weights are ever whole.
            block = nn.map_variables(
                block, "params", trans_in_fn=lambda params: gather(params, self.dtype)
            )
        block = nn.remat(block, static_argnums=(4, 5)) if self.remat else block
        for i, ffn in enumerate(self.ffns):
            # Without it XLA's CPU compiler fuses the gradients of all later blocks' residual sums
            # into every block anew: work that grows with the square of the depth.
            x = jax.lax.optimization_barrier(x)
            x = block(self.config, i, ffn, self.dtype, self.param_dtype, name=str(i))(
                x, attention_mask, rotary_table, deterministic, init_cache
            )
            self.sow("intermediates", "hidden_states", x)
        return x


_gather: contextvars.ContextVar[Callable[[Any, Dtype], Any] | None] = contextvars.ContextVar(
    "gather", default=None
)


@contextlib.contextmanager
def gathering(gather: Callable[[Any, Dtype], Any]) -> Iterator[None]:
    """Says that in programs that are traced inside, parameters of blocks are stored in pieces.

    Args:
      gather: function of one block's parameters and the dtype of the computation that brings them
        to where the block needs them.
    """
    token = _gather.set(gather)
    try:
        yield
    finally:
        _gather.reset(token)


def make_ffn(
    ffn: FFN, dense: Callable[..., nn.Module], config: Any, dtype: Dtype, param_dtype: Dtype
) -> nn.Module:
    """Returns a layer's feed-forward module, which is named ``mlp``.

    Args:
      ffn: the layer's entry in ``ffns``, as in :class:`Decoder`.
      dense: class of the dense FFN, which is taken if ``ffn`` is ``None``.
      config: Hugging Face config of the model, with which the dense FFN is made.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """
    settings = {"name": FFN_NAME, "dtype": dtype, "param_dtype": param_dtype}
    if ffn is None:
        return dense(config, **settings)
    if isinstance(ffn, SparseFFNConfig):
        return SparseFFN(ffn, **settings)
    return ffn(**settings)


def init_cache(model: Decoder, batch_size: int, max_length: int) -> dict[str, Any]:
    """Returns an empty key/value cache for ``batch_size`` sequences of ``max_length`` tokens.

    Pass it as ``model.apply({"params": p, "cache": cache}, ..., mutable=["cache"])``. The cache
    itself counts the positions that are written; writing more than ``max_length`` positions in all
    is not detected.

    Args:
      model: the decoder.
      batch_size: number of sequences.
      max_length: largest number of tokens in a sequence, prompt and continuation together.

    Returns:
      The collection ``cache``, filled with zeros; keys and values have the model's ``dtype``.

    Raises:
      ValueError: if ``max_length`` exceeds the model's ``n_positions``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> from transformers import GPT2Config
      >>> config = GPT2Config(
      ...     vocab_size=97, n_positions=16, n_embd=32, n_layer=1, n_head=2,
      ...     bos_token_id=0, eos_token_id=0,
      ... )
      >>> model = sf.GPT2LMHeadModel(config)
      >>> ids = jnp.zeros((2, 8), int)
      >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
      >>> variables = {"params": params, "cache": sf.init_cache(model, 2, max_length=16)}
      >>> logits, changed = model.apply(variables, ids, mutable=["cache"])
      >>> logits.shape
      (2, 8, 97)
      >>> variables |= changed  # The next call continues behind these eight tokens.
      >>> logits, changed = model.apply(variables, ids[:, :1], mutable=["cache"])
      >>> logits.shape
      (2, 1, 97)
    """
    n_positions = model.spec.n_positions
    if max_length > n_positions:
        raise ValueError(
            f"a cache of {max_length} tokens exceeds n_positions={n_positions}: "
            "shorten the prompt or generate fewer tokens"
        )
    ids = jax.ShapeDtypeStruct((batch_size, max_length), jnp.int32)
    shapes = jax.eval_shape(
        lambda key, ids: model.init(key, ids, init_cache=True), jax.random.key(0), ids
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["cache"])


def ffn_module(model: Decoder, layer: int) -> nn.Module:
    """Returns one layer's FFN as a separate module, to apply to that layer's ``mlp`` leaves."""
    ffn = model.ffns[layer] if model.ffns else None
    return make_ffn(ffn, model.block.mlp, model.config, model.dtype, model.param_dtype)


def block_module(model: Decoder, layer: int) -> "Block":
    """Returns one layer's block as a separate module, to apply to that layer's leaves."""
    ffn = model.ffns[layer] if model.ffns else None
    return model.block(model.config, layer, ffn, model.dtype, model.param_dtype)


def pack_ffns(
    model: Decoder, params: Mapping[str, Any], tokens: int, platform: Platform
) -> dict[str, Any]:
    """Packs the weights of all sparse FFNs for calls of ``tokens`` tokens.

    Args:
      model: a decoder; FFNs that are no ``SparseFFN`` are left out.
      params: parameters of the model.
      tokens: number of tokens of a call, all its sequences together.
      platform: the platform that the calls are compiled for.

    Returns:
      The model's collection ``packed``, which :meth:`SparseFFN.pack` describes; empty if no layer
      has a ``SparseFFN``.
    """
    sparse = [i for i, ffn in enumerate(model.ffns) if isinstance(ffn, SparseFFNConfig)]
    if not sparse:
        return {}
    body, collection = model.layer_path
    layers = layers_of(model, params)
    packed = {}
    for i in sparse:
        variables = (
            ffn_module(model, i)
            .clone(name=None)
            .pack({"params": layers[i][FFN_NAME]}, tokens, platform=platform)
        )
        packed[str(i)] = {FFN_NAME: variables[PACKED]}
    return {body: {collection: packed}}


def layers_of(model: Decoder, tree: Mapping[str, Any]) -> list[Any]:
    """Returns the part of each layer in a tree of parameters, intermediates or caches."""
    body, collection = model.layer_path
    return [tree[body][collection][str(i)] for i in range(model.spec.n_layer)]


def replace_ffns(
    model: Decoder, params: Mapping[str, Any], ffns: Mapping[int, Any]
) -> dict[str, Any]:
    """Returns ``params`` with other ``mlp`` leaves in some layers; all other leaves are shared."""
    body, collection = model.layer_path
    layers = dict(params[body][collection])
    layers |= {str(i): {**layers[str(i)], FFN_NAME: leaves} for i, leaves in ffns.items()}
    return {**params, body: {**params[body], collection: layers}}
