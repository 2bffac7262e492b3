"""How many routes of a sequence an expert takes, and which: decided before any row moves.

Decided per sequence, so that neither the mesh nor the transport changes what is dropped.
"""

import jax
import jax.numpy as jnp
import numpy as np


def fits_capacity(
    experts_BTA: jax.Array,
    weights_BTA: jax.Array,
    is_real_BT: jax.Array,
    num_experts: int,
    capacity_factor: float,
) -> jax.Array:
    """Which routes are within their expert's capacity, [B, T, A] bool.

    An expert takes at most ceil(capacity_factor * k * n / E) routes from a sequence of n real
    tokens, those of highest weight first, ties by position. Weights are compared to 16 bits after
    the point: the first tokens of the documents of a row are often one token, whose weights would
    tie but for rounding.
    """
    _, T, A = experts_BTA.shape
    # A table, in float64, less what rounding may add to a product that is whole (1.1 * 2 * 200 / 8
    # = 55).
    capacity_of_n = np.ceil(capacity_factor * A * np.arange(T + 1) / num_experts - 1e-9).astype(
        np.int32
    )
    capacity_B1 = jnp.asarray(capacity_of_n)[
        jnp.sum(is_real_BT, axis=1, keepdims=True, dtype=jnp.int32)
    ]
    rounded_BTA = jnp.round(weights_BTA * 2**16)
    return (
        rank_in_expert(experts_BTA, rounded_BTA, is_real_BT, num_experts) < capacity_B1[..., None]
    )


def rank_in_expert(
    experts_BTA: jax.Array, weights_BTA: jax.Array, is_real_BT: jax.Array, num_experts: int
) -> jax.Array:
    """The place of each route among those of its expert and sequence, by weight, from 0, [B, T, A]
    int32.
    """
    _, T, A = experts_BTA.shape

    def rank_in_sequence(
        experts_TA: jax.Array, weights_TA: jax.Array, is_real_T: jax.Array
    ) -> jax.Array:
        expert_R = jnp.where(is_real_T[:, None], experts_TA, num_experts).reshape(-1)
        index_R = jnp.arange(T * A)
        sorted_R, _, order_R = jax.lax.sort(
            (expert_R, -weights_TA.reshape(-1), index_R), num_keys=2, is_stable=True
        )
        start_R = jnp.searchsorted(sorted_R, sorted_R, side="left")
        _, rank_R = jax.lax.sort((order_R, index_R - start_R), num_keys=1)
        return rank_R.reshape(T, A)

    return jax.vmap(rank_in_sequence)(experts_BTA, weights_BTA, is_real_BT)
