"""Rows that are sorted by expert: how many rows each expert has, and how rows are weighed."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGroups:
    """The groups of rows of this device's experts, without gaps, from the first row on.

    `balanced_rows` is the number of rows of all groups together if the routing is balanced. Kernels
    plan for it, and are correct for any other number.
    """

    rows_per_expert_E: jax.Array
    balanced_rows: int = dataclasses.field(metadata={"static": True})


def weigh(x_RX: jax.Array, weight_R1: jax.Array, groups: RowGroups) -> jax.Array:
    """Multiplies rows by their weights; rows after those of the last expert become zero."""
    is_used_R1 = (jnp.arange(len(x_RX)) < jnp.sum(groups.rows_per_expert_E))[:, None]
    return jnp.where(is_used_R1, x_RX * weight_R1, 0).astype(x_RX.dtype)
