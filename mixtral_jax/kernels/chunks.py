"""Processes rows that are sorted by expert in chunks, and stops after the last chunk with rows.

A buffer with room for the worst routing is mostly empty: with Mixtral, three rows out of four.
Grouped kernels skip missing rows, but the arrays between two matmuls are as long as the buffer, and
XLA:TPU computes the gradient of a weight from the whole buffer. In chunks, memory is that of one
chunk, and work is that of the chunks with rows.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.groups import RowGroups

# With more chunks, less of the last chunk is empty, but the weights are read more often.
_CHUNKS_OF_BALANCED_ROUTING = 4
# The names of these loops contain this and then the number of rows per chunk.
_SCOPE = "rows_in_chunks_of_"

# (weights, arrays of rows [C, ...], their groups) -> results [C, Y]
Apply = Callable[[Any, Any, RowGroups], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_in_chunks(apply: Apply, weights: Any, rows: Any, groups: RowGroups) -> jax.Array:
    """Applies `apply` to `rows`, arrays of [R, ...], in chunks.

    Returns [R, Y], zero in chunks without rows.

    `apply` must compute each row independently. The backward pass keeps only the inputs, computes
    the rest again chunk by chunk, and sums the gradients of weights in float32. Gradients of rows
    that belong to no expert may be anything.
    """
    chunks = _Chunks.of(rows, groups)
    rows = chunks.pad(rows)

    def apply_to_chunk(i: jax.typing.ArrayLike) -> jax.Array:
        return apply(weights, chunks.read(rows, i), chunks.groups(i))

    y_CY = jax.eval_shape(apply_to_chunk, 0)
    x_PX = jax.tree.leaves(rows)[0]
    zeros_PY = jnp.zeros_like(x_PX, shape=(len(x_PX), y_CY.shape[1]), dtype=y_CY.dtype)
    y_PY = chunks.fold(lambda i, y_PY: chunks.write(y_PY, i, apply_to_chunk(i)), zeros_PY)
    return y_PY[: chunks.num_rows]


def _forward(apply: Apply, weights: Any, rows: Any, groups: RowGroups) -> tuple[jax.Array, Any]:
    return apply_in_chunks(apply, weights, rows, groups), (weights, rows, groups)


def _backward(apply: Apply, residuals: Any, dy_RY: jax.Array) -> tuple[Any, Any, None]:
    weights, rows, groups = residuals
    chunks = _Chunks.of(rows, groups)
    rows, dy_PY = chunks.pad((rows, dy_RY))

    def add_chunk(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        dweights, rows = carry
        own_groups = chunks.groups(i)
        _, pull_back = jax.vjp(
            lambda weights, rows: apply(weights, rows, own_groups), weights, chunks.read(rows, i)
        )
        own_dweights, own_drows = pull_back(chunks.read(dy_PY, i))
        return jax.tree.map(jnp.add, dweights, own_dweights), chunks.write(rows, i, own_drows)

    zeros = jax.tree.map(lambda weight: jnp.zeros_like(weight, dtype=jnp.float32), weights)
    # The gradient of a chunk overwrites the chunk, which saves a buffer.
    dweights, drows = chunks.fold(add_chunk, (zeros, rows))
    dweights = jax.tree.map(lambda dweight, weight: dweight.astype(weight.dtype), dweights, weights)
    return dweights, jax.tree.map(lambda dx_PX: dx_PX[: chunks.num_rows], drows), None


apply_in_chunks.defvjp(_forward, _backward)


def count_balanced_chunks(loop_name: str, balanced_rows: int) -> int | None:
    """How often a loop of `apply_in_chunks` runs if the routing is balanced.

    Returns None if `loop_name` is not the name of such a loop.
    """
    found = re.search(rf"{_SCOPE}(\d+)", loop_name)
    return -(-balanced_rows // int(found.group(1))) if found else None


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """`num_rows` rows in chunks of `size`; the last chunk is padded with zeros."""

    size: int
    num_rows: int
    rows_per_expert_NE: jax.Array  # in each chunk

    @classmethod
    def of(cls, rows: Any, groups: RowGroups) -> "_Chunks":
        num_rows = len(jax.tree.leaves(rows)[0])
        size = min(num_rows, -(-groups.balanced_rows // _CHUNKS_OF_BALANCED_ROUTING))
        start_N1 = jnp.arange(0, num_rows, size)[:, None]
        ends_NE = jnp.clip(jnp.cumsum(groups.rows_per_expert_E)[None] - start_N1, 0, size)
        return cls(size, num_rows, jnp.diff(ends_NE, axis=1, prepend=0))

    def groups(self, i: jax.typing.ArrayLike) -> RowGroups:
        """The groups of the rows of one chunk."""
        rows_per_expert_E = jax.lax.dynamic_index_in_dim(self.rows_per_expert_NE, i, keepdims=False)
        return RowGroups(rows_per_expert_E, self.size)

    def pad(self, rows: Any) -> Any:
        missing = -self.num_rows % self.size
        return jax.tree.map(lambda x_RX: jnp.pad(x_RX, ((0, missing), (0, 0))), rows)

    def read(self, rows: Any, i: jax.typing.ArrayLike) -> Any:
        return jax.tree.map(
            lambda x_PX: jax.lax.dynamic_slice_in_dim(x_PX, i * self.size, self.size), rows
        )

    def write(self, rows: Any, i: jax.typing.ArrayLike, chunk: Any) -> Any:
        def put(x_PX: jax.Array, chunk_CX: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x_PX, chunk_CX, i * self.size, axis=0)

        return jax.tree.map(put, rows, chunk)

    def fold(self, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
        """Folds `body(i, carry)` over the chunks that have rows."""
        num_chunks = (jnp.sum(self.rows_per_expert_NE) + self.size - 1) // self.size
        with jax.named_scope(f"{_SCOPE}{self.size}"):
            return jax.lax.fori_loop(0, num_chunks, body, carry)
