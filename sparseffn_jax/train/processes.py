"""What the processes of one run tell each other, where each has some of the devices.

They start with the same settings and see the same losses, so that they decide alike. What only one
of them can know (a signal, its part of a batch, the state of a disk) is exchanged here.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Int


def is_first() -> bool:
    """Says whether this process is the one that writes the files and talks to the terminal."""
    return jax.process_index() == 0


def agree_on_largest(value: int) -> int:
    """Returns the largest of all processes' values."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def from_first(value: int) -> int:
    """Returns the first process's value."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(name: str) -> None:
    """Returns once every process is here; ``name`` says where that is."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def leaving_together(name: str) -> Iterator[None]:
    """Leaves the block, also by an error, once every process is at its end.

    It is for what the first process does alone: JAX ends all of them if some are at the end of
    their program and others do not follow within minutes.
    """
    try:
        yield
    finally:
        wait_for_all(name)


def chain_batch(
    data_hash: str,
    rows: Int[np.ndarray, " b"],
    windows: Int[np.ndarray, "n w"],
    counted: Bool[np.ndarray, "n t"] | None = None,
) -> str:
    """Returns the SHA-256 of ``data_hash`` and of the SHA-256 of every window in a batch.

    Each process reads its own share of the windows, and all get what one alone would get.

    Args:
      data_hash: the hash chained over the batches before, in hexadecimal.
      rows: the numbers of the windows in the batch.
      windows: the token ids of all windows.
      counted: which targets of all windows count, where not all do.

    Returns:
      The hash chained over all batches up to this one, in hexadecimal.
    """
    count, here = jax.process_count(), jax.process_index()
    share = -(-len(rows) // count)
    arrays = [windows] if counted is None else [windows, counted]
    digests = [
        hashlib.sha256(b"".join(array[row].tobytes() for array in arrays)).digest()
        for row in rows[here * share : (here + 1) * share]
    ]
    joined = b"".join(digests)
    if count > 1:
        own = np.frombuffer(joined.ljust(32 * share, b"\0"), np.uint8)
        joined = multihost_utils.process_allgather(own).tobytes()[: 32 * len(rows)]
    return hashlib.sha256(bytes.fromhex(data_hash) + joined).hexdigest()


def to_every_process(tree: Any) -> Any:
    """Returns whole NumPy arrays on every process, of arrays that may be spread over them."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
