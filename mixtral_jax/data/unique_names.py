"""Objects and tables in which every field has a name of its own.

Of two fields with one name, only the last would be read.
"""

import json
from collections.abc import Sequence
from typing import Any


def require_unique(names: Sequence[str]) -> None:
    """Raises ValueError if two fields have one name."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two fields are called {twice!r}")


def _make_object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(fields)
    if len(made) < len(fields):
        require_unique([name for name, _ in fields])
    return made


# Does what `json.loads` does, which would make a decoder for every text.
parse_json = json.JSONDecoder(object_pairs_hook=_make_object).decode
