"""The grouped SwiGLU of a few rows: one visited expert after the other, its matrices read where
they lie.

A step that writes text has a row or two for each sequence, so its time is that of reading weights.
Cutting a layer out of the stack of all would copy all its experts, of which most are not visited.
Has no gradient.
"""

import jax
import jax.numpy as jnp

# As many rows cost little more than one: less than reading the matrices does.
_LARGEST_BLOCK = 32


def grouped_swiglu(
    x_RD: jax.Array,
    gate_LEDF: jax.Array,
    up_LEDF: jax.Array,
    down_LEFD: jax.Array,
    rows_per_expert_E: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """y[r] = down(silu(gate(x[r])) * up(x[r])) of the expert of r in a layer; see
    `kernels.grouped_matmul`.
    """
    block = min(len(x_RD), _LARGEST_BLOCK)
    # A block longer than the rows: what the last one reaches beyond an expert's, the next expert
    # writes again.
    x_PD = jnp.concatenate([x_RD, jnp.zeros_like(x_RD, shape=(block, x_RD.shape[1]))])
    ends_E = jnp.cumsum(rows_per_expert_E)

    def goes_on(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
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
    return jax.lax.while_loop(goes_on, apply_expert, (start, jnp.zeros_like(x_PD)))[1][: len(x_RD)]
