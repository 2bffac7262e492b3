"""Routing losses and metrics, formed from masked sums that each layer returns.

Layers return sums, not losses, because transformers' loss pools the layers before it multiplies:
no scalar a layer could give it. Sums run over every real token on every device, so what is formed
from them does not depend on the mesh.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingSums:
    """Sums over real tokens, float32; stacked over layers they gain a leading L."""

    load_E: jax.Array  # routes to each expert, before any are dropped
    probability_E: jax.Array  # softmax over all experts
    squared_logsumexp: jax.Array
    dropped: jax.Array  # routes over capacity
    overflowed: jax.Array  # routes that found no room on their way: for `dispatch` to count
    tokens: jax.Array


def sum_routing(
    logits_BTE: jax.Array, experts_BTA: jax.Array, is_kept_BTA: jax.Array, is_real_BT: jax.Array
) -> RoutingSums:
    """The sums of one layer; padding adds nothing. No gradient flows through counts."""
    E = logits_BTE.shape[-1]
    real_BT = is_real_BT.astype(jnp.float32)
    chosen_BTE = jnp.sum(experts_BTA[..., None] == jnp.arange(E)[None, None, None], axis=2, dtype=jnp.float32)
    dropped_BT = jnp.sum(~is_kept_BTA, axis=-1, dtype=jnp.float32)
    return RoutingSums(
        load_E=jnp.sum(chosen_BTE * real_BT[..., None], axis=(0, 1)),
        probability_E=jnp.sum(jax.nn.softmax(logits_BTE) * real_BT[..., None], axis=(0, 1)),
        squared_logsumexp=jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real_BT),
        dropped=jnp.sum(dropped_BT * real_BT),
        overflowed=jnp.zeros(()),
        tokens=jnp.sum(real_BT),
    )


def load_balance_loss(sums: RoutingSums, normalization: Literal["switch", "hf"]) -> jax.Array:
    """The auxiliary loss, from sums stacked to [L, ...]; a scalar, before its weight.

    With f_e the share of routes to expert e and P_e its mean probability, `switch` is
    E * sum_e f_e P_e of each layer, averaged over layers: 1 at perfect balance (Switch Transformer,
    arXiv 2101.03961, eq. 4, with f over k). `hf` pools the layers into one f and one P, with f
    counted per token and not per route, as `load_balancing_loss_func` of transformers does: k at
    perfect balance.
    """
    E = sums.load_E.shape[-1]
    if normalization == "hf":
        tokens = jnp.maximum(jnp.sum(sums.tokens), 1)
        return E * jnp.sum(jnp.sum(sums.load_E, 0) / tokens * jnp.sum(sums.probability_E, 0) / tokens)
    tokens_L1 = jnp.maximum(sums.tokens, 1)[:, None]
    load_LE = sums.load_E / jnp.maximum(jnp.sum(sums.load_E, axis=-1, keepdims=True), 1)
    return jnp.mean(E * jnp.sum(load_LE * sums.probability_E / tokens_L1, axis=-1))


def router_z_loss(sums: RoutingSums) -> jax.Array:
    """Mean squared log-partition of the router logits, averaged over layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return jnp.mean(sums.squared_logsumexp / jnp.maximum(sums.tokens, 1))


def router_metrics(sums: RoutingSums) -> dict[str, jax.Array]:
    """What to watch, each [L]: figures of the load n_e = routes to expert e, before drops.

    `load` is the share of each expert, [L, E], which sums to 1; `max_violation` is max n_e / mean n_e - 1
    (0 when even), `min_load` is min n_e / mean n_e; `load_entropy` is over log E (1 when even);
    `dropped_fraction` and `overflowed_fraction` are of all routes; `dead_experts` counts those without a token.
    """
    E = sums.load_E.shape[-1]
    routes_L1 = jnp.maximum(jnp.sum(sums.load_E, axis=-1, keepdims=True), 1)
    share_LE = sums.load_E / routes_L1
    return {
        "load": share_LE,
        "max_violation": jnp.max(share_LE, axis=-1) * E - 1,
        "min_load": jnp.min(share_LE, axis=-1) * E,
        "load_entropy": -jnp.sum(jax.scipy.special.xlogy(share_LE, share_LE), axis=-1) / jnp.log(max(E, 2)),
        "dropped_fraction": sums.dropped / routes_L1[:, 0],
        "overflowed_fraction": sums.overflowed / routes_L1[:, 0],
        "dead_experts": jnp.sum(sums.load_E == 0, axis=-1, dtype=jnp.float32),
    }
