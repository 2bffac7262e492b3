"""Metrics of routing, from the sums that the losses are computed from. No loss uses them."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from mixtral_jax.model.balance import RoutingSums

# The formulas of the load serve two callers: the sums of a step, on the devices in float32, and the
# whole counts of a text, on the host in float64.
ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)


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
    routes_L = jnp.maximum(jnp.sum(sums.load_E, axis=-1), 1)
    tokens_L = jnp.maximum(sums.tokens, 1)
    of_load = load_metrics(sums.load_E)
    return {
        **of_load,
        "gate_entropy": sums.entropy / tokens_L,
        "top1_margin": sums.margin / tokens_L,
        "logit_rms": jnp.sqrt(sums.squared_logits / tokens_L),
        "logit_max": sums.largest_logit,
        "dropped_fraction": sums.dropped / routes_L,
        "overflowed_fraction": sums.overflowed / routes_L,
        "device_imbalance": max_violation(_sum_over_places(of_load["load"])),
    }


def load_metrics(load_LE: ArrayT) -> dict[str, ArrayT]:
    """The first six of `router_metrics`, from the number of routes to each expert.

    For a numpy array numpy computes them: float32 could not hold all int64 counts.
    """
    xp: Any = load_LE.__array_namespace__()
    xlogy = jax.scipy.special.xlogy if xp is jnp else scipy.special.xlogy
    E = load_LE.shape[-1]
    routes_L = xp.maximum(xp.sum(load_LE, axis=-1), 1)
    share_LE = load_LE / routes_L[:, None]
    entropy_L = -xp.sum(xlogy(share_LE, share_LE), axis=-1)
    return {
        "load": share_LE,
        "coefficient_of_variation": xp.std(share_LE, axis=-1) * E,
        "max_violation": max_violation(share_LE),
        "min_load": xp.min(share_LE, axis=-1) * E,
        "dead_experts": xp.sum(load_LE == 0, axis=-1, dtype=xp.float32),
        "load_entropy": entropy_L / xp.log(max(E, 2)),
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


def max_violation(load_LE: ArrayT) -> ArrayT:
    """max n_e / mean n_e - 1 of each layer (arXiv 2408.15664, eq. 4); 0 if there is no load."""
    xp: Any = load_LE.__array_namespace__()
    total_L = xp.sum(load_LE, axis=-1)
    has_load_L = total_L > 0
    largest_L = xp.max(load_LE, axis=-1)
    return largest_L * load_LE.shape[-1] / xp.where(has_load_L, total_L, 1) - has_load_L


def _sum_over_places(load_LE: jax.Array) -> jax.Array:
    """The load of all experts at each place of the expert axis."""
    num_places = jax.sharding.get_abstract_mesh().shape.get("expert", 1)
    return jnp.sum(load_LE.reshape(len(load_LE), num_places, -1), axis=-1)
