"""Copies tokens into rows sorted by expert, and sums rows back to tokens, all on one device."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMap:
    """Rows that are copies of sources, indexed in both directions.

    Every source has at most A copies. A row that copies no source has any index in `source_R`; its
    content is never read.
    """

    source_R: jax.Array
    row_MA: jax.Array  # the rows of each source; R where there is no copy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouteRows:
    """Rows that hold a device's M * A routes, indexed in both directions."""

    route_R: jax.Array
    row_MA: jax.Array  # R for a route without a row

    def of_tokens(self) -> RowMap:
        """The rows as copies of tokens."""
        return RowMap(self.route_R // self.row_MA.shape[1], self.row_MA)

    def of_routes(self) -> RowMap:
        """The rows as copies of routes, for their weights."""
        return RowMap(self.route_R, self.row_MA.reshape(-1, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SortedRoutes:
    """A device's routes sorted by expert and then by token. The first R of them have a row."""

    rows: RouteRows
    rows_per_expert_E: jax.Array
    overflowed: jax.Array  # number of routes that found no row


def sort_routes(expert_MA: jax.Array, num_experts: int, num_rows: int) -> SortedRoutes:
    """Assigns rows to routes. A route to expert `num_experts` goes nowhere and gets no row."""
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
    """Rows in a buffer for the routes of `num_tokens` tokens to one of `num_places` places.

    It has room for the worst case, in which each token visits the maximum number of the place's
    experts, or for `buffer_factor` times the rows of balanced routing if that is less.
    """
    worst = num_tokens * min(A, num_experts // num_places)
    balanced = num_tokens * A / num_places
    return (
        worst if buffer_factor is None else min(worst, math.ceil(buffer_factor * balanced - 1e-9))
    )


def starts_of(counts_XE: jax.Array) -> jax.Array:
    """Exclusive cumulative sums: where each group starts if groups of these sizes have no gaps."""
    return jnp.cumsum(counts_XE, axis=-1) - counts_XE


@jax.custom_vjp
def copy_rows(x_MD: jax.Array, rows: RowMap) -> jax.Array:
    """Copies the source of each row: [R, D]. Its transpose is `sum_rows`."""
    return x_MD[rows.source_R]


@jax.custom_vjp
def sum_rows(y_RD: jax.Array, rows: RowMap) -> jax.Array:
    """Sums the rows of each source in float32: [M, D]. Its transpose is `copy_rows`.

    It is a gather, as `copy_rows` is.
    """
    y_MAD = y_RD.at[rows.row_MA].get(mode="fill", fill_value=0)
    return jnp.sum(y_MAD, axis=1, dtype=jnp.float32).astype(y_RD.dtype)


# Autodiff would turn each gather into a scatter-add. It cannot know that each of the two functions
# is the transpose of the other.
copy_rows.defvjp(
    lambda x_MD, rows: (copy_rows(x_MD, rows), rows),
    lambda rows, dx_RD: (sum_rows(dx_RD, rows), None),
)
sum_rows.defvjp(
    lambda y_RD, rows: (sum_rows(y_RD, rows), rows),
    lambda rows, dy_MD: (copy_rows(dy_MD, rows), None),
)
