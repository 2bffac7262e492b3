"""Grouped matmuls without a kernel: a batched matmul for the heads of groups, loops for the tails.

The head of a group is its first rows, up to half the rows that balanced routing gives an expert.
All heads are padded to this length and go through one batched matmul. The tail of a group is cut
into blocks of falling sizes, whose number is known only at run time, so the cost is that of the
rows that exist, however skewed the routing. On a CPU the batched matmul saves copying the weights
and gradients of each expert, and the loops save padding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.groups import RowGroups

# A tail takes as many blocks of each size as it fills, and one more of the last size for the rest.
# On a CPU, a matmul of fewer rows costs as much as one of 64.
BLOCK_ROWS = (256, 128, 64)

# (rows of a group [b, X], the weights of its expert) -> results [b, Y]
Apply = Callable[[jax.Array, Any], jax.Array]


def grouped_matmul(x_RD: jax.Array, weight_EDF: jax.Array, groups: RowGroups) -> jax.Array:
    """y[r] = x[r] @ weight[expert of r], as in `kernels.grouped_matmul`."""
    return _apply_to_groups(jnp.matmul, x_RD, weight_EDF, groups)


def grouped_swiglu(
    x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, groups: RowGroups
) -> jax.Array:
    """y[r] = down(silu(gate(x[r])) * up(x[r])) with the matrices of the expert of r.

    The hidden rows are kept for the backward pass, unless most of the buffer may be empty: then
    each block of them exists for a moment only, and is computed again.
    """
    weights = (gate_EDF, up_EDF, down_EFD)
    if len(x_RD) > groups.balanced_rows:
        return _apply_to_groups(_swiglu, x_RD, weights, groups)
    return _swiglu(x_RD, weights, lambda x_RX, weight: grouped_matmul(x_RX, weight, groups))


def _swiglu(
    x: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    matmul: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul,
) -> jax.Array:
    gate, up, down = weights
    return matmul(_activate(matmul(x, gate), matmul(x, up)), down)


@jax.checkpoint  # The backward pass keeps only the results of the matmuls.
def _activate(gated: jax.Array, upped: jax.Array) -> jax.Array:
    return jax.nn.silu(gated) * upped


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply_to_groups(apply: Apply, x_RX: jax.Array, weights: Any, groups: RowGroups) -> jax.Array:
    """Applies `apply` to the rows of each group with the weights of its expert; zero elsewhere.

    Each leaf of `weights` is [E, ...].
    """
    return _forward(apply, x_RX, weights, groups)[0]


def _forward(
    apply: Apply, x_RX: jax.Array, weights: Any, groups: RowGroups
) -> tuple[jax.Array, Any]:
    heads = _Heads.of(groups, len(x_RX))
    y_ECY, pull_back = jax.vjp(jax.vmap(apply), heads.take(x_RX), weights)
    x_PX = _lengthen(x_RX)

    def add_tail(_, own_weights, tail, y_PY):
        return tail.fold(
            lambda block, y_PY: block.add(y_PY, apply(block.read(x_PX), own_weights)), y_PY
        )

    y_PY = _fold_tails(groups, heads.length, weights, add_tail, _lengthen(heads.put_back(y_ECY)))
    return y_PY[: len(x_RX)], (pull_back, heads, x_RX, weights, groups)


def _backward(apply: Apply, residuals: Any, dy_RY: jax.Array) -> tuple[jax.Array, Any, None]:
    pull_back, heads, x_RX, weights, groups = residuals
    dx_ECX, dweights = pull_back(heads.take(dy_RY))
    x_PX, dy_PY = _lengthen(x_RX), _lengthen(dy_RY)

    def add_tail(expert, own_weights, tail, carry):
        dx_PX, dweights = carry

        def add_block(block, carry):
            dx_PX, own_sum = carry
            _, pull_back = jax.vjp(apply, block.read(x_PX), own_weights)
            dx_bX, own_part = pull_back(block.mask(block.read(dy_PY)))
            return block.add(dx_PX, dx_bX), jax.tree.map(jnp.add, own_sum, own_part)

        # In bfloat16, a sum of many small parts would lose them.
        zeros = jax.tree.map(lambda weight: jnp.zeros_like(weight, dtype=jnp.float32), own_weights)
        dx_PX, own_sum = tail.fold(add_block, (dx_PX, zeros))
        return dx_PX, jax.tree.map(
            lambda whole, own: _add_at(whole, expert, own), dweights, own_sum
        )

    start = (
        _lengthen(heads.put_back(dx_ECX)),
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dweights),
    )
    dx_PX, dweights = _fold_tails(groups, heads.length, weights, add_tail, start)
    return (
        dx_PX[: len(x_RX)],
        jax.tree.map(lambda leaf, weight: leaf.astype(weight.dtype), dweights, weights),
        None,
    )


_apply_to_groups.defvjp(_forward, _backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Heads:
    """The first C rows of each group, as an index from heads to rows and one from rows to heads."""

    row_EC: jax.Array  # R if the group has fewer than C rows
    place_R: jax.Array  # E * C if the row is in no head

    @classmethod
    def of(cls, groups: RowGroups, num_rows: int) -> "_Heads":
        E = len(groups.rows_per_expert_E)
        C = -(-groups.balanced_rows // (2 * E))
        ends_E = jnp.cumsum(groups.rows_per_expert_E)
        starts_E = ends_E - groups.rows_per_expert_E
        row_EC = starts_E[:, None] + jnp.arange(C)[None]
        expert_R = jnp.searchsorted(
            ends_E, jnp.arange(num_rows), side="right", method="compare_all"
        )
        place_R = jnp.arange(num_rows) - starts_E[jnp.minimum(expert_R, E - 1)]
        is_in_R = (expert_R < E) & (place_R < C)
        return cls(
            row_EC=jnp.where(row_EC < ends_E[:, None], row_EC, num_rows),
            place_R=jnp.where(is_in_R, expert_R * C + place_R, E * C),
        )

    @property
    def length(self) -> int:
        return self.row_EC.shape[1]

    def take(self, x_RX: jax.Array) -> jax.Array:
        """The rows of the heads, [E, C, X]; zero where there is no row. Transpose of `put_back`."""
        return x_RX.at[self.row_EC].get(mode="fill", fill_value=0)

    def put_back(self, y_ECY: jax.Array) -> jax.Array:
        """Heads at their rows, [R, Y]; zero in rows that are in no head. Transpose of `take`."""
        return y_ECY.reshape(-1, y_ECY.shape[-1]).at[self.place_R].get(mode="fill", fill_value=0)


@dataclasses.dataclass(frozen=True)
class _Block:
    """`size` rows from `start` on. The rows before `end` belong to the group."""

    start: jax.Array
    end: jax.Array
    size: int

    def read(self, array_PX: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array_PX, self.start, self.size)

    def mask(self, block_bX: jax.Array) -> jax.Array:
        """Sets the rows of other groups to zero."""
        return jnp.where((self.start + jnp.arange(self.size) < self.end)[:, None], block_bX, 0)

    def add(self, array_PX: jax.Array, block_bX: jax.Array) -> jax.Array:
        """Adds the block to the rows of the group."""
        summed_bX = self.read(array_PX) + self.mask(block_bX)
        return jax.lax.dynamic_update_slice_in_dim(array_PX, summed_bX, self.start, axis=0)


@dataclasses.dataclass(frozen=True)
class _Tail:
    """The rows of a group that are after its head, from `start` to `end`."""

    start: jax.Array
    end: jax.Array

    def fold(self, body: Callable[[_Block, Any], Any], carry: Any) -> Any:
        """Folds `body(block, carry)` over the blocks of the tail."""
        start = self.start
        for size in BLOCK_ROWS:
            rounding = size - 1 if size == BLOCK_ROWS[-1] else 0
            num_blocks = (self.end - start + rounding) // size

            def step(i, carry, start=start, size=size):
                return body(_Block(start + i * size, self.end, size), carry)

            carry = jax.lax.fori_loop(0, num_blocks, step, carry)
            start += num_blocks * size
        return carry


def _fold_tails(
    groups: RowGroups,
    head_length: int,
    weights: Any,
    body: Callable[[jax.Array, Any, _Tail, Any], Any],
    carry: Any,
) -> Any:
    """Folds `body(expert, own_weights, tail, carry)` over all groups that have a tail."""
    ends_E = jnp.cumsum(groups.rows_per_expert_E)
    lengths_E = jnp.maximum(groups.rows_per_expert_E - head_length, 0)
    longest_first_E = jnp.argsort(-lengths_E)

    def step(i, carry):
        e = longest_first_E[i]
        own_weights = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, e, keepdims=False), weights
        )
        return body(e, own_weights, _Tail(ends_E[e] - lengths_E[e], ends_E[e]), carry)

    return jax.lax.fori_loop(0, jnp.sum(lengths_E > 0), step, carry)


def _add_at(whole_EXY: jax.Array, e: jax.Array, own_XY: jax.Array) -> jax.Array:
    """Adds to one expert; `.at[e].add` would be a scatter."""
    sum_XY = jax.lax.dynamic_index_in_dim(whole_EXY, e, keepdims=False) + own_XY
    return jax.lax.dynamic_update_index_in_dim(whole_EXY, sum_XY, e, axis=0)


def _lengthen(x_RX: jax.Array) -> jax.Array:
    """Adds rows of zeros, so that any block fits, and the last one may reach past the last row."""
    return jnp.concatenate([x_RX, jnp.zeros_like(x_RX, shape=(BLOCK_ROWS[0], x_RX.shape[1]))])
