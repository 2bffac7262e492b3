"""Rows that are sorted by expert: how many each has."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGroups:
    """The groups of rows of this device's experts, one after the other from the first row on.

    `balanced_rows` is how many rows all of them would have together if the routing were balanced:
    kernels plan for that, and are right for any other number.
    """

    rows_per_expert_E: jax.Array
    balanced_rows: int = dataclasses.field(metadata={"static": True})
