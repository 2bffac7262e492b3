"""Dataclasses of arrays as JSON, and back: a routing analysis that is kept in a file."""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

import numpy as np

Built = TypeVar("Built")


def to_json(value: Any) -> Any:
    """As what JSON can hold: names without their dimensions, null for NaN."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {_without_dimensions(name): to_json(inner) for name, inner in fields.items()}
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def from_json(kind: type[Built], said: Any) -> Built:
    """The dataclass `kind` that `to_json` made `said` of; its fields are such, arrays, tuples, or
    plain.
    """
    return _read(kind, said)


def _read(kind: Any, said: Any) -> Any:
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if said is None else _read(options[0], said)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {
            field.name: _read(hints[field.name], said[_without_dimensions(field.name)])
            for field in dataclasses.fields(kind)
        }
        return typing.cast(Any, kind)(**fields)
    if typing.get_origin(kind) is tuple:
        return tuple(_read(options[0], inner) for inner in said)
    if kind is np.ndarray:
        array = np.array(said)
        return array.astype(float) if array.dtype == object else array
    return math.nan if said is None else said


def _without_dimensions(name: str) -> str:
    stem, _, last = name.rpartition("_")
    return stem if last.isupper() else name
