"""The error that all reading and writing of checkpoints raises, and what its messages share."""

from collections.abc import Collection

_LONGEST = 300


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message says why, and how to mend it.

    Example:
      >>> import sparseffn_jax as sf
      >>> try:
      ...     sf.load_pretrained(("no config", {}))
      ... except sf.CheckpointError as error:
      ...     print(type(error).__mro__[1].__name__)
      ValueError
    """


def is_failure(error: BaseException) -> bool:
    """Says whether a library has failed, and not the process been told to end.

    A panic of a library that is written in Rust is no ``Exception``, and its class is in no module.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def one_line(error: BaseException) -> str:
    """Returns another library's message on one line, cut where a damaged file makes it endless."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def some(names: Collection[str]) -> str:
    """Returns the first three names in order, and how many more there are."""
    first = ", ".join(sorted(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
