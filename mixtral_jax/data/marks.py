"""Marks: what a row, a message or its tokens say of whether they are to be learnt, in the words of
many tools, however these are spelled.

`documents` and `chat` decide what follows from a mark.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from mixtral_jax.data.field_names import fold_name, is_filled

_WEIGHTS = (
    *("weight", "loss_weight", "loss_scale", "loss_multiplier"),
    *("sample_weight", "example_weight"),
)
_LEARNT = "loss train training trained trainable learn learned learnable supervised"
_ASSENTS = "is should to use use_in use_for used_for has with compute calculate include_in"
_NEGATIONS = "no not do_not dont never skip ignore exclude exclude_from without"
_SWITCHES = (
    *_LEARNT.split(),
    *("train_on", "train_on_turn"),
    *map("_".join, itertools.product(_ASSENTS.split(), _LEARNT.split())),
)
_REVERSED = (
    *("masked", "is_masked", "mask_loss", "no_grad"),
    *("ignore", "ignored", "skip", "skipped", "exclude", "excluded"),
    *map("_".join, itertools.product(_NEGATIONS.split(), _LEARNT.split())),
)
# Name -> whether it says "learn this" where it is true or 1.
MARKS: dict[str, bool] = {
    **dict.fromkeys((*_WEIGHTS, *_SWITCHES), True),
    **dict.fromkeys(_REVERSED, False),
}
_MASKED = (
    *("loss", "train", "training", "completion", "assistant"),
    *("response", "answer", "output", "label"),
)
# Fields that hold a mark for each token.
TOKEN_MARKS = (
    *("mask", "masks"),
    *map("_".join, itertools.product(_MASKED, ("mask", "masks"))),
    *("weights", "loss_weights", "token_weights"),
)
# Fields that hold what is known of a row or a message, and so perhaps a mark.
METADATA = ("metadata", "meta")
# How CSV spells the values of a mark.
_WORDS = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}

_FOLDED_MARKS = {fold_name(name): meaning for name, meaning in MARKS.items()}
_FOLDED_WEIGHTS = set(map(fold_name, _WEIGHTS))
_FOLDED_TOKEN_MARKS = set(map(fold_name, TOKEN_MARKS))


def read_marks(fields: Mapping[Any, Any]) -> dict[str, bool | None]:
    """What each mark among the fields says: to learn, not to learn, or (None) neither.

    A mark that is null or empty counts as missing.
    """
    return {
        name: _read_mark(value, _FOLDED_MARKS[fold_name(name)])
        for name, value in fields.items()
        if fold_name(name) in _FOLDED_MARKS and is_filled(value)
    }


def read_token_marks(fields: Mapping[Any, Any]) -> dict[str, bool]:
    """Whether each field that holds marks of tokens says that all of them are to be learnt."""
    return {
        name: not any_not_learnt(value)
        for name, value in fields.items()
        if fold_name(name) in _FOLDED_TOKEN_MARKS and isinstance(value, int | float | list)
    }


def forbids_learning(fields: Mapping[Any, Any]) -> str | None:
    """The first mark by which a document must not be learnt whole, with its value; None if there is
    none.

    That is a switch that is off, a weight other than 1, or a list. A number that is called `loss`
    is taken for a measurement, unless it is 0 or 1.
    """
    for name, said in read_marks(fields).items():
        is_partial = fold_name(name) in _FOLDED_WEIGHTS or isinstance(fields[name], list)
        if said is False or (said is None and is_partial):
            return show_mark(name, fields[name])
    for name, learns_all in read_token_marks(fields).items():
        if not learns_all:
            return show_mark(name, fields[name])
    return find_hidden_mark(fields)


def find_hidden_mark(fields: Mapping[Any, Any]) -> str | None:
    """The first mark inside the metadata that says "do not learn", with its value.

    Other values there may be about something else, such as the weight of a product.
    """
    for name in fields:
        if fold_name(name) in METADATA and isinstance(fields[name], Mapping):
            for inner, said in read_marks(fields[name]).items():
                if said is False:
                    return show_mark(f"{name}.{inner}", fields[name][inner])
    return None


def show_mark(name: str, value: object) -> str:
    """A mark with its value, for a message."""
    return f"{name}={value!r:.40}"


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
