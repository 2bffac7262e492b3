"""The grouped SwiGLU of a few rows, which reads only the matrices of visited experts.

A step of text generation has one or two rows per sequence, so its time is that of reading weights.
Slicing a layer out of the stack of all layers would copy all its experts, most of which are not
visited. It has no gradient.
"""

import jax
import jax.numpy as jnp

# Up to about this many rows, a matmul takes less time than reading its matrices.
_MAX_BLOCK_ROWS = 32


def grouped_swiglu(
    x_RD: jax.Array,
    gate_LEDF: jax.Array,
    up_LEDF: jax.Array,
    down_LEFD: jax.Array,
    rows_per_expert_E: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """y[r] = down(silu(gate(x[r])) * up(x[r])) with the matrices of the expert of r in `layer`."""
    block = min(len(x_RD), _MAX_BLOCK_ROWS)
    # The last block of an expert may reach past its rows. The next expert overwrites those rows,
    # and after the last row there is one block to spare.
    x_PD = jnp.concatenate([x_RD, jnp.zeros_like(x_RD, shape=(block, x_RD.shape[1]))])
    ends_E = jnp.cumsum(rows_per_expert_E)

    def has_rows_left(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return carry[0] < ends_E[-1]

    def apply_expert(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, y_PD = carry
        expert = jnp.sum(ends_E <= start)
        gate_DF, up_DF, down_FD = (
            weight[layer, expert] for weight in (gate_LEDF, up_LEDF, down_LEFD)
        )
        x_bD = jax.lax.dynamic_slice_in_dim(x_PD, start, block)
        y_bD = (jax.nn.silu(x_bD @ gate_DF) * (x_bD @ up_DF)) @ down_FD
        y_PD = jax.lax.dynamic_update_slice_in_dim(y_PD, y_bD, start, axis=0)
        return jnp.minimum(start + block, ends_E[expert]), y_PD

    start = jnp.zeros_like(ends_E[0])
    return jax.lax.while_loop(has_rows_left, apply_expert, (start, jnp.zeros_like(x_PD)))[1][
        : len(x_RD)
    ]
