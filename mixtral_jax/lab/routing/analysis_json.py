"""Turns dataclasses of arrays into JSON values and back, so that an analysis is kept in a file."""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

import numpy as np

Built = TypeVar("Built")


def to_json(value: Any) -> Any:
    """Returns a dataclass, array or plain value as JSON values.

    Names lose their dimensions (`load_LE` becomes `load`), and NaN becomes null.
    """
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {_without_dimensions(name): to_json(inner) for name, inner in fields.items()}
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def from_json(kind: type[Built], value: Any) -> Built:
    """Builds the dataclass `kind` from what `to_json` returned for one.

    Its fields may be dataclasses, arrays, tuples, optional, or plain values.
    """
    return _read(kind, value)


def _read(kind: Any, value: Any) -> Any:
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if value is None else _read(options[0], value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {
            field.name: _read(hints[field.name], value[_without_dimensions(field.name)])
            for field in dataclasses.fields(kind)
        }
        return typing.cast(Any, kind)(**fields)
    if typing.get_origin(kind) is tuple:
        return tuple(_read(options[0], inner) for inner in value)
    if kind is np.ndarray:
        array = np.array(value)
        return array.astype(float) if array.dtype == object else array
    return math.nan if value is None else value


def _without_dimensions(name: str) -> str:
    stem, _, last = name.rpartition("_")
    return stem if last.isupper() else name
