"""Copies of tokens in the order of their experts, and sums of them back: what one device does by
itself.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMap:
    """Rows that are copies of sources, seen from both ends; every source has at most A copies.

    Rows that copy no source have any index in `source_R`: what they hold is never read.
    """

    source_R: jax.Array
    row_MA: jax.Array  # rows of each source; R where a copy is missing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouteRows:
    """Rows that hold a device's M * A routes, seen from both ends."""

    route_R: jax.Array
    row_MA: jax.Array  # R for a route without a row

    def of_tokens(self) -> RowMap:
        """Rows as copies of tokens."""
        return RowMap(self.route_R // self.row_MA.shape[1], self.row_MA)

    def of_routes(self) -> RowMap:
        """Rows as copies of routes: of their weights."""
        return RowMap(self.route_R, self.row_MA.reshape(-1, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SortedRoutes:
    """A device's routes, sorted by expert and then by token, of which the first R have a row."""

    rows: RouteRows
    rows_per_expert_E: jax.Array
    overflowed: jax.Array  # routes that should have had a row


def sort_routes(expert_MA: jax.Array, num_experts: int, num_rows: int) -> SortedRoutes:
    """Gives routes their rows; `num_experts` stands for a route that goes nowhere and gets none."""
    M, A = expert_MA.shape
    expert_of_route = expert_MA.reshape(-1)
    route_of_row = jnp.argsort(expert_of_route, stable=True)
    row_of_route = jnp.where(expert_of_route < num_experts, jnp.argsort(route_of_row), num_rows)
    counts_E = jnp.sum(
        expert_of_route[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32
    )
    ends_E = jnp.minimum(jnp.cumsum(counts_E), num_rows)
    return SortedRoutes(
        rows=RouteRows(route_of_row[:num_rows], jnp.minimum(row_of_route, num_rows).reshape(M, A)),
        rows_per_expert_E=jnp.diff(ends_E, prepend=0),
        overflowed=jnp.sum(counts_E) - ends_E[-1],
    )


def buffer_rows(
    num_tokens: int, A: int, num_experts: int, num_places: int, buffer_factor: float | None
) -> int:
    """Room in a buffer for the routes of `num_tokens` tokens to one of `num_places` that share the
    experts.

    All that there can be, since a token goes to an expert once; or `buffer_factor` times those of a
    balanced routing, if that is less.
    """
    worst = num_tokens * min(A, num_experts // num_places)
    balanced = num_tokens * A / num_places
    return (
        worst if buffer_factor is None else min(worst, math.ceil(buffer_factor * balanced - 1e-9))
    )


def starts_of(counts_XE: jax.Array) -> jax.Array:
    """Where each count begins when all are laid end to end along the last dimension."""
    return jnp.cumsum(counts_XE, axis=-1) - counts_XE


@jax.custom_vjp
def copy_rows(x_MD: jax.Array, rows: RowMap) -> jax.Array:
    """The source of each row, [R, D]. Transpose: `sum_rows`."""
    return x_MD[rows.source_R]


@jax.custom_vjp
def sum_rows(y_RD: jax.Array, rows: RowMap) -> jax.Array:
    """The sum of each source's rows, [M, D], in float32.

    The transpose of `copy_rows`, and a gather too.
    """
    y_MAD = y_RD.at[rows.row_MA].get(mode="fill", fill_value=0)
    return jnp.sum(y_MAD, axis=1, dtype=jnp.float32).astype(y_RD.dtype)


# Autodiff would make a scatter-add of each gather; that each is the other's transpose is known only
# here.
copy_rows.defvjp(
    lambda x_MD, rows: (copy_rows(x_MD, rows), rows),
    lambda rows, dx_RD: (sum_rows(dx_RD, rows), None),
)
sum_rows.defvjp(
    lambda y_RD, rows: (sum_rows(y_RD, rows), rows),
    lambda rows, dy_MD: (copy_rows(dy_MD, rows), None),
)
