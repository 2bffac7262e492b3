"""Lists how many parameters of each part of a model are trained, for people to check."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from flax.nnx.filterlib import Filter

# Names at the end of a variable's path that do not identify a part of the model.
_ENDINGS = ("weight", "scale", "base", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model, such as `moe.experts.gate`, and the number of its parameters.

    A part of a block counts all layers.
    """

    name: str
    trained: int
    frozen: int


def list_parts(model: nnx.Module, trainable: Filter) -> list[Part]:
    """The parts of a model, or of its shapes: the embedding first, then the rest sorted by name."""
    trained, everything = _count(model, trainable), _count(model, nnx.Param)
    in_order = sorted(everything, key=lambda name: (not name.startswith("embedding"), name))
    return [
        Part(name, trained.get(name, 0), everything[name] - trained.get(name, 0))
        for name in in_order
    ]


def describe_trained(model: nnx.Module, trainable: Filter) -> str:
    """A table with one line per part and a line for the total."""
    parts = list_parts(model, trainable)
    total = Part("in all", sum(part.trained for part in parts), sum(part.frozen for part in parts))
    rows = [("part", "trained", "frozen")]
    rows += [
        (part.name, f"{part.trained:,}" if part.trained else "-", f"{part.frozen:,}")
        for part in (*parts, total)
    ]
    width, *numbers = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "  ".join((row[0].ljust(width), row[1].rjust(numbers[0]), row[2].rjust(numbers[1])))
        for row in rows
    ]
    return "\n".join([*lines, f"{total.trained / (total.trained + total.frozen):.2%} is trained"])


def _count(model: nnx.Module, kind: Filter) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path, leaf in jax.tree.flatten_with_path(nnx.state(model, kind))[0]:
        name = _part_of(path)
        counts[name] = counts.get(name, 0) + leaf.size
    return counts


def _part_of(path: tuple[Any, ...]) -> str:
    # The last key of a path is the array in its variable.
    names = jax.tree_util.keystr(path[:-1], simple=True, separator="/").split("/")
    while len(names) > 1 and names[-1] in _ENDINGS:
        names.pop()
    return ".".join(names).removeprefix("blocks.")
