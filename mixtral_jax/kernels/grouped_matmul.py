"""Rows sorted by expert, through that expert's matrices: one signature, a kernel for each back end.

`blocks` loops over blocks of rows with a trip count known only at run time, so that it does no work
for rows that are not there, however skewed the routing. `ragged_dot` is XLA's own: a real grouped
kernel on TPU, but on CPU it multiplies every row by every expert.

Rows past the last expert's may hold anything; what comes out for them is unspecified, and their
gradients are ignored.
"""

from typing import Literal

import jax

from mixtral_jax.kernels import blocks
from mixtral_jax.kernels.choice import Choice

Kernel = Literal["blocks", "ragged_dot"]


def choose_kernel(asked: str, platform: str) -> Choice:
    """The kernel for a device of `platform` (`cpu`, `gpu`, `tpu`)."""
    if asked != "auto":
        return Choice(asked, "as asked")
    if platform == "tpu":
        return Choice("ragged_dot", "XLA:TPU has a grouped kernel for it")
    return Choice("blocks", "no work for rows that are not there")


def grouped_matmul(x_RD: jax.Array, weight_EDF: jax.Array, rows_per_expert_E: jax.Array, kernel: Kernel) -> jax.Array:
    """y[r] = x[r] @ weight[expert of r], [R, F]."""
    if kernel == "ragged_dot":
        return jax.lax.ragged_dot(x_RD, weight_EDF, rows_per_expert_E)
    return blocks.grouped_matmul(x_RD, weight_EDF, rows_per_expert_E)


def grouped_swiglu(
    x_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    rows_per_expert_E: jax.Array,
    kernel: Kernel,
) -> jax.Array:
    """y[r] = down(silu(gate(x[r])) * up(x[r])) with the matrices of the expert of r, [R, D]."""
    if kernel == "blocks":
        return blocks.grouped_swiglu(x_RD, gate_EDF, up_EDF, down_EFD, rows_per_expert_E)
    gate_RF = jax.lax.ragged_dot(x_RD, gate_EDF, rows_per_expert_E)
    up_RF = jax.lax.ragged_dot(x_RD, up_EDF, rows_per_expert_E)
    return jax.lax.ragged_dot(jax.nn.silu(gate_RF) * up_RF, down_EFD, rows_per_expert_E)
