"""Grouped matmul: rows sorted by expert times their expert's matrix, for all back ends.

`blocks` is a batched matmul and loops over blocks of rows whose trip count is known only at run
time, so that it does next to no work for missing rows, however skewed the routing. `ragged_dot` is
XLA's own: a real grouped kernel on TPU, but on CPU, and on GPU in many releases, it multiplies
every row by every expert. `tokamax` has kernels for TPU and NVIDIA GPUs. Where a step has few rows,
`few_rows` replaces `blocks`.

Rows after those of the last expert may hold anything. Their results are unspecified, and their
gradients are ignored. All knowledge of which kernel needs what is in this file.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mixtral_jax.config import GroupedMatmulName
from mixtral_jax.kernels import blocks, few_rows, tokamax
from mixtral_jax.kernels.groups import RowGroups


def skips_missing_rows(kernel: GroupedMatmulName) -> bool:
    """True for a kernel that may get a whole buffer, because it does no work for missing rows.

    The other kernels get the rows in chunks (`kernels.chunks`).
    """
    return kernel == "blocks"


def has_dense_gradient(kernel: GroupedMatmulName) -> bool:
    """True for a kernel whose gradient of the weights multiplies every row by every expert.

    It gets the experts one by one in the backward pass (`kernels.chunks`).
    """
    return kernel == "ragged_dot"


def supports_vma_check(kernel: GroupedMatmulName) -> bool:
    """False for a kernel that does not tell jax over which mesh axes its results vary.

    `jax.shard_map` then needs `check_vma=False`.
    """
    return kernel != "tokamax"


def grouped_matmul(
    x_RD: jax.Array, weight_EDF: jax.Array, groups: RowGroups, kernel: GroupedMatmulName
) -> jax.Array:
    """y[r] = x[r] @ weight[expert of r], [R, F]."""
    if kernel == "blocks":
        return blocks.grouped_matmul(x_RD, weight_EDF, groups)
    ragged_dot = {"ragged_dot": jax.lax.ragged_dot, "tokamax": tokamax.ragged_dot}[kernel]
    return ragged_dot(x_RD, weight_EDF, groups.rows_per_expert_E)


def grouped_swiglu(
    x_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    groups: RowGroups,
    kernel: GroupedMatmulName,
) -> jax.Array:
    """y[r] = down(silu(gate(x[r])) * up(x[r])) with the matrices of the expert of r, [R, D]."""
    if kernel == "blocks":
        return blocks.grouped_swiglu(x_RD, gate_EDF, up_EDF, down_EFD, groups)
    gate_RF, up_RF = (grouped_matmul(x_RD, weight, groups, kernel) for weight in (gate_EDF, up_EDF))
    return grouped_matmul(jax.nn.silu(gate_RF) * up_RF, down_EFD, groups, kernel)


def swiglu_of_layer(
    x_RD: jax.Array,
    gate_LEDF: jax.Array,
    up_LEDF: jax.Array,
    down_LEFD: jax.Array,
    groups: RowGroups,
    kernel: GroupedMatmulName,
    layer: jax.Array,
) -> jax.Array:
    """`grouped_swiglu` with the matrices of one layer of a stack; has no gradient.

    Slicing the layer out of the stack would copy all its experts. A kernel that is able to read the
    matrices in place does so.
    """
    if kernel == "blocks":
        return few_rows.grouped_swiglu(
            x_RD, gate_LEDF, up_LEDF, down_LEFD, groups.rows_per_expert_E, layer
        )
    arrays = (x_RD, gate_LEDF, up_LEDF, down_LEFD, groups, layer)
    if kernel == "ragged_dot":
        # Only on TPU does a group without rows cost nothing.
        return jax.lax.platform_dependent(
            *arrays, tpu=swiglu_in_stack, default=functools.partial(_slice_layer, kernel)
        )
    return _slice_layer(kernel, *arrays)


def swiglu_in_stack(
    x_RD: jax.Array,
    gate_LEDF: jax.Array,
    up_LEDF: jax.Array,
    down_LEFD: jax.Array,
    groups: RowGroups,
    layer: jax.Array,
) -> jax.Array:
    """`swiglu_of_layer` by `ragged_dot`: L * E experts in one layer, most of them without rows."""
    L, E = gate_LEDF.shape[:2]
    none_LE = jnp.zeros_like(groups.rows_per_expert_E, shape=(L * E,))
    rows_LE = jax.lax.dynamic_update_slice_in_dim(
        none_LE, groups.rows_per_expert_E, layer * E, axis=0
    )
    gate_XDF, up_XDF, down_XFD = (
        w.reshape(L * E, *w.shape[2:]) for w in (gate_LEDF, up_LEDF, down_LEFD)
    )
    in_stack = dataclasses.replace(groups, rows_per_expert_E=rows_LE)
    return grouped_swiglu(x_RD, gate_XDF, up_XDF, down_XFD, in_stack, "ragged_dot")


def _slice_layer(
    kernel: GroupedMatmulName, x_RD, gate_LEDF, up_LEDF, down_LEFD, groups: RowGroups, layer
) -> jax.Array:
    gate_EDF, up_EDF, down_EFD = gate_LEDF[layer], up_LEDF[layer], down_LEFD[layer]
    return grouped_swiglu(x_RD, gate_EDF, up_EDF, down_EFD, groups, kernel)
