"""Processes rows that are sorted by expert in chunks, and stops after the last chunk with rows.

A buffer with room for the worst routing is mostly empty: with Mixtral, three rows out of four.
Grouped kernels skip missing rows, but the arrays between two matmuls are as long as the buffer, and
XLA:TPU computes the gradient of a weight from the whole buffer. In chunks, memory is that of one
chunk, and work is that of the chunks with rows.

For the gradient of the weights, XLA multiplies each row by every expert that it is given. So the
backward pass may take one expert after the other, each with chunks of its own.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.groups import RowGroups

# With more chunks, less of the last chunk is empty. But each chunk reads the weights and adds to
# their gradients in memory, and with fewer rows a TPU would wait for its memory.
_CHUNKS_OF_BALANCED_ROUTING = 4
_FEWEST_ROWS_IN_CHUNK = 1024
# The names of these loops contain this and then how often they run if the routing is balanced.
_SCOPE = "chunks_if_balanced_"

# (weights, arrays of rows [C, ...], their groups) -> results [C, Y]
Apply = Callable[[Any, Any, RowGroups], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def apply_in_chunks(
    apply: Apply, is_by_expert: bool, weights: Any, rows: Any, groups: RowGroups
) -> jax.Array:
    """Applies `apply` to `rows`, arrays of [R, ...], in chunks.

    Returns [R, Y], zero in chunks without rows. A buffer that balanced routing fills is one chunk.

    `apply` must compute each row independently. The backward pass keeps only the inputs, computes
    the rest again chunk by chunk, and sums the gradients of weights in float32. Gradients of rows
    that belong to no expert may be anything.

    Args:
        is_by_expert: the backward pass gives `apply` the weights and rows of one expert at a time.
        weights: a pytree of arrays [E, ...].
    """
    R = len(jax.tree.leaves(rows)[0])
    is_full = groups.balanced_rows >= R
    if is_full:
        return apply(weights, rows, groups)
    chunks = _Chunks.of(groups, R)
    y_CY = jax.eval_shape(lambda: apply(weights, chunks[0].read(rows), chunks[0].groups))
    zeros_RY = jnp.zeros_like(jax.tree.leaves(rows)[0], shape=(R, y_CY.shape[1]), dtype=y_CY.dtype)
    return chunks.fold(
        lambda chunk, y_RY: chunk.write(y_RY, apply(weights, chunk.read(rows), chunk.groups)),
        zeros_RY,
    )


def _forward(
    apply: Apply, is_by_expert: bool, weights: Any, rows: Any, groups: RowGroups
) -> tuple[Any, Any]:
    y_RY = apply_in_chunks(apply, is_by_expert, weights, rows, groups)
    return y_RY, (weights, rows, groups)


def _backward(
    apply: Apply, is_by_expert: bool, residuals: Any, dy_RY: jax.Array
) -> tuple[Any, Any, None]:
    weights, rows, groups = residuals
    E = len(groups.rows_per_expert_E)
    num_packs = E if is_by_expert else 1

    def pack(x_EX: jax.Array) -> jax.Array:
        return x_EX.reshape(num_packs, E // num_packs, *x_EX.shape[1:])

    def add_pack(rows: Any, own: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, Any]:
        """Sums the gradients of a pack of experts, and overwrites its rows with theirs."""
        weights, rows_per_expert_E, begin = own
        groups_of_pack = RowGroups(rows_per_expert_E, -(-groups.balanced_rows // num_packs))

        def add_chunk(chunk: _Chunk, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            dweights, rows = carry
            own_rows, own_dy_CY = chunk.mask(chunk.read((rows, dy_RY)))
            _, pull_back = jax.vjp(
                lambda weights, rows: apply(weights, rows, chunk.groups), weights, own_rows
            )
            own_dweights, own_drows = pull_back(own_dy_CY)
            return jax.tree.map(jnp.add, dweights, own_dweights), chunk.write(rows, own_drows)

        zeros = jax.tree.map(lambda weight: jnp.zeros_like(weight, dtype=jnp.float32), weights)
        chunks = _Chunks.of(groups_of_pack, len(dy_RY), begin)
        dweights, rows = chunks.fold(add_chunk, (zeros, rows))
        return rows, jax.tree.map(
            lambda dweight, weight: dweight.astype(weight.dtype), dweights, weights
        )

    rows_per_expert = pack(groups.rows_per_expert_E)
    rows_per_pack = jnp.sum(rows_per_expert, axis=1)
    begins = jnp.cumsum(rows_per_pack) - rows_per_pack
    packs = (jax.tree.map(pack, weights), rows_per_expert, begins)
    # The gradient of a chunk overwrites the chunk, which saves a buffer.
    drows, dweights = jax.lax.scan(add_pack, rows, packs)
    dweights = jax.tree.map(lambda dweight: dweight.reshape(E, *dweight.shape[2:]), dweights)
    return dweights, drows, None


apply_in_chunks.defvjp(_forward, _backward)


def count_balanced_chunks(loop_name: str) -> int | None:
    """How often a loop of `apply_in_chunks` runs if the routing is balanced.

    Returns None if `loop_name` is not the name of such a loop.
    """
    # The innermost loop is the last in the name.
    found = re.findall(rf"{_SCOPE}(\d+)", loop_name)
    return int(found[-1]) if found else None


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """C rows from `start` on. Those before `begin`, and after its groups, belong to others."""

    start: jax.Array
    begin: jax.Array | int
    groups: RowGroups
    size: int

    def read(self, rows: Any) -> Any:
        return jax.tree.map(
            lambda x_RX: jax.lax.dynamic_slice_in_dim(x_RX, self.start, self.size), rows
        )

    def mask(self, chunk: Any) -> Any:
        """Sets the rows of others to zero."""
        return jax.tree.map(lambda x_CX: jnp.where(self._is_own_C1, x_CX, 0), chunk)

    def write(self, rows: Any, chunk: Any) -> Any:
        """Overwrites the chunk's own rows."""

        def put(x_RX: jax.Array, new_CX: jax.Array) -> jax.Array:
            own_CX = jnp.where(self._is_own_C1, new_CX, self.read(x_RX))
            return jax.lax.dynamic_update_slice_in_dim(x_RX, own_CX, self.start, axis=0)

        return jax.tree.map(put, rows, chunk)

    @property
    def _is_own_C1(self) -> jax.Array:
        row_C1 = self.start + jnp.arange(self.size)[:, None]
        end = self.start + jnp.sum(self.groups.rows_per_expert_E)
        return (row_C1 >= self.begin) & (row_C1 < end)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """The rows of `groups`, which start at row `begin` of `num_rows`, in at most N chunks."""

    size: int
    num_rows: int
    groups: RowGroups
    begin: jax.Array | int
    # Computed outside of the loop over chunks: libtpu refuses a grouped kernel for v6e whose number
    # of rows is a scalar that the loop computes.
    rows_per_expert_NE: jax.Array

    @classmethod
    def of(cls, groups: RowGroups, num_rows: int, begin: jax.Array | int = 0) -> "_Chunks":
        quarter = -(-groups.balanced_rows // _CHUNKS_OF_BALANCED_ROUTING)
        fewest = min(_FEWEST_ROWS_IN_CHUNK, max(groups.balanced_rows, 1))
        size = min(num_rows, max(quarter, fewest))
        begin_N1 = begin + jnp.arange(0, num_rows, size)[:, None]
        start_N1 = jnp.minimum(begin_N1, num_rows - size)
        ends_E = begin + jnp.cumsum(groups.rows_per_expert_E)
        ends_NE = jnp.clip(ends_E[None] - start_N1, 0, begin_N1 - start_N1 + size)
        return cls(size, num_rows, groups, begin, jnp.diff(ends_NE, axis=1, prepend=0))

    def __getitem__(self, i: jax.Array | int) -> _Chunk:
        begin = self.begin + i * self.size
        # The last chunk may reach past the last row. Then it starts earlier.
        start = jnp.minimum(begin, self.num_rows - self.size)
        rows_per_expert_E = jax.lax.dynamic_index_in_dim(self.rows_per_expert_NE, i, keepdims=False)
        return _Chunk(start, begin, RowGroups(rows_per_expert_E, self.size), self.size)

    def fold(self, body: Callable[[_Chunk, Any], Any], carry: Any) -> Any:
        """Folds `body(chunk, carry)` over the chunks that have rows."""
        num_rows = jnp.sum(self.groups.rows_per_expert_E)
        num_balanced = -(-self.groups.balanced_rows // self.size)
        with jax.named_scope(f"{_SCOPE}{num_balanced}"):
            return jax.lax.fori_loop(
                0,
                (num_rows + self.size - 1) // self.size,
                lambda i, carry: body(self[i], carry),
                carry,
            )
