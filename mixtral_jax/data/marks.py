"""Marks: what a row, a message or its tokens say of whether they are to be learnt, in the words of
many tools.

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
# Fields that hold a mark for each token.
TOKEN_MARKS = (
    *("mask", "masks", "loss_mask", "completion_mask", "assistant_mask", "assistant_masks"),
    *("weights", "loss_weights", "token_weights"),
)
# How CSV spells the values of a mark.
_WORDS = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}


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
    """The first mark by which a document must not be learnt whole; None if there is none.

    That is a switch that is off, a weight other than 1, or a list. A number that is called `loss`
    is taken for a measurement, unless it is 0 or 1.
    """
    for name, said in read_marks(fields).items():
        is_partial = name in _WEIGHTS or isinstance(fields[name], list)
        if said is False or (said is None and is_partial):
            return name
    for name in TOKEN_MARKS:
        if any_not_learnt(fields.get(name)):
            return name
    return None


def any_not_learnt(mask: Any) -> bool:
    """Whether the marks of tokens, a list or one number for all, hold another number than 1."""
    values = [mask] if isinstance(mask, int | float) else mask
    return isinstance(values, list) and any(said != 1 for said in values)


def _read_mark(value: Any, meaning: bool) -> bool | None:
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower())
    # A boolean is also a number in Python.
    if not isinstance(value, int | float) or value not in (0, 1):
        return None
    return bool(value) == meaning
