"""What two training runs must have in common before their losses may be compared."""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Conditions:
    """How a loss was come by, apart from the model.

    Attributes:
      data_hash: of the batches trained on, in order; see :class:`TrainResult`.
      evaluation_hash: of the windows evaluated on; see :func:`token_hash`.
      batch_size: windows a step.
      steps: optimizer updates.
      precision: dtype of the computation.
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
      name: of the first run, for the message.
      ours: its conditions.
      other: name of the second run.
      theirs: its conditions.

    Raises:
      ValueError: naming everything that differs.
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
