"""What two training runs must have in common before their losses may be compared."""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Everything but the model that decides what a loss is.

    Attributes:
      data_hash: SHA-256 of the batches trained on, in their order, as
        :class:`~sparseffn_jax.train.loop.TrainResult` has it.
      evaluation_hash: what :func:`token_hash` returns for the windows evaluated on.
      batch_size: number of windows in a step.
      steps: number of optimizer updates.
      precision: name of the computation's dtype.
    """

    data_hash: str
    evaluation_hash: str
    batch_size: int
    steps: int
    precision: str


def token_hash(tokens: Int[np.ndarray, "..."]) -> str:
    """Returns the SHA-256 of token ids and their arrangement in windows, in hexadecimal."""
    digest = hashlib.sha256(repr(tokens.shape).encode())
    digest.update(np.ascontiguousarray(tokens, np.int32).tobytes())
    return digest.hexdigest()


def check_comparable(name: str, ours: Conditions, other: str, theirs: Conditions) -> None:
    """Refuses a comparison of two runs that did not train and evaluate under the same conditions.

    Args:
      name: name of the first run, for the message.
      ours: conditions of the first run.
      other: name of the second run.
      theirs: conditions of the second run.

    Raises:
      ValueError: if they differ; the message names everything that does.
    """
    mine, yours = dataclasses.asdict(ours), dataclasses.asdict(theirs)
    differences = [
        f"{field} ({mine[field]} against {yours[field]})"
        for field in mine
        if mine[field] != yours[field]
    ]
    if differences:
        raise ValueError(
            f"{name} and {other} cannot be compared, they differ in {', '.join(differences)}: "
            "run both again under the same conditions"
        )
