"""Routing losses, and the sums that they are computed from.

Layers return sums rather than losses, because the loss of transformers pools the layers before it
multiplies: no scalar per layer could give it. Sums run over every real token on every device, so
losses and metrics do not depend on the mesh.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from mixtral_jax.model.router import SMALLEST_SUM, Routes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingSums:
    """Sums over the real tokens of one layer, float32; for all layers they have a leading L.

    Gradients flow through the first three. `add_sums` adds micro-batches.
    """

    probability_E: jax.Array  # scores of all experts, divided by their sum
    squared_logsumexp: jax.Array
    sequence_balance: jax.Array  # n * E * sum_e f_e P_e of a sequence of n tokens
    load_E: jax.Array  # routes to each expert, before any are dropped
    dropped: jax.Array  # routes over capacity
    overflowed: jax.Array  # routes that found no room in a receive buffer
    tokens: jax.Array
    entropy: jax.Array  # entropy of a token's probabilities, divided by log E
    margin: jax.Array  # best probability minus the second best
    squared_logits: jax.Array  # mean over experts of the squared logits
    largest_logit: jax.Array  # largest absolute value; not a sum


@jax.named_scope("router")
def sum_routing(routes: Routes, is_real_BT: jax.Array, overflowed: jax.Array) -> RoutingSums:
    """Sums the routes of one layer over its real tokens. No gradient flows through counts.

    `overflowed` is the number of routes that found no room in a receive buffer of `dispatch`.
    """
    E = routes.logits_BTE.shape[-1]
    real_BT1 = is_real_BT.astype(jnp.float32)[..., None]
    is_route_BTAE = routes.experts_BTA[..., None] == jnp.arange(E)[None, None, None]
    is_chosen_BTAE = is_route_BTAE & routes.is_chosen_BTA[..., None]
    load_BE = jnp.sum(is_chosen_BTAE, axis=(1, 2), dtype=jnp.float32)
    total_BT1 = jnp.sum(routes.scores_BTE, axis=-1, keepdims=True)
    probability_BTE = routes.scores_BTE / jnp.maximum(total_BT1, SMALLEST_SUM) * real_BT1
    probability_BE = jnp.sum(probability_BTE, axis=1)
    routes_B1 = jnp.maximum(jnp.sum(load_BE, axis=-1, keepdims=True), 1)
    logits_BTE = jnp.where(real_BT1 > 0, routes.logits_BTE, 0)
    squared_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real_BT1[..., 0]
    is_dropped_BTA = routes.is_chosen_BTA & ~routes.is_kept_BTA
    return RoutingSums(
        probability_E=jnp.sum(probability_BE, axis=0),
        squared_logsumexp=jnp.sum(squared_BT),
        sequence_balance=jnp.sum(E * load_BE / routes_B1 * probability_BE),
        load_E=jnp.sum(load_BE, axis=0),
        dropped=jnp.sum(is_dropped_BTA, dtype=jnp.float32),
        overflowed=overflowed.astype(jnp.float32),
        tokens=jnp.sum(real_BT1),
        **_sum_figures(*jax.lax.stop_gradient((logits_BTE, probability_BTE))),
    )


def _sum_figures(logits_BTE: jax.Array, probability_BTE: jax.Array) -> dict[str, jax.Array]:
    """Sums for metrics that no loss uses; both arrays are 0 at padding."""
    E = logits_BTE.shape[-1]
    is_best_BTE = jnp.argmax(probability_BTE, axis=-1, keepdims=True) == jnp.arange(E)[None, None]
    second_BT = jnp.max(jnp.where(is_best_BTE, 0, probability_BTE), axis=-1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(probability_BTE, probability_BTE))
    return {
        "entropy": entropy / jnp.log(max(E, 2)),
        "margin": jnp.sum(jnp.max(probability_BTE, axis=-1) - second_BT),
        "squared_logits": jnp.sum(jnp.square(logits_BTE)) / E,
        "largest_logit": jnp.max(jnp.abs(logits_BTE)),
    }


def add_sums(one: RoutingSums, other: RoutingSums) -> RoutingSums:
    """Adds the sums of two sets of tokens."""
    added = jax.tree.map(jnp.add, one, other)
    return dataclasses.replace(
        added, largest_logit=jnp.maximum(one.largest_logit, other.largest_logit)
    )


def load_balance_loss(
    sums: RoutingSums, normalization: Literal["switch", "hf"], load_of: RoutingSums | None = None
) -> jax.Array:
    """The auxiliary loss of sums stacked to [L, ...]: a scalar, before its weight.

    f_e is the share of routes to expert e, and P_e its mean probability.

    Args:
        normalization: `switch` is E * sum_e f_e P_e averaged over layers, 1 at perfect balance
            (Switch Transformer, arXiv 2101.03961, eq. 4, with f divided by k). `hf` pools the
            layers into one f and one P, and counts f per token instead of per route, as
            `load_balancing_loss_func` of transformers does: k at perfect balance.
        load_of: the sums that f is computed from. By default these are `sums`; pass those of the
            whole step to balance all its micro-batches together (arXiv 2501.11873). The average
            over micro-batches, weighted by tokens, is then the loss of one big batch.
    """
    E = sums.load_E.shape[-1]
    counted = load_of or sums
    if normalization == "hf":
        share_E = jnp.sum(counted.load_E, 0) / jnp.maximum(jnp.sum(counted.tokens), 1)
        num_tokens = jnp.maximum(jnp.sum(sums.tokens), 1)
        return E * jnp.sum(share_E * jnp.sum(sums.probability_E, 0) / num_tokens)
    tokens_L1 = jnp.maximum(sums.tokens, 1)[:, None]
    load_LE = counted.load_E / jnp.maximum(jnp.sum(counted.load_E, axis=-1, keepdims=True), 1)
    return jnp.mean(E * jnp.sum(load_LE * sums.probability_E / tokens_L1, axis=-1))


def sequence_balance_loss(sums: RoutingSums) -> jax.Array:
    """The `switch` loss of each sequence, averaged over tokens and then over layers.

    Source: DeepSeek-V3, arXiv 2412.19437, eq. 17.
    """
    return jnp.mean(sums.sequence_balance / jnp.maximum(sums.tokens, 1))


def router_z_loss(sums: RoutingSums) -> jax.Array:
    """Mean squared log-partition of the router logits, averaged over layers.

    Source: ST-MoE, arXiv 2202.08906, eq. 5.
    """
    return jnp.mean(sums.squared_logsumexp / jnp.maximum(sums.tokens, 1))


def next_bias(
    bias_LE: jax.Array, load_LE: jax.Array, rate: jax.typing.ArrayLike, *, is_zero_mean: bool
) -> jax.Array:
    """The balance bias after a step with loads `load_LE`: it rises where a load is under the mean.

    b + rate * sign(mean n - n) (arXiv 2408.15664, algorithm 1). `is_zero_mean` then subtracts the
    mean over experts.
    """
    mean_L1 = jnp.mean(load_LE, axis=-1, keepdims=True)
    bias_LE += rate * jnp.sign(mean_L1 - load_LE)
    return bias_LE - jnp.mean(bias_LE, axis=-1, keepdims=True) if is_zero_mean else bias_LE
