"""Grouped matmuls as loops over blocks of rows, with their own gradients.

An expert's rows are cut into blocks of `BLOCK`. How many blocks there are is known only at run time,
so the cost is that of the rows that are there, rounded up to a block an expert, however skewed the
routing. The whole SwiGLU of a block runs in one loop body: on a CPU the block stays in cache between
the three matmuls.

The last block of an expert reaches into the rows of the next, who overwrites what it writes there;
arrays are a block longer than their rows, so that the very last one has where to reach.
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
    x_PD = _lengthen(x_RD)

    def multiply(weight_DF, block, y_PF):
        return block.write(y_PF, block.read(x_PD) @ weight_DF)

    y_PF = _zeros(x_PD, weight_EDF.shape[-1])
    return _for_each_block(rows_per_expert_E, multiply, weight_EDF, y_PF)[: len(x_RD)]


def _matmul_forward(x_RD, weight_EDF, rows_per_expert_E):
    return grouped_matmul(x_RD, weight_EDF, rows_per_expert_E), (x_RD, weight_EDF, rows_per_expert_E)


def _matmul_backward(residuals, dy_RF):
    x_RD, weight_EDF, rows_per_expert_E = residuals
    x_PD, dy_PF = _lengthen(x_RD), _lengthen(dy_RF)

    def differentiate(weight_DF, block, dx_PD, dweight_DF):
        dy_bF = block.read_own(dy_PF)
        return block.write(dx_PD, dy_bF @ weight_DF.T), dweight_DF + _outer(block.read(x_PD), dy_bF)

    dx_PD, dweight_EDF = _sum_each_block(rows_per_expert_E, differentiate, weight_EDF, jnp.zeros_like(x_PD))
    return dx_PD[: len(x_RD)], dweight_EDF, None


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def grouped_swiglu(
    x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, rows_per_expert_E: jax.Array
) -> jax.Array:
    """y[r] = down(silu(gate(x[r])) * up(x[r])) of the expert of r; see `kernels.grouped_matmul`."""
    x_PD = _lengthen(x_RD)

    def apply(weights, block, y_PD):
        gate_DF, up_DF, down_FD = weights
        x_bD = block.read(x_PD)
        return block.write(y_PD, (jax.nn.silu(x_bD @ gate_DF) * (x_bD @ up_DF)) @ down_FD)

    weights = (gate_EDF, up_EDF, down_EFD)
    return _for_each_block(rows_per_expert_E, apply, weights, jnp.zeros_like(x_PD))[: len(x_RD)]


def _swiglu_forward(x_RD, gate_EDF, up_EDF, down_EFD, rows_per_expert_E):
    x_PD = _lengthen(x_RD)

    def apply(weights, block, results):
        gate_DF, up_DF, down_FD = weights
        y_PD, gated_PF, upped_PF = results
        x_bD = block.read(x_PD)
        gated_bF, upped_bF = x_bD @ gate_DF, x_bD @ up_DF
        y_bD = (jax.nn.silu(gated_bF) * upped_bF) @ down_FD
        return block.write(y_PD, y_bD), block.write(gated_PF, gated_bF), block.write(upped_PF, upped_bF)

    F, weights = gate_EDF.shape[-1], (gate_EDF, up_EDF, down_EFD)
    zeros = (jnp.zeros_like(x_PD), _zeros(x_PD, F), _zeros(x_PD, F))
    y_PD, gated_PF, upped_PF = _for_each_block(rows_per_expert_E, apply, weights, zeros)
    return y_PD[: len(x_RD)], (x_RD, gated_PF, upped_PF, weights, rows_per_expert_E)


def _swiglu_backward(residuals, dy_RD):
    x_RD, gated_PF, upped_PF, weights, rows_per_expert_E = residuals
    x_PD, dy_PD = _lengthen(x_RD), _lengthen(dy_RD)

    def differentiate(weights, block, dx_PD, dweights):
        gate_DF, up_DF, down_FD = weights
        dgate_DF, dup_DF, ddown_FD = dweights
        x_bD, dy_bD = block.read(x_PD), block.read_own(dy_PD)
        gated_bF, upped_bF = block.read(gated_PF), block.read(upped_PF)
        sigmoid_bF = jax.nn.sigmoid(gated_bF)
        silu_bF = gated_bF * sigmoid_bF
        dhidden_bF = dy_bD @ down_FD.T
        dupped_bF = dhidden_bF * silu_bF
        dgated_bF = dhidden_bF * upped_bF * (sigmoid_bF + silu_bF * (1 - sigmoid_bF))
        dx_PD = block.write(dx_PD, dgated_bF @ gate_DF.T + dupped_bF @ up_DF.T)
        ddown_FD += _outer(silu_bF * upped_bF, dy_bD)
        return dx_PD, (dgate_DF + _outer(x_bD, dgated_bF), dup_DF + _outer(x_bD, dupped_bF), ddown_FD)

    dx_PD, dweights = _sum_each_block(rows_per_expert_E, differentiate, weights, jnp.zeros_like(x_PD))
    return dx_PD[: len(x_RD)], *dweights, None


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@dataclasses.dataclass(frozen=True)
class _Block:
    """`BLOCK` rows from `start` on, of which those before `end` are the expert's own."""

    start: jax.Array
    end: jax.Array

    def read(self, array_PX: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array_PX, self.start, BLOCK)

    def read_own(self, array_PX: jax.Array) -> jax.Array:
        """The expert's own rows, zero elsewhere: what may be summed over rows."""
        row_b = self.start + jnp.arange(BLOCK)
        return jnp.where((row_b < self.end)[:, None], self.read(array_PX), 0)

    def write(self, array_PX: jax.Array, block_bX: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array_PX, block_bX, self.start, axis=0)


def _for_each_block(rows_per_expert_E: jax.Array, body: Callable, weights: Any, carry: Any) -> Any:
    """Folds `body(own weights, block, carry)` over the blocks of each expert in turn; `weights` are [E, ...]."""
    for e in range(len(rows_per_expert_E)):
        carry = _fold_expert(rows_per_expert_E, e, body, weights, carry)
    return carry


def _sum_each_block(rows_per_expert_E: jax.Array, body: Callable, weights: Any, dx_PD: jax.Array) -> Any:
    """Folds `body(own weights, block, dx, gradients of these)` likewise; the gradients come out [E, ...].

    They are summed in float32, for many small parts would vanish in bfloat16; and one expert at a time,
    since XLA:CPU adds into a part of an array on one core only.
    """
    gradients = []
    for e in range(len(rows_per_expert_E)):
        zeros = jax.tree.map(lambda weight: jnp.zeros_like(weight, shape=weight.shape[1:], dtype=jnp.float32), weights)

        def step(own_weights, block, carry):
            return body(own_weights, block, *carry)

        dx_PD, own = _fold_expert(rows_per_expert_E, e, step, weights, (dx_PD, zeros))
        gradients.append(own)
    return dx_PD, jax.tree.map(lambda weight, *own: jnp.stack(own).astype(weight.dtype), weights, *gradients)


def _fold_expert(rows_per_expert_E: jax.Array, e: int, body: Callable, weights: Any, carry: Any) -> Any:
    end = jnp.sum(rows_per_expert_E[: e + 1])
    start = end - rows_per_expert_E[e]
    own_weights = jax.tree.map(lambda weight: weight[e], weights)  # Here: in the loop, it is a copy for every block.

    def step(i, carry):
        return body(own_weights, _Block(start + i * BLOCK, end), carry)

    return jax.lax.fori_loop(0, (end - start + BLOCK - 1) // BLOCK, step, carry)


def _outer(x_bX: jax.Array, dy_bY: jax.Array) -> jax.Array:
    return jnp.matmul(x_bX.T, dy_bY, preferred_element_type=jnp.float32)


def _lengthen(x_RX: jax.Array) -> jax.Array:
    """P = R + BLOCK rows."""
    return jnp.concatenate([x_RX, jnp.zeros_like(x_RX, shape=(BLOCK, x_RX.shape[1]))])


def _zeros(like_RX: jax.Array, width: int) -> jax.Array:
    return jnp.zeros_like(like_RX, shape=(like_RX.shape[0], width))
