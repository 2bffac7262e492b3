"""Which dimensions of a parameter are those of a matrix, for optimizers that treat it as one.

An array of the model holds many matrices: one per layer, and one per expert. Some have more than
two dimensions, such as the heads of a query. Leaves to `adafactor` and `muon` what they do with it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How the dimensions of a parameter divide, in their order: a stack, inputs, outputs.

    Attributes:
        num_stacked: dimensions that count matrices: none, layers, or layers and experts.
        num_inputs: dimensions that a projection sums over.
        num_outputs: dimensions of its result. A vector, the scale of a norm, has none.
    """

    num_stacked: int
    num_inputs: int
    num_outputs: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """The dimensions of the inputs."""
        return tuple(range(self.num_stacked, self.num_stacked + self.num_inputs))

    @property
    def outputs(self) -> tuple[int, ...]:
        """The dimensions of the outputs."""
        first = self.num_stacked + self.num_inputs
        return tuple(range(first, first + self.num_outputs))


def names_on(path: tuple[Any, ...]) -> set[str | None]:
    """The names on the path of a parameter."""
    return {getattr(key, "key", getattr(key, "name", None)) for key in path}


def by_name(params: Any, choose: Callable[[set[str | None]], Any]) -> Any:
    """What is chosen for each parameter by the names on its path.

    Not by rank, which would not tell the scale of a norm, for one: in the stack of layers every
    array has one more.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: choose(names_on(path)), params)


def matrix_of(path: tuple[Any, ...], num_dimensions: int) -> Matrix:
    """The matrix that the parameter at `path` is, or is a stack of."""
    names = names_on(path)
    num_stacked = ("blocks" in names) + ("experts" in names)
    rest = num_dimensions - num_stacked
    if "scale" in names:
        return Matrix(num_stacked, rest, 0)
    # Only the projection out of the heads sums over two dimensions, the heads and their size.
    num_inputs = rest - 1 if "out" in names else 1
    return Matrix(num_stacked, num_inputs, rest - num_inputs)
