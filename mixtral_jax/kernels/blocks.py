"""Grouped matmuls as loops over blocks of rows, with their own gradients.

An expert's rows are cut into blocks of `BLOCK`. How many blocks there are is known only at run time,
so the cost is that of the rows that are there, rounded up to a block an expert, however skewed the
routing. The last block of an expert spills into the rows of the next, which overwrites them when its
turn comes. The whole SwiGLU of a block runs in one loop body: on a CPU the block stays in cache
between the three matmuls.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 256


@jax.custom_vjp
def grouped_matmul(x_RD: jax.Array, weight_EDF: jax.Array, rows_per_expert_E: jax.Array) -> jax.Array:
    """y[r] = x[r] @ weight[expert of r]; see `kernels.grouped_matmul`."""

    def multiply(e, block, y_RF):
        return block.write(y_RF, block.read(x_RD) @ weight_EDF[e])

    x_RD, R = _pad(x_RD), x_RD.shape[0]
    return _for_each_block(rows_per_expert_E, multiply, _zeros(x_RD, weight_EDF.shape[-1]))[:R]


def _matmul_forward(x_RD, weight_EDF, rows_per_expert_E):
    return grouped_matmul(x_RD, weight_EDF, rows_per_expert_E), (x_RD, weight_EDF, rows_per_expert_E)


def _matmul_backward(residuals, dy_RF):
    x_RD, weight_EDF, rows_per_expert_E = residuals
    x_RD, dy_RF, R = _pad(x_RD), _pad(dy_RF), x_RD.shape[0]

    def differentiate(e, block, gradients):
        dx_RD, dweight_EDF = gradients
        dy_bF = block.read_own(dy_RF)
        return block.write(dx_RD, dy_bF @ weight_EDF[e].T), dweight_EDF.at[e].add(block.read(x_RD).T @ dy_bF)

    zeros = (_zeros(x_RD, x_RD.shape[-1]), jnp.zeros_like(weight_EDF))
    dx_RD, dweight_EDF = _for_each_block(rows_per_expert_E, differentiate, zeros)
    return dx_RD[:R], dweight_EDF, None


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def grouped_swiglu(
    x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, rows_per_expert_E: jax.Array
) -> jax.Array:
    """y[r] = down(silu(gate(x[r])) * up(x[r])) of the expert of r; see `kernels.grouped_matmul`."""

    def apply(e, block, y_RD):
        x_bD = block.read(x_RD)
        hidden_bF = jax.nn.silu(x_bD @ gate_EDF[e]) * (x_bD @ up_EDF[e])
        return block.write(y_RD, hidden_bF @ down_EFD[e])

    x_RD, R = _pad(x_RD), x_RD.shape[0]
    return _for_each_block(rows_per_expert_E, apply, _zeros(x_RD, x_RD.shape[-1]))[:R]


def _swiglu_forward(x_RD, gate_EDF, up_EDF, down_EFD, rows_per_expert_E):
    def apply(e, block, results):
        y_RD, gated_RF, upped_RF = results
        x_bD = block.read(x_RD)
        gated_bF, upped_bF = x_bD @ gate_EDF[e], x_bD @ up_EDF[e]
        y_bD = (jax.nn.silu(gated_bF) * upped_bF) @ down_EFD[e]
        return block.write(y_RD, y_bD), block.write(gated_RF, gated_bF), block.write(upped_RF, upped_bF)

    x_RD, R = _pad(x_RD), x_RD.shape[0]
    D, F = gate_EDF.shape[1:]
    zeros = (_zeros(x_RD, D), _zeros(x_RD, F), _zeros(x_RD, F))
    y_RD, gated_RF, upped_RF = _for_each_block(rows_per_expert_E, apply, zeros)
    return y_RD[:R], (x_RD, gated_RF, upped_RF, gate_EDF, up_EDF, down_EFD, rows_per_expert_E)


def _swiglu_backward(residuals, dy_RD):
    x_RD, gated_RF, upped_RF, gate_EDF, up_EDF, down_EFD, rows_per_expert_E = residuals
    dy_RD, R = _pad(dy_RD), dy_RD.shape[0]

    def differentiate(e, block, gradients):
        dx_RD, dgate_EDF, dup_EDF, ddown_EFD = gradients
        x_bD, dy_bD = block.read(x_RD), block.read_own(dy_RD)
        gated_bF, upped_bF = block.read(gated_RF), block.read(upped_RF)
        sigmoid_bF = jax.nn.sigmoid(gated_bF)
        silu_bF = gated_bF * sigmoid_bF
        dhidden_bF = dy_bD @ down_EFD[e].T
        dupped_bF = dhidden_bF * silu_bF
        dgated_bF = dhidden_bF * upped_bF * (sigmoid_bF + silu_bF * (1 - sigmoid_bF))
        return (
            block.write(dx_RD, dgated_bF @ gate_EDF[e].T + dupped_bF @ up_EDF[e].T),
            dgate_EDF.at[e].add(x_bD.T @ dgated_bF),
            dup_EDF.at[e].add(x_bD.T @ dupped_bF),
            ddown_EFD.at[e].add((silu_bF * upped_bF).T @ dy_bD),
        )

    zeros = (_zeros(x_RD, x_RD.shape[-1]), *map(jnp.zeros_like, (gate_EDF, up_EDF, down_EFD)))
    dx_RD, dgate_EDF, dup_EDF, ddown_EFD = _for_each_block(rows_per_expert_E, differentiate, zeros)
    return dx_RD[:R], dgate_EDF, dup_EDF, ddown_EFD, None


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Rows [start, start + BLOCK) of a padded array, of which the first `num_own` are the expert's."""

    start: jax.Array
    num_own: jax.Array

    def read(self, array_RX: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array_RX, self.start, BLOCK)

    def read_own(self, array_RX: jax.Array) -> jax.Array:
        """The expert's own rows, zero elsewhere: what may be summed over rows."""
        return jnp.where((jnp.arange(BLOCK) < self.num_own)[:, None], self.read(array_RX), 0)

    def write(self, array_RX: jax.Array, block_bX: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array_RX, block_bX, self.start, axis=0)


def _for_each_block(rows_per_expert_E: jax.Array, body: Callable[[int, _Block, Any], Any], carry: Any) -> Any:
    """Folds `body(expert, block, carry)` over the blocks of each expert in turn."""
    ends_E = jnp.cumsum(rows_per_expert_E)
    for e in range(rows_per_expert_E.shape[0]):
        num_rows, start = rows_per_expert_E[e], ends_E[e] - rows_per_expert_E[e]

        def step(i, carry, e=e, num_rows=num_rows, start=start):
            return body(e, _Block(start + i * BLOCK, num_rows - i * BLOCK), carry)

        carry = jax.lax.fori_loop(0, (num_rows + BLOCK - 1) // BLOCK, step, carry)
    return carry


def _pad(x_RX: jax.Array) -> jax.Array:
    """Room for the last block to spill into: a slice that does not fit would be shifted, not cut."""
    return jnp.concatenate([x_RX, jnp.zeros_like(x_RX, shape=(BLOCK, x_RX.shape[1]))])


def _zeros(like_RX: jax.Array, width: int) -> jax.Array:
    return jnp.zeros_like(like_RX, shape=(like_RX.shape[0], width))
