"""Fields of rows: which spellings are one name, which are filled, and which nothing reads."""

import functools
from collections.abc import Collection, Mapping
from typing import Any


@functools.lru_cache(maxsize=10_000)
def fold_name(name: object) -> str:
    """What all spellings of a name have in common: `lossWeight`, `LOSS-WEIGHT` and `loss_weight`
    differ only in capitals and in what lies between the words.
    """
    return "".join(letter for letter in str(name).lower() if letter not in "_- ")


def is_filled(value: object) -> bool:
    """Whether a value says anything: it is not null, and not an empty text, list or object.

    Tables have every field in every row, so an object whose values are all empty is empty too.
    """
    if isinstance(value, Mapping):
        return any(map(is_filled, value.values()))
    if isinstance(value, list | tuple):
        return any(item is not None for item in value)
    return value not in ("", "[]", "{}") if isinstance(value, str) else value is not None


def list_unread(fields: Mapping[Any, Any], read: Collection[str]) -> list[str]:
    """The names of filled fields that are not in `read`."""
    return [str(name) for name, value in fields.items() if name not in read and is_filled(value)]


def describe_unread(unread: Mapping[str, int], max_names: int | None = 20) -> str:
    """Names fields with the number of rows that fill them: `id (10,000 rows), source (9,988)`.

    Args:
        max_names: how many are named, the most frequent first; None names all.
    """
    # A name may not be UTF-8, or be empty, as that of the index that pandas writes into CSV.
    named = {
        name.encode(errors="backslashreplace").decode() or "''": count
        for name, count in unread.items()
    }
    ordered = sorted(named.items(), key=lambda item: (-item[1], item[0]))
    described = [f"{name} ({count:,})" for name, count in ordered[:max_names]]
    described[:1] = [
        f"{name} ({count:,} {'row' if count == 1 else 'rows'})" for name, count in ordered[:1]
    ]
    num_left = len(ordered) - len(described)
    return ", ".join([*described, *([f"and {num_left:,} more"] if num_left else [])])
