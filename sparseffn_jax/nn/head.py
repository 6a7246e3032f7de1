"""The language-model head, from hidden states to logits, and its gradient a few tokens at a time.

Shape letters are those of :mod:`sparseffn_jax.models.decoder`, and besides t tokens in a chunk and
G shards of a batch.

The gradient of a head's weight is summed up over chunks of tokens, and is larger than all else that
a loss needs. On CPU XLA cannot add a product to an array in place: it would take as much memory
again. So the rows of a large weight, which are D or, of a tied head, V, are cut into n blocks, and
one block is added at a time. A mesh may deal out the rows; so that no device waits for another's
block, each of s pieces of the rows has a part of every block: rows = (s, n, r).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
from jaxtyping import Array, Float

from sparseffn_jax.nn.parts import dot_general_f32

# A weight of up to 256 MiB of float32 is one block, and a larger one has blocks of up to 64 MiB.
_WHOLE_ENTRIES, _BLOCK_ENTRIES = 2**26, 2**24
_PIECES = 8
# Words in a tile of a GPU's matrix products, which may cut them further into up to 16 parts.
_ALIGNED = 128


@struct.dataclass
class Head:
    """A language-model head as a value, so that a loss can multiply by it a few tokens at a time.

    Attributes:
      weight: the kernel (D, V) of a head of its own, or the embedding (V, D) of a tied one.
      bias: the bias (V), or ``None`` if the head has none.
      tied: whether ``weight`` is an embedding (V, D).
      dtype: the dtype in which hidden states, weight and bias are multiplied, as in ``nn.Dense``;
        sums and logits are float32.
    """

    weight: Float[Array, "D V"] | Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None
    tied: bool = struct.field(pytree_node=False, default=False)
    dtype: Any = struct.field(pytree_node=False, default=None)

    @property
    def vocab_size(self) -> int:
        """The number of words."""
        return self.weight.shape[0 if self.tied else 1]

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Returns the float32 logits of hidden states, those that ``nn.Dense`` would give."""
        hidden, weight, bias = promote_dtype(hidden, self.weight, self.bias, dtype=self.dtype)
        contracted = ((hidden.ndim - 1,), (1 if self.tied else 0,))
        logits: jax.Array = dot_general_f32(hidden, weight, (contracted, ((), ())))
        return logits if bias is None else logits + bias

    def logits_by_blocks(self, hidden: Float[Array, "B t D"]) -> Float[Array, "B t V"]:
        """Returns :meth:`logits` but for rounding, and never converts all of the weight at once.

        In float32 there is nothing to convert, and the result is the same; so it is, at the cost of
        memory, of an untied head whose V is no multiple of 8.
        """
        dtype, shape = self.product_dtype(hidden), self.blocked()
        # Where a mesh deals out D instead of V, it adds up logits, and not those of every block.
        is_d_whole = self.tied or self.vocab_size % _PIECES == 0
        if dtype == jnp.float32 or shape[1] == 1 or not is_d_whole:
            return self.logits(hidden)
        hidden, numbers = hidden.astype(dtype), jnp.arange(shape[1])
        if self.tied:
            _, blocks = scan(
                lambda _, i: (None, _einsum("btd,srd->btsr", hidden, self._block(i, dtype))),
                None,
                numbers,
            )
            logits = jnp.moveaxis(blocks, 0, 3).reshape(*hidden.shape[:2], -1)
        else:
            parts = jnp.moveaxis(hidden.reshape(*hidden.shape[:2], *shape[:3]), 3, 0)
            zeros = jnp.zeros((*hidden.shape[:2], self.vocab_size), jnp.float32)

            def add_block(logits, numbered):
                index, part = numbered
                return logits + _einsum("btsr,srv->btv", part, self._block(index, dtype)), None

            logits, _ = scan(add_block, zeros, (numbers, parts))
        return logits if self.bias is None else logits + self.bias.astype(dtype)

    def hidden_gradient(
        self, hidden: Float[Array, "B t D"], slope: Float[Array, "B t V"]
    ) -> Float[Array, "B t D"]:
        """Returns a loss's float32 gradient at hidden states, given that at their logits.

        Products are in the dtype of ``slope``, of the values that the forward pass has multiplied.
        """
        dtype, shape = self.product_dtype(hidden), self.blocked()
        if dtype == jnp.float32 or shape[1] == 1:
            weight = self.weight.astype(dtype).astype(slope.dtype)
            return _einsum("btv,vd->btd" if self.tied else "btv,dv->btd", slope, weight)

        def block(index):
            return self._block(index, dtype).astype(slope.dtype)

        numbers = jnp.arange(shape[1])
        if self.tied:
            parts = jnp.moveaxis(slope.reshape(*slope.shape[:2], *shape[:3]), 3, 0)
            # Pieces, which may lie on several devices, are added after the last block.
            gradient, _ = scan(
                lambda total, x: (total + _einsum("btsr,srd->sbtd", x[1], block(x[0])), None),
                jnp.zeros((shape[0], *hidden.shape), jnp.float32),
                (numbers, parts),
            )
            return gradient.sum(0)
        _, blocks = scan(
            lambda _, i: (None, _einsum("btv,srv->btsr", slope, block(i))), None, numbers
        )
        return jnp.moveaxis(blocks, 0, 3).reshape(hidden.shape)

    def aligned(self, hidden: Float[Array, "B t D"]) -> "Head":
        """Returns a head for a GPU's matrix products, to which words are added to fill whole tiles.

        GPUs load vectors of 16 bytes: where rows of logits begin between two of them, an H200 takes
        more than four times as long for products. A weight that is one block is also converted
        once for all chunks; a larger one is left as it is.

        Args:
          hidden: the hidden states to come.

        Returns:
          The head; words that are added have weights of 0.
        """
        if self.blocked()[1] > 1:
            return self
        words, dtype = -self.vocab_size % _ALIGNED, self.product_dtype(hidden)
        padding = [(0, words), (0, 0)] if self.tied else [(0, 0), (0, words)]
        return self.replace(
            weight=jnp.pad(self.weight.astype(dtype), padding),
            bias=None if self.bias is None else jnp.pad(self.bias, (0, words)),
        )

    def blocked(self) -> tuple[int, int, int, int]:
        """Returns the weight's shape with its rows in blocks: (s, n, r, columns)."""
        rows, columns = self.weight.shape
        if self.weight.size <= _WHOLE_ENTRIES:
            return 1, 1, rows, columns
        least = min(rows, math.ceil(self.weight.size / _BLOCK_ENTRIES))
        count = next(n for n in range(least, rows + 1) if rows % n == 0)
        if count > 16 * least:
            # A prime number of words, say, has blocks of one word only, which would be slow.
            return 1, 1, rows, columns
        pieces = math.gcd(rows // count, _PIECES)
        return pieces, count, rows // count // pieces, columns

    def product_dtype(self, hidden: Array) -> Any:
        """Returns the dtype in which hidden states are multiplied by the weight."""
        return jnp.dtype(canonicalize_dtype(hidden, self.weight, self.bias, dtype=self.dtype))

    def _block(self, index: Array, dtype: Any) -> Array:
        """Returns a block of the weight, (s, r, columns), in ``dtype``."""
        stored = self.weight.dtype
        # With the index, so that what follows is not taken for the same in all steps of a loop, and
        # done for all blocks before it.
        weight, index = jax.lax.optimization_barrier((self.weight, index))
        if stored.itemsize == 2:
            # XLA's CPU compiler slices half precision in float32, but integers as they are.
            weight = jax.lax.bitcast_convert_type(weight, jnp.uint16)
        weight = weight.reshape(self.blocked())
        block = jax.lax.dynamic_index_in_dim(weight, index, 1, keepdims=False)
        return jax.lax.bitcast_convert_type(block, stored).astype(dtype)


class HeadGradient(NamedTuple):
    """The float32 gradient of a head, summed up chunk by chunk; ``None`` where it is not wanted.

    Each shard of the batch sums up its own: devices that share a batch would otherwise exchange
    the whole gradient in every chunk.

    Attributes:
      weight: (G, s, n, r, columns).
      bias: (G, V).
    """

    weight: Array | None
    bias: Array | None

    @classmethod
    def zeros(cls, head: Head, weight: bool, bias: bool, shards: int) -> "HeadGradient":
        """Returns the gradient before the first chunk.

        Args:
          head: the head.
          weight: whether the weight's gradient is wanted.
          bias: whether the bias' gradient is wanted.
          shards: the number of shards of the batch.
        """
        return cls(
            jnp.zeros((shards, *head.blocked()), jnp.float32) if weight else None,
            jnp.zeros((shards, head.vocab_size), jnp.float32) if bias else None,
        )

    def add(
        self, head: Head, hidden: Float[Array, "B t D"], slope: Float[Array, "B t V"]
    ) -> "HeadGradient":
        """Returns the gradient with a chunk's added, given the loss's gradient at the logits."""
        bias, weight = self.bias, self.weight
        if bias is not None:
            by_shard = slope.astype(jnp.float32).reshape(bias.shape[0], -1, bias.shape[1])
            bias += by_shard.sum(axis=1)
        if weight is not None:
            weight = _add_products(head, weight, hidden, slope)
        return HeadGradient(weight, bias)

    def total(self, head: Head, vocab_size: int) -> Head:
        """Returns the sum over shards as a tree like the head, without words that were added."""
        weight, bias, words = self.weight, self.bias, slice(vocab_size)
        if weight is not None:
            weight = weight.sum(0).reshape(head.weight.shape)
            weight = weight[words] if head.tied else weight[:, words]
        return head.replace(weight=weight, bias=None if bias is None else bias.sum(0)[words])


def _add_products(head: Head, total: Array, hidden: Array, slope: Array) -> Array:
    shards, *blocked = total.shape
    # The values that the forward pass has multiplied.
    hidden = hidden.astype(head.product_dtype(hidden)).astype(slope.dtype)
    rows, columns = (slope, hidden) if head.tied else (hidden, slope)
    tokens = (shards, hidden.shape[0] // shards, hidden.shape[1])
    if blocked[1] == 1:
        rows, columns = (x.reshape(*tokens, -1) for x in (rows, columns))
        return total + _einsum("gbtr,gbtc->grc", rows, columns).reshape(total.shape)
    rows = jnp.moveaxis(rows.reshape(*tokens, *blocked[:3]), 4, 0)
    columns = columns.reshape(*tokens, -1)

    def add_block(total, numbered):
        index, block = numbered
        product = _einsum("gbtsr,gbtc->gsrc", block, columns)
        so_far = jax.lax.dynamic_index_in_dim(total, index, 2, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, so_far + product, index, 2), None

    total, _ = scan(add_block, total, (jnp.arange(blocked[1]), rows))
    return total


def _einsum(subscripts: str, left: Array, right: Array) -> Array:
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def scan(step: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """Calls ``jax.lax.scan``, without a loop in the program if there is one step only."""
    length = jax.tree.leaves(xs)[0].shape[0]
    return jax.lax.scan(step, carry, xs, unroll=length == 1)
