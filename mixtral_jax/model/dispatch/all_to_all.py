"""Transport by all-to-all: a buffer of fixed size for each peer, which rows may fill or not."""

import dataclasses

import jax
import jax.numpy as jnp

from mixtral_jax.model.dispatch.rows import (
    RouteRows,
    RowMap,
    buffer_rows,
    copy_rows,
    sort_routes,
    starts_of,
    sum_rows,
)
from mixtral_jax.model.dispatch.transport import Arrival


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Journey:
    sent: RowMap  # tokens -> rows of the buffers to the peers
    packed: RowMap  # rows of the buffers from the peers -> rows without gaps, by expert


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """Works on every back end, and moves whole buffers, full or not.

    By default a peer's buffer has room for every token, the worst case. With `buffer_factor` it
    holds this multiple of the rows of balanced routing. The rows of the peer's last experts and
    tokens overflow first.
    """

    num_experts: int
    buffer_factor: float | None

    def out(
        self, x_MD: jax.Array, weights_MA: jax.Array, chosen_MA: jax.Array
    ) -> tuple[Arrival, _Journey]:
        """The rows of this device's experts, and the maps that `home` needs."""
        (M, A), P = chosen_MA.shape, jax.lax.axis_size("expert")
        num_local = self.num_experts // P
        C = buffer_rows(M, A, self.num_experts, P, self.buffer_factor)
        routes = sort_routes(chosen_MA, self.num_experts, M * A)
        wanted_PE = routes.rows_per_expert_E.reshape(P, num_local)
        counts_PE = jnp.clip(C - starts_of(wanted_PE), 0, wanted_PE)
        buffers = _fill_buffers(routes.rows, jnp.sum(wanted_PE, axis=1), chosen_MA // num_local, C)
        arriving_PE = _exchange(counts_PE)
        packed = _pack(arriving_PE, C)
        sent = buffers.of_tokens()
        x_RD = copy_rows(_exchange(copy_rows(x_MD, sent)), packed)
        weight_R1 = copy_rows(
            _exchange(copy_rows(weights_MA.reshape(-1, 1), buffers.of_routes())), packed
        )
        rows_per_expert_E = jnp.sum(arriving_PE, axis=0)
        overflowed = jnp.sum(wanted_PE) - jnp.sum(counts_PE)
        return Arrival(x_RD, weight_R1, rows_per_expert_E, overflowed), _Journey(sent, packed)

    def home(self, y_RD: jax.Array, journey: _Journey) -> jax.Array:
        """Sends rows back through the same buffers and sums them for each token: [M, D]."""
        return sum_rows(_exchange(sum_rows(y_RD, journey.packed)), journey.sent)


def _exchange(x_PX: jax.Array) -> jax.Array:
    """Sends an equal part of the leading dimension to each peer, and gets one from each."""
    return jax.lax.all_to_all(x_PX, "expert", split_axis=0, concat_axis=0, tiled=True)


def _fill_buffers(rows: RouteRows, wanted_P: jax.Array, peer_MA: jax.Array, C: int) -> RouteRows:
    """Places rows without gaps into P buffers of C rows."""
    start_P = starts_of(wanted_P)
    sorted_PC = start_P[:, None] + jnp.arange(C)[None]
    P, num_routes = len(start_P), len(rows.route_R)
    route_R = rows.route_R[jnp.minimum(sorted_PC, num_routes - 1).reshape(-1)]
    is_routed_MA = rows.row_MA < num_routes
    place_MA = rows.row_MA - start_P[jnp.minimum(peer_MA, P - 1)]
    row_MA = jnp.where(is_routed_MA & (place_MA < C), peer_MA * C + place_MA, P * C)
    return RouteRows(route_R, row_MA)


def _pack(counts_PE: jax.Array, C: int) -> RowMap:
    """Maps buffers of C rows, each sorted by expert, to rows sorted by expert and then by peer.

    It needs no sort.
    """
    P, E = counts_PE.shape
    in_buffer_PE = starts_of(counts_PE) + C * jnp.arange(P)[:, None]
    in_row_PE = starts_of(counts_PE.T.reshape(-1)).reshape(E, P).T

    def shift(index_R: jax.Array, from_PE: jax.Array, to_PE: jax.Array, missing: int) -> jax.Array:
        """Moves an index within a segment to its place in the other layout of the segment."""
        begin, end = from_PE.reshape(1, -1), (from_PE + counts_PE).reshape(1, -1)
        is_in_RS = (index_R[:, None] >= begin) & (index_R[:, None] < end)
        moved_R = index_R + jnp.sum(
            jnp.where(is_in_RS, (to_PE - from_PE).reshape(1, -1), 0), axis=1
        )
        return jnp.where(jnp.any(is_in_RS, axis=1), moved_R, missing)

    index_R = jnp.arange(P * C)
    source_R = shift(index_R, in_row_PE, in_buffer_PE, 0)
    return RowMap(source_R, shift(index_R, in_buffer_PE, in_row_PE, P * C)[:, None])
