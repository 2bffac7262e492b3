"""Rows that are sorted by expert: how many each has, and how they are weighed."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGroups:
    """The groups of rows of this device's experts, one after the other from the first row on.

    `balanced_rows` is how many rows all of them would have together if the routing were balanced:
    kernels plan for that, and are right for any other number.
    """

    rows_per_expert_E: jax.Array
    balanced_rows: int = dataclasses.field(metadata={"static": True})


def weigh(x_RX: jax.Array, weight_R1: jax.Array, groups: RowGroups) -> jax.Array:
    """Rows times their weights; those past the last expert's become zero, whatever they held."""
    is_used_R1 = (jnp.arange(len(x_RX)) < jnp.sum(groups.rows_per_expert_E))[:, None]
    return jnp.where(is_used_R1, x_RX * weight_R1, 0).astype(x_RX.dtype)
