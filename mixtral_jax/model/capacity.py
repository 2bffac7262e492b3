"""How many routes of a sequence an expert takes, and which ones: decided before any row moves.

It is decided per sequence, so neither the mesh nor the transport changes what is dropped.
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
    """True for routes within the capacity of their expert, [B, T, A].

    An expert takes at most ceil(capacity_factor * k * n / E) routes from a sequence of n real
    tokens: those of highest weight first, ties by position. Weights are compared to 16 bits after
    the point, because the documents of a row often begin with the same token: such weights are
    equal except for rounding, which must not decide.
    """
    _, T, A = experts_BTA.shape
    # A table by number of tokens, in float64. Rounding may lift a whole product such as
    # 1.1 * 2 * 200 / 8 = 55 slightly, and ceil must not make 56 of it.
    routes_n = capacity_factor * A * np.arange(T + 1) / num_experts
    capacity_n = np.ceil(routes_n - 1e-9).astype(np.int32)
    num_tokens_B1 = jnp.sum(is_real_BT, axis=1, keepdims=True, dtype=jnp.int32)
    capacity_B1 = jnp.asarray(capacity_n)[num_tokens_B1]
    rounded_BTA = jnp.round(weights_BTA * 2**16)
    rank_BTA = rank_in_expert(experts_BTA, rounded_BTA, is_real_BT, num_experts)
    return rank_BTA < capacity_B1[..., None]


def rank_in_expert(
    experts_BTA: jax.Array, weights_BTA: jax.Array, is_real_BT: jax.Array, num_experts: int
) -> jax.Array:
    """The rank of each route by weight within its expert and sequence, from 0: [B, T, A] int32."""
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
