"""What to watch of routing, from the sums that the losses are formed from; nothing here is learned
from.
"""

import jax
import jax.numpy as jnp

from mixtral_jax.model.balance import RoutingSums


def router_metrics(sums: RoutingSums) -> dict[str, jax.Array]:
    """Figures of sums stacked to [L, ...], each [L]: of the load n_e = routes to expert e, before
    drops.

    `load` is the share of each expert, [L, E], which sums to 1; `coefficient_of_variation` is its
    standard deviation over its mean; `max_violation` is max n_e / mean n_e - 1 (0 when even),
    `min_load` is min n_e / mean n_e; `dead_experts` counts those without a token; `load_entropy` is
    over log E (1 when even), and so is `gate_entropy`, the mean entropy of a token's probabilities;
    `top1_margin` is the mean of the best less the second of them; `logit_rms` and `logit_max` are
    of the logits' sizes; `dropped_fraction` and `overflowed_fraction` are of all routes.
    `device_imbalance` is the max violation of the shards of the expert axis, of the mesh in force.
    """
    E = sums.load_E.shape[-1]
    routes_L = jnp.maximum(jnp.sum(sums.load_E, axis=-1), 1)
    tokens_L = jnp.maximum(sums.tokens, 1)
    share_LE = sums.load_E / routes_L[:, None]
    return {
        "load": share_LE,
        "coefficient_of_variation": jnp.std(share_LE, axis=-1) * E,
        "max_violation": max_violation(share_LE),
        "min_load": jnp.min(share_LE, axis=-1) * E,
        "dead_experts": jnp.sum(sums.load_E == 0, axis=-1, dtype=jnp.float32),
        "load_entropy": -jnp.sum(jax.scipy.special.xlogy(share_LE, share_LE), axis=-1)
        / jnp.log(max(E, 2)),
        "gate_entropy": sums.entropy / tokens_L,
        "top1_margin": sums.margin / tokens_L,
        "logit_rms": jnp.sqrt(sums.squared_logits / tokens_L),
        "logit_max": sums.largest_logit,
        "dropped_fraction": sums.dropped / routes_L,
        "overflowed_fraction": sums.overflowed / routes_L,
        "device_imbalance": max_violation(_of_shards(share_LE)),
    }


def name_metrics(figures: dict[str, jax.Array], prefix: str = "") -> dict[str, jax.Array]:
    """Figures, each [L, ...], by the names they are logged under: means over layers and,
    `layer_NN/`, each.
    """
    named = {}
    for name, value_L in figures.items():
        named[f"{prefix}router/{name}"] = jnp.mean(value_L, axis=0)
        named |= {
            f"{prefix}router/layer_{layer:02d}/{name}": value for layer, value in enumerate(value_L)
        }
    return named


def max_violation(load_LE: jax.Array) -> jax.Array:
    """max n_e / mean n_e - 1 of each layer (arXiv 2408.15664, eq. 4); 0 where there is no load."""
    total_L = jnp.sum(load_LE, axis=-1)
    return jnp.max(load_LE, axis=-1) * load_LE.shape[-1] / jnp.where(total_L > 0, total_L, 1) - (
        total_L > 0
    )


def _of_shards(load_LE: jax.Array) -> jax.Array:
    """Of the experts that each device of the expert axis holds, together."""
    num_shards = jax.sharding.get_abstract_mesh().shape.get("expert", 1)
    return jnp.sum(load_LE.reshape(len(load_LE), num_shards, -1), axis=-1)
