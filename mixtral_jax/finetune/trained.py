"""What of a model is trained, part by part, for people to check before a run."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from flax.nnx.filterlib import Filter

# Last names on the path of a variable, which do not tell one part of a model from another.
_ENDINGS = ("weight", "scale", "base", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model, of every layer where it is in blocks, as in `moe.experts.gate`; and its
    parameters.
    """

    name: str
    trained: int
    frozen: int


def list_parts(model: nnx.Module, trainable: Filter) -> list[Part]:
    """The parts of a model, or of the shapes of one: the embedding, then all in the order of their
    names.
    """
    trained, everything = _count(model, trainable), _count(model, nnx.Param)
    in_order = sorted(everything, key=lambda name: (not name.startswith("embedding"), name))
    return [
        Part(name, trained.get(name, 0), everything[name] - trained.get(name, 0))
        for name in in_order
    ]


def describe_trained(model: nnx.Module, trainable: Filter) -> str:
    """A table for people: a line for each part, and their sum."""
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
    names = jax.tree_util.keystr(path[:-1], simple=True, separator="/").split(
        "/"
    )  # Last is the array in the variable.
    while len(names) > 1 and names[-1] in _ENDINGS:
        names.pop()
    return ".".join(names).removeprefix("blocks.")
