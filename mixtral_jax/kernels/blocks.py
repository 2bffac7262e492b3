"""Grouped matmuls without a kernel: a batched matmul over the head of every group, loops over its
tail.

The head of a group, its first rows up to half of what a balanced routing gives, is padded and goes
through one batched matmul with the heads of the others. Its tail is cut into blocks, large ones and
then small ones for the rest, whose number is known only at run time: so the cost is that of the
rows that are there, however skewed the routing. On a CPU the first part saves copies of weights and
of their gradients, an expert at a time; the second saves the padding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.groups import RowGroups

# Rows of the blocks of a tail. Below 64, a matmul on a CPU costs as much as one of 64.
LARGE, SMALL = 256, 64

# (rows of a group [b, X], the weights of its expert) -> results [b, Y].
Apply = Callable[[jax.Array, Any], jax.Array]


def grouped_matmul(x_RD: jax.Array, weight_EDF: jax.Array, groups: RowGroups) -> jax.Array:
    """y[r] = x[r] @ weight[expert of r]; see `kernels.grouped_matmul`."""
    return _apply_to_groups(jnp.matmul, x_RD, weight_EDF, groups)


def grouped_swiglu(
    x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, groups: RowGroups
) -> jax.Array:
    """y[r] = down(silu(gate(x[r])) * up(x[r])) of the expert of r; see `kernels.grouped_matmul`."""
    return _apply_to_groups(_swiglu, x_RD, (gate_EDF, up_EDF, down_EFD), groups)


def _swiglu(x_bD: jax.Array, weights: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    gate_DF, up_DF, down_FD = weights
    return _activate(x_bD @ gate_DF, x_bD @ up_DF) @ down_FD


@jax.checkpoint  # The backward pass keeps what the matmuls gave, and nothing in between.
def _activate(gated_bF: jax.Array, upped_bF: jax.Array) -> jax.Array:
    return jax.nn.silu(gated_bF) * upped_bF


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply_to_groups(apply: Apply, x_RX: jax.Array, weights: Any, groups: RowGroups) -> jax.Array:
    """`apply` to the rows of each group with its own weights, of which each leaf is [E, ...]; zero
    elsewhere.
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

        # Many small parts would vanish in bfloat16.
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
    """The first C rows of each group: where they are among all rows, and where each row is among
    them.
    """

    row_EC: jax.Array  # R where the group has fewer
    place_R: jax.Array  # E * C for a row of no head

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
        """[E, C, X], zero where there is no row. Transpose: `put_back`."""
        return x_RX.at[self.row_EC].get(mode="fill", fill_value=0)

    def put_back(self, y_ECY: jax.Array) -> jax.Array:
        """[R, Y], zero in rows of no head. Transpose: `take`."""
        return y_ECY.reshape(-1, y_ECY.shape[-1]).at[self.place_R].get(mode="fill", fill_value=0)


@dataclasses.dataclass(frozen=True)
class _Block:
    """`size` rows from `start` on, of which those before `end` are the group's own."""

    start: jax.Array
    end: jax.Array
    size: int

    def read(self, array_PX: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array_PX, self.start, self.size)

    def mask(self, block_bX: jax.Array) -> jax.Array:
        """Zero in the rows of others."""
        return jnp.where((self.start + jnp.arange(self.size) < self.end)[:, None], block_bX, 0)

    def add(self, array_PX: jax.Array, block_bX: jax.Array) -> jax.Array:
        """Into the group's own rows."""
        summed_bX = self.read(array_PX) + self.mask(block_bX)
        return jax.lax.dynamic_update_slice_in_dim(array_PX, summed_bX, self.start, axis=0)


@dataclasses.dataclass(frozen=True)
class _Tail:
    """The rows of a group from `start` to `end`."""

    start: jax.Array
    end: jax.Array

    def fold(self, body: Callable[[_Block, Any], Any], carry: Any) -> Any:
        """Folds `body(block, carry)` over large blocks, while they are full, and then small ones."""
        num_large = (self.end - self.start) // LARGE
        rest = self.start + num_large * LARGE
        num_small = (self.end - rest + SMALL - 1) // SMALL
        for start, num_blocks, size in ((self.start, num_large, LARGE), (rest, num_small, SMALL)):

            def step(i, carry, start=start, size=size):
                return body(_Block(start + i * size, self.end, size), carry)

            carry = jax.lax.fori_loop(0, num_blocks, step, carry)
        return carry


def _fold_tails(
    groups: RowGroups,
    head_length: int,
    weights: Any,
    body: Callable[[jax.Array, Any, _Tail, Any], Any],
    carry: Any,
) -> Any:
    """Folds `body(expert, its weights, tail, carry)` over the groups that are longer than their
    head.
    """
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
    """Not `.at[e].add`, a scatter."""
    sum_XY = jax.lax.dynamic_index_in_dim(whole_EXY, e, keepdims=False) + own_XY
    return jax.lax.dynamic_update_index_in_dim(whole_EXY, sum_XY, e, axis=0)


def _lengthen(x_RX: jax.Array) -> jax.Array:
    """P = R + LARGE rows: the last block of the last group may reach beyond."""
    return jnp.concatenate([x_RX, jnp.zeros_like(x_RX, shape=(LARGE, x_RX.shape[1]))])
