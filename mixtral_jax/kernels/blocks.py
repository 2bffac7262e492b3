"""Grouped matmuls as loops over blocks of rows, with their own gradients.

An expert's rows are cut into blocks of `BLOCK`. How many blocks there are is known only at run time,
so the cost is that of the rows that are there, rounded up to a block an expert, however skewed the
routing. A block may hold rows of a neighbour too; only an expert's own are written. The whole SwiGLU
of a block runs in one loop body: on a CPU the block stays in cache between the three matmuls.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

BLOCKS = (512, 128)


@jax.custom_vjp
def grouped_matmul(x_RD: jax.Array, weight_EDF: jax.Array, rows_per_expert_E: jax.Array) -> jax.Array:
    """y[r] = x[r] @ weight[expert of r]; see `kernels.grouped_matmul`."""

    def multiply(e, weight_DF, block, y_RF):
        return block.write(y_RF, block.read(x_RD) @ weight_DF)

    return _for_each_block(rows_per_expert_E, multiply, weight_EDF, _zeros(x_RD, weight_EDF.shape[-1]))


def _matmul_forward(x_RD, weight_EDF, rows_per_expert_E):
    return grouped_matmul(x_RD, weight_EDF, rows_per_expert_E), (x_RD, weight_EDF, rows_per_expert_E)


def _matmul_backward(residuals, dy_RF):
    x_RD, weight_EDF, rows_per_expert_E = residuals

    def differentiate(e, weight_DF, block, gradients):
        dx_RD, dweight_EDF = gradients
        dy_bF = block.read_own(dy_RF)
        return block.write(dx_RD, dy_bF @ weight_DF.T), _add_outer(dweight_EDF, e, block.read(x_RD), dy_bF)

    zeros = (jnp.zeros_like(x_RD), _float32_zeros(weight_EDF))
    dx_RD, dweight_EDF = _for_each_block(rows_per_expert_E, differentiate, weight_EDF, zeros)
    return dx_RD, dweight_EDF.astype(weight_EDF.dtype), None


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def grouped_swiglu(
    x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, rows_per_expert_E: jax.Array
) -> jax.Array:
    """y[r] = down(silu(gate(x[r])) * up(x[r])) of the expert of r; see `kernels.grouped_matmul`."""

    def apply(e, weights, block, y_RD):
        gate_DF, up_DF, down_FD = weights
        x_bD = block.read(x_RD)
        hidden_bF = jax.nn.silu(x_bD @ gate_DF) * (x_bD @ up_DF)
        return block.write(y_RD, hidden_bF @ down_FD)

    return _for_each_block(rows_per_expert_E, apply, (gate_EDF, up_EDF, down_EFD), jnp.zeros_like(x_RD))


def _swiglu_forward(x_RD, gate_EDF, up_EDF, down_EFD, rows_per_expert_E):
    def apply(e, weights, block, results):
        y_RD, gated_RF, upped_RF = results
        gate_DF, up_DF, down_FD = weights
        x_bD = block.read(x_RD)
        gated_bF, upped_bF = x_bD @ gate_DF, x_bD @ up_DF
        y_bD = (jax.nn.silu(gated_bF) * upped_bF) @ down_FD
        return block.write(y_RD, y_bD), block.write(gated_RF, gated_bF), block.write(upped_RF, upped_bF)

    F = gate_EDF.shape[-1]
    zeros = (jnp.zeros_like(x_RD), _zeros(x_RD, F), _zeros(x_RD, F))
    y_RD, gated_RF, upped_RF = _for_each_block(rows_per_expert_E, apply, (gate_EDF, up_EDF, down_EFD), zeros)
    return y_RD, (x_RD, gated_RF, upped_RF, gate_EDF, up_EDF, down_EFD, rows_per_expert_E)


def _swiglu_backward(residuals, dy_RD):
    x_RD, gated_RF, upped_RF, gate_EDF, up_EDF, down_EFD, rows_per_expert_E = residuals

    def differentiate(e, weights, block, gradients):
        dx_RD, dgate_EDF, dup_EDF, ddown_EFD = gradients
        gate_DF, up_DF, down_FD = weights
        x_bD, dy_bD = block.read(x_RD), block.read_own(dy_RD)
        gated_bF, upped_bF = block.read(gated_RF), block.read(upped_RF)
        sigmoid_bF = jax.nn.sigmoid(gated_bF)
        silu_bF = gated_bF * sigmoid_bF
        dhidden_bF = dy_bD @ down_FD.T
        dupped_bF = dhidden_bF * silu_bF
        dgated_bF = dhidden_bF * upped_bF * (sigmoid_bF + silu_bF * (1 - sigmoid_bF))
        return (
            block.write(dx_RD, dgated_bF @ gate_DF.T + dupped_bF @ up_DF.T),
            _add_outer(dgate_EDF, e, x_bD, dgated_bF),
            _add_outer(dup_EDF, e, x_bD, dupped_bF),
            _add_outer(ddown_EFD, e, silu_bF * upped_bF, dy_bD),
        )

    weights = (gate_EDF, up_EDF, down_EFD)
    zeros = (jnp.zeros_like(x_RD), *map(_float32_zeros, weights))
    dx_RD, *dweights = _for_each_block(rows_per_expert_E, differentiate, weights, zeros)
    return dx_RD, *(dweight.astype(gate_EDF.dtype) for dweight in dweights), None


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@dataclasses.dataclass(frozen=True)
class _Block:
    """`size` rows from `start` on, of which those from `first` to `end` are the expert's own."""

    start: jax.Array
    first: jax.Array
    end: jax.Array
    size: int

    def read(self, array_RX: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array_RX, self.start, self.size)

    def read_own(self, array_RX: jax.Array) -> jax.Array:
        """The expert's own rows, zero elsewhere: what may be summed over rows."""
        return jnp.where(self._is_own(), self.read(array_RX), 0)

    def write(self, array_RX: jax.Array, block_bX: jax.Array) -> jax.Array:
        block_bX = jnp.where(self._is_own(), block_bX, self.read(array_RX))
        return jax.lax.dynamic_update_slice_in_dim(array_RX, block_bX, self.start, axis=0)

    def _is_own(self) -> jax.Array:
        row_b = self.start + jnp.arange(self.size)
        return ((row_b >= self.first) & (row_b < self.end))[:, None]


def _for_each_block(
    rows_per_expert_E: jax.Array, body: Callable[[int, Any, _Block, Any], Any], weights: Any, carry: Any
) -> Any:
    """Folds `body(expert, its weights, block, carry)` over the blocks of each expert in turn.

    `weights` are arrays [E, ...], those of `carry` [R, ...] or gradients of the weights, of which the first is
    [R, ...]. Large blocks first, for there is a price for each; the rest of an expert's rows in small ones.
    """
    num_rows = len(jax.tree.leaves(carry)[0])
    *large, small = [size for size in BLOCKS if size <= num_rows] or [num_rows]
    ends_E = jnp.cumsum(rows_per_expert_E)
    for e in range(rows_per_expert_E.shape[0]):
        first, end = ends_E[e] - rows_per_expert_E[e], ends_E[e]
        own_weights = jax.tree.map(lambda weight, e=e: weight[e], weights)  # Here: in the loop, a copy for every block.
        for size in (*large, small):

            def step(i, carry, e=e, own_weights=own_weights, first=first, end=end, size=size):
                own = first + i * size
                # The last block must not reach past the arrays: it starts earlier, among rows already done.
                return body(e, own_weights, _Block(jnp.minimum(own, num_rows - size), own, end, size), carry)

            num_blocks = (end - first + (size - 1 if size == small else 0)) // size
            carry = jax.lax.fori_loop(0, num_blocks, step, carry)
            first += num_blocks * size
    return carry


def _add_outer(dweight_EXY: jax.Array, e: int, x_bX: jax.Array, dy_bY: jax.Array) -> jax.Array:
    """Adds a block's part of an expert's gradient, in float32: many small parts would vanish in bfloat16."""
    return dweight_EXY.at[e].add(jnp.matmul(x_bX.T, dy_bY, preferred_element_type=jnp.float32))


def _float32_zeros(weight_EXY: jax.Array) -> jax.Array:
    return jnp.zeros_like(weight_EXY, dtype=jnp.float32)


def _zeros(like_RX: jax.Array, width: int) -> jax.Array:
    return jnp.zeros_like(like_RX, shape=(like_RX.shape[0], width))
