"""Marks: what a row or a message says of whether it is to be learnt, in the words of many tools.

`documents` and `chat` decide what follows from a mark.
"""

from collections.abc import Mapping
from typing import Any

from mixtral_jax.data.readers import is_filled

_WEIGHTS = ("weight", "loss_weight", "loss_scale", "sample_weight", "example_weight")
_SWITCHES = ("loss", "compute_loss", "learn", "train", "training", "trainable", "train_on_turn")
_REVERSED = ("masked", "is_masked", "no_loss", "ignore_loss")
# Spelling -> whether it says "learn this" where it is true or 1.
MARKS: dict[str, bool] = {
    **dict.fromkeys((*_WEIGHTS, *_SWITCHES), True),
    **dict.fromkeys(_REVERSED, False),
}


def read_marks(fields: Mapping[Any, Any]) -> dict[str, bool | None]:
    """What each mark among the fields says: to learn, not to learn, or (None) neither.

    A mark that is null or empty counts as missing.
    """
    return {
        name: _read_mark(fields[name], meaning)
        for name, meaning in MARKS.items()
        if name in fields and is_filled(fields[name])
    }


def forbids_learning(fields: Mapping[Any, Any]) -> str | None:
    """The first mark by which a document must not be learnt whole: a switch that is off, or a
    weight other than 1; None if there is none.

    A number that is called `loss` is taken for a measurement, unless it is 0 or 1.
    """
    for name, said in read_marks(fields).items():
        if said is False or (said is None and name in _WEIGHTS):
            return name
    return None


def _read_mark(value: Any, meaning: bool) -> bool | None:
    # A boolean is also a number in Python.
    if not isinstance(value, int | float) or value not in (0, 1):
        return None
    return bool(value) == meaning
