"""Transport by ragged all-to-all: only the routed rows move.

XLA:CPU lacks this collective, so a stand-in is compiled there. It is here and not in `kernels`,
because it is a collective too.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.model.dispatch.rows import (
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
class Slices:
    """Arguments of `jax.lax.ragged_all_to_all`: a slice per peer and expert of the receiver."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Journey:
    sent: RowMap  # tokens -> rows sorted by expert
    there: Slices
    back: Slices


@dataclasses.dataclass(frozen=True)
class RaggedAllToAll:
    """Moves k(P-1)/P rows per token each way. Rows arrive sorted by expert.

    By default the receive buffer of a device has room for the worst case, min(P, E/k) times the
    rows of balanced routing. With `buffer_factor` it holds this multiple of them. The rows of the
    last experts overflow first, and among these the rows of the last peers.
    """

    num_experts: int
    buffer_factor: float | None

    def out(
        self, x_MD: jax.Array, weights_MA: jax.Array, chosen_MA: jax.Array
    ) -> tuple[Arrival, _Journey]:
        """The rows of this device's experts, and what `home` needs to send them back."""
        (M, A), P = chosen_MA.shape, jax.lax.axis_size("expert")
        num_local = self.num_experts // P
        num_rows = buffer_rows(P * M, A, self.num_experts, P, self.buffer_factor)
        routes = sort_routes(chosen_MA, self.num_experts, M * A)
        of_tokens = routes.rows.of_tokens()
        wanted_PE = jax.lax.all_gather(routes.rows_per_expert_E, "expert")
        there, back = plan_slices(wanted_PE, num_local, num_rows)
        x_RD = exchange(copy_rows(x_MD, of_tokens), there, back, num_rows)
        weight_R1 = exchange(
            copy_rows(weights_MA.reshape(-1, 1), routes.rows.of_routes()), there, back, num_rows
        )
        rows_per_expert_E = jnp.sum(there.recv_sizes.reshape(P, num_local), axis=0)
        overflowed = jnp.sum(routes.rows_per_expert_E) - jnp.sum(there.send_sizes)
        return Arrival(x_RD, weight_R1, rows_per_expert_E, overflowed), _Journey(
            of_tokens, there, back
        )

    def home(self, y_RD: jax.Array, journey: _Journey) -> jax.Array:
        """Sends rows back to where they came from and sums them for each token: [M, D]."""
        num_routes = len(journey.sent.source_R)
        return sum_rows(exchange(y_RD, journey.back, journey.there, num_routes), journey.sent)


def plan_slices(wanted_PE: jax.Array, num_local: int, num_rows: int) -> tuple[Slices, Slices]:
    """The slices of both directions for this place on the `expert` axis: out, and back home.

    `wanted_PE` is the number of rows from each place to each of all experts. The receiver has rows
    sorted by expert and then by the place they came from. Rows past `num_rows` are not sent.
    """
    P = len(wanted_PE)
    me = jax.lax.axis_index("expert")
    at_sender_PE = starts_of(wanted_PE)
    # Sorted by receiver, then by its experts, then by sender.
    by_receiver = wanted_PE.reshape(P, P, num_local).transpose(1, 2, 0).reshape(P, -1)
    at_receiver_PE = (
        starts_of(by_receiver).reshape(P, num_local, P).transpose(2, 0, 1).reshape(P, -1)
    )
    sizes_PE = jnp.clip(num_rows - at_receiver_PE, 0, wanted_PE)
    at_receiver_PE = jnp.minimum(at_receiver_PE, num_rows)

    def for_me(x_PE: jax.Array) -> jax.Array:
        """The entries of this place's experts, by sender."""
        return jax.lax.dynamic_slice_in_dim(x_PE, me * num_local, num_local, axis=1).reshape(-1)

    there = Slices(at_sender_PE[me], sizes_PE[me], at_receiver_PE[me], for_me(sizes_PE))
    back = Slices(for_me(at_receiver_PE), for_me(sizes_PE), for_me(at_sender_PE), sizes_PE[me])
    return there, back


def exchange(x_SD: jax.Array, slices: Slices, reverse: Slices, num_rows: int) -> jax.Array:
    """Sends slices of rows to their place in [num_rows, D], which is zero elsewhere.

    Its transpose is the exchange with `slices` and `reverse` swapped.
    """
    return _exchange(x_SD, slices, reverse, num_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchange(x_SD: jax.Array, slices: Slices, reverse: Slices, num_rows: int) -> Any:
    empty_RD = jnp.zeros_like(x_SD, shape=(num_rows, x_SD.shape[1]))
    # XLA:CPU has no ragged all-to-all (jax issue 34755), so only there a stand-in runs.
    return jax.lax.platform_dependent(
        x_SD, empty_RD, *dataclasses.astuple(slices), cpu=emulate_ragged_all_to_all, default=_native
    )


_exchange.defvjp(
    lambda x_SD, slices, reverse, num_rows: (
        exchange(x_SD, slices, reverse, num_rows),
        (slices, reverse, len(x_SD)),
    ),
    lambda num_rows, saved, dy_RD: (exchange(dy_RD, saved[1], saved[0], saved[2]), None, None),
)


def _native(x_SD: jax.Array, empty_RD: jax.Array, *slices: jax.Array) -> jax.Array:
    return jax.lax.ragged_all_to_all(x_SD, empty_RD, *slices, axis_name="expert")


def emulate_ragged_all_to_all(
    x_SD: jax.Array,
    output_RD: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
) -> jax.Array:
    """Does what `jax.lax.ragged_all_to_all` over `expert` does, by gathering everything.

    Where the sizes of sender and receiver differ, which is undefined, rows become NaN.
    """
    P, S = jax.lax.axis_size("expert"), len(x_SD)
    me = jax.lax.axis_index("expert")
    per_peer = len(send_sizes) // P

    def sent_to_me(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x.reshape(P, per_peer), "expert")[:, me].reshape(1, -1)

    begin, size, source = map(sent_to_me, (output_offsets, send_sizes, input_offsets))
    row_R1, expected = jnp.arange(len(output_RD))[:, None], recv_sizes[None]
    is_in = (row_R1 >= begin) & (row_R1 < begin + jnp.maximum(size, expected))
    sender = (jnp.arange(P * per_peer) // per_peer)[None]
    index_R = jnp.sum(jnp.where(is_in, sender * S + source + row_R1 - begin, 0), axis=1)
    everything = jax.lax.all_gather(x_SD, "expert", tiled=True)
    received_RD = jnp.where(
        jnp.any(is_in & (size != expected), axis=1, keepdims=True), jnp.nan, everything[index_R]
    )
    return jnp.where(jnp.any(is_in, axis=1, keepdims=True), received_RD, output_RD)
