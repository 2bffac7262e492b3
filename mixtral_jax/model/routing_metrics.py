"""Metrics of routing, from the sums that the losses are computed from. No loss uses them."""

import jax
import jax.numpy as jnp

from mixtral_jax.model.balance import RoutingSums


def router_metrics(sums: RoutingSums) -> dict[str, jax.Array]:
    """Metrics of sums stacked to [L, ...]: each is [L], but `load` is [L, E].

    n_e is the number of routes to expert e, before any are dropped:

        load: n_e as a share of all routes; sums to 1
        coefficient_of_variation: standard deviation of n_e over its mean
        max_violation: max n_e / mean n_e - 1; 0 when even
        min_load: min n_e / mean n_e
        dead_experts: number of experts without a route
        load_entropy: entropy of the load, divided by log E; 1 when even
        gate_entropy: mean entropy of a token's probabilities, divided by log E
        top1_margin: mean of the best probability minus the second best
        logit_rms, logit_max: root mean square and largest absolute value of the logits
        dropped_fraction: share of the routes that were over capacity
        overflowed_fraction: share of the routes that found no room in a receive buffer
        device_imbalance: max_violation of the places of the current mesh's expert axis
    """
    E = sums.load_E.shape[-1]
    routes_L = jnp.maximum(jnp.sum(sums.load_E, axis=-1), 1)
    tokens_L = jnp.maximum(sums.tokens, 1)
    share_LE = sums.load_E / routes_L[:, None]
    entropy_L = -jnp.sum(jax.scipy.special.xlogy(share_LE, share_LE), axis=-1)
    return {
        "load": share_LE,
        "coefficient_of_variation": jnp.std(share_LE, axis=-1) * E,
        "max_violation": max_violation(share_LE),
        "min_load": jnp.min(share_LE, axis=-1) * E,
        "dead_experts": jnp.sum(sums.load_E == 0, axis=-1, dtype=jnp.float32),
        "load_entropy": entropy_L / jnp.log(max(E, 2)),
        "gate_entropy": sums.entropy / tokens_L,
        "top1_margin": sums.margin / tokens_L,
        "logit_rms": jnp.sqrt(sums.squared_logits / tokens_L),
        "logit_max": sums.largest_logit,
        "dropped_fraction": sums.dropped / routes_L,
        "overflowed_fraction": sums.overflowed / routes_L,
        "device_imbalance": max_violation(_sum_over_places(share_LE)),
    }


def name_metrics(figures: dict[str, jax.Array], prefix: str = "") -> dict[str, jax.Array]:
    """Metrics [L, ...] by the names they are logged under.

    `router/NAME` is the mean over layers, `router/layer_NN/NAME` the value of one layer.
    """
    named = {}
    for name, value_L in figures.items():
        named[f"{prefix}router/{name}"] = jnp.mean(value_L, axis=0)
        named |= {
            f"{prefix}router/layer_{layer:02d}/{name}": value for layer, value in enumerate(value_L)
        }
    return named


def max_violation(load_LE: jax.Array) -> jax.Array:
    """max n_e / mean n_e - 1 of each layer (arXiv 2408.15664, eq. 4); 0 if there is no load."""
    total_L = jnp.sum(load_LE, axis=-1)
    has_load_L = total_L > 0
    largest_L = jnp.max(load_LE, axis=-1)
    return largest_L * load_LE.shape[-1] / jnp.where(has_load_L, total_L, 1) - has_load_L


def _sum_over_places(load_LE: jax.Array) -> jax.Array:
    """The load of all experts at each place of the expert axis."""
    num_places = jax.sharding.get_abstract_mesh().shape.get("expert", 1)
    return jnp.sum(load_LE.reshape(len(load_LE), num_places, -1), axis=-1)
