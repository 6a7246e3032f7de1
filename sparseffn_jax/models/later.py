"""Finds config classes that came to transformers after the oldest version that this library takes.

A family whose class is missing is left out of the registry; all others work.
"""

from typing import Any

import transformers


class MissingConfigError(ImportError):
    """The installed transformers is too old for a model family."""


def config_class(name: str, since: str) -> Any:
    """Returns a config class of transformers.

    Args:
      name: the name of the class.
      since: the first version of transformers that has it.

    Raises:
      MissingConfigError: if the installed version does not have it.
    """
    if (found := getattr(transformers, name, None)) is None:
        raise MissingConfigError(
            f"the installed transformers {transformers.__version__} has no {name}: "
            f"pip install --upgrade 'transformers>={since}'"
        )
    return found
