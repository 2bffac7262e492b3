"""Rows sorted by expert, through that expert's matrices: one signature, a kernel for each back end.

`blocks` is a batched matmul and loops over blocks of rows with a trip count known only at run time,
so that it does next to no work for rows that are not there, however skewed the routing.
`ragged_dot` is XLA's own: a real grouped kernel on TPU, but on CPU, and on GPU in many releases, it
multiplies every row by every expert. `tokamax` has kernels for TPU and NVIDIA GPUs. Instead of
`blocks`, few rows of a layer go through `few_rows`.

Rows past the last expert's may hold anything; what comes out for them is unspecified, and their
gradients are ignored.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from mixtral_jax.config import DispatchConfig, require
from mixtral_jax.kernels import blocks, few_rows, tokamax
from mixtral_jax.kernels.choice import Choice
from mixtral_jax.kernels.groups import RowGroups

Kernel = Literal["blocks", "ragged_dot", "tokamax"]


def choose_kernel(config: DispatchConfig, platform: str) -> Choice:
    """The kernel for a device of `platform` (`cpu`, `gpu`, `tpu`).

    Raises:
        ConfigError: the one asked for does not work here.
    """
    asked, obstacle = config.grouped_matmul, tokamax.find_obstacle(platform)
    if asked != "auto":
        require(
            asked != "tokamax" or not obstacle,
            f"dispatch.grouped_matmul=tokamax needs {obstacle}; use auto",
        )
        is_dense = asked == "ragged_dot" and platform != "tpu"
        return Choice(
            asked,
            "as asked; XLA may multiply every row by every expert here" if is_dense else "as asked",
        )
    if platform == "tpu":
        return Choice("ragged_dot", "XLA:TPU has a grouped kernel for it")
    if platform == "gpu" and not obstacle:
        return Choice("tokamax", "grouped kernels for NVIDIA GPUs")
    missing = f"; tokamax would need {obstacle}" if platform == "gpu" else ""
    return Choice("blocks", f"no work for rows that are not there{missing}")


def grouped_matmul(
    x_RD: jax.Array, weight_EDF: jax.Array, groups: RowGroups, kernel: Kernel
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
    kernel: Kernel,
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
    kernel: Kernel,
    layer: jax.Array,
) -> jax.Array:
    """`grouped_swiglu` with the matrices of one layer of a stack, where there is no gradient to be
    had.

    To cut the layer out is to copy all its experts: kernels that can, read them where they lie.
    """
    if kernel == "blocks":
        return few_rows.grouped_swiglu(
            x_RD, gate_LEDF, up_LEDF, down_LEFD, groups.rows_per_expert_E, layer
        )
    arrays = (x_RD, gate_LEDF, up_LEDF, down_LEFD, groups, layer)
    if kernel == "ragged_dot":
        # A group without rows costs nothing on TPU alone.
        return jax.lax.platform_dependent(
            *arrays, tpu=swiglu_in_stack, default=functools.partial(_cut_out, kernel)
        )
    return _cut_out(kernel, *arrays)


def swiglu_in_stack(
    x_RD: jax.Array,
    gate_LEDF: jax.Array,
    up_LEDF: jax.Array,
    down_LEFD: jax.Array,
    groups: RowGroups,
    layer: jax.Array,
) -> jax.Array:
    """`swiglu_of_layer` by `ragged_dot`: the stack is one layer of L * E experts, of which all but
    E get no row.
    """
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


def _cut_out(
    kernel: Kernel, x_RD, gate_LEDF, up_LEDF, down_LEFD, groups: RowGroups, layer
) -> jax.Array:
    gate_EDF, up_EDF, down_EFD = gate_LEDF[layer], up_LEDF[layer], down_LEFD[layer]
    return grouped_swiglu(x_RD, gate_EDF, up_EDF, down_EFD, groups, kernel)
