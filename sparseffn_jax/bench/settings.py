"""What the settings of all benches share: how they are checked, and how a report records them."""

import dataclasses
from pathlib import Path
from typing import Any

from sparseffn_jax.measure import records


def check_counts(settings: Any, *names: str, least: int = 1) -> None:
    """Refuses settings in which a count is too small.

    Args:
      settings: any object with the named attributes.
      *names: names of the counts.
      least: the smallest value that each of them may have.

    Raises:
      ValueError: if one is smaller; the message names it and its value.
    """
    for name in names:
        if getattr(settings, name) < least:
            expected = "must not be negative" if least == 0 else f"must be at least {least}"
            raise ValueError(f"{name}={getattr(settings, name)} {expected}")


def begin_report(settings: Any) -> dict[str, Any]:
    """Returns what every report begins with: the settings and the versions of the libraries.

    Args:
      settings: a dataclass whose fields JSON can hold, apart from paths, which become strings.
    """
    values = dataclasses.asdict(settings)
    return {
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in values.items()
        },
        "versions": records.versions(),
    }
