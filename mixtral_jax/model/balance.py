"""Routing losses, and the sums they are formed from.

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
    """Sums over real tokens, float32; stacked over layers they gain a leading L, and `add_sums`
    adds micro-batches.

    Gradients flow through the first three.
    """

    probability_E: jax.Array  # scores of all experts, made to sum to 1
    squared_logsumexp: jax.Array
    sequence_balance: jax.Array  # n * E * sum_e f_e P_e of each sequence of n tokens
    load_E: jax.Array  # routes to each expert, before any are dropped
    dropped: jax.Array  # routes over capacity
    overflowed: jax.Array  # routes that found no room on their way: for `dispatch` to count
    tokens: jax.Array
    entropy: jax.Array  # of a token's probabilities, over log E
    margin: jax.Array  # best probability less the second
    squared_logits: jax.Array  # mean over experts
    largest_logit: jax.Array  # in size; not a sum


def sum_routing(
    logits_BTE: jax.Array,
    scores_BTE: jax.Array,
    experts_BTA: jax.Array,
    is_chosen_BTA: jax.Array,
    is_kept_BTA: jax.Array,
    is_real_BT: jax.Array,
) -> RoutingSums:
    """The sums of one layer; padding, which is not chosen, adds nothing.

    No gradient flows through counts.
    """
    E = logits_BTE.shape[-1]
    real_BT1 = is_real_BT.astype(jnp.float32)[..., None]
    is_route_BTAE = experts_BTA[..., None] == jnp.arange(E)[None, None, None]
    load_BE = jnp.sum(is_route_BTAE & is_chosen_BTA[..., None], axis=(1, 2), dtype=jnp.float32)
    total_BT1 = jnp.maximum(
        jnp.sum(scores_BTE, axis=-1, keepdims=True), 1e-20
    )  # Sigmoids may all underflow.
    probability_BTE = scores_BTE / total_BT1 * real_BT1
    probability_BE = jnp.sum(probability_BTE, axis=1)
    routes_B1 = jnp.maximum(jnp.sum(load_BE, axis=-1, keepdims=True), 1)
    logits_BTE = jnp.where(real_BT1 > 0, logits_BTE, 0)
    squared_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real_BT1[..., 0]
    return RoutingSums(
        probability_E=jnp.sum(probability_BE, axis=0),
        squared_logsumexp=jnp.sum(squared_BT),
        sequence_balance=jnp.sum(E * load_BE / routes_B1 * probability_BE),
        load_E=jnp.sum(load_BE, axis=0),
        dropped=jnp.sum(is_chosen_BTA & ~is_kept_BTA, dtype=jnp.float32),
        overflowed=jnp.zeros(()),
        tokens=jnp.sum(real_BT1),
        **_sum_figures(*jax.lax.stop_gradient((logits_BTE, probability_BTE))),
    )


def _sum_figures(logits_BTE: jax.Array, probability_BTE: jax.Array) -> dict[str, jax.Array]:
    """What is only looked at; both are 0 at padding."""
    E = logits_BTE.shape[-1]
    is_best_BTE = jnp.argmax(probability_BTE, axis=-1, keepdims=True) == jnp.arange(E)[None, None]
    second_BT = jnp.max(jnp.where(is_best_BTE, 0, probability_BTE), axis=-1)
    return {
        "entropy": -jnp.sum(jax.scipy.special.xlogy(probability_BTE, probability_BTE))
        / jnp.log(max(E, 2)),
        "margin": jnp.sum(jnp.max(probability_BTE, axis=-1) - second_BT),
        "squared_logits": jnp.sum(jnp.square(logits_BTE)) / E,
        "largest_logit": jnp.max(jnp.abs(logits_BTE)),
    }


def add_sums(one: RoutingSums, other: RoutingSums) -> RoutingSums:
    """The sums of both sets of tokens."""
    added = jax.tree.map(jnp.add, one, other)
    return dataclasses.replace(
        added, largest_logit=jnp.maximum(one.largest_logit, other.largest_logit)
    )


def load_balance_loss(
    sums: RoutingSums, normalization: Literal["switch", "hf"], load_of: RoutingSums | None = None
) -> jax.Array:
    """The auxiliary loss, from sums stacked to [L, ...]; a scalar, before its weight.

    With f_e the share of routes to expert e and P_e its mean probability, `switch` is E * sum_e f_e
    P_e of each layer, averaged over layers: 1 at perfect balance (Switch Transformer, arXiv
    2101.03961, eq. 4, with f over k). `hf` pools the layers into one f and one P, with f counted
    per token and not per route, as `load_balancing_loss_func` of transformers does: k at perfect
    balance. `load_of` are the sums that f is taken from, if not these: those of the whole step, of
    which these are a part (arXiv 2501.11873); averaged over parts by tokens, that gives the loss of
    one big batch.
    """
    E = sums.load_E.shape[-1]
    counted = load_of or sums
    if normalization == "hf":
        share_E = jnp.sum(counted.load_E, 0) / jnp.maximum(jnp.sum(counted.tokens), 1)
        return E * jnp.sum(
            share_E * jnp.sum(sums.probability_E, 0) / jnp.maximum(jnp.sum(sums.tokens), 1)
        )
    tokens_L1 = jnp.maximum(sums.tokens, 1)[:, None]
    load_LE = counted.load_E / jnp.maximum(jnp.sum(counted.load_E, axis=-1, keepdims=True), 1)
    return jnp.mean(E * jnp.sum(load_LE * sums.probability_E / tokens_L1, axis=-1))


def sequence_balance_loss(sums: RoutingSums) -> jax.Array:
    """`switch` of each sequence, averaged by tokens, then over layers (DeepSeek-V3, arXiv
    2412.19437, eq. 17).
    """
    return jnp.mean(sums.sequence_balance / jnp.maximum(sums.tokens, 1))


def router_z_loss(sums: RoutingSums) -> jax.Array:
    """Mean squared log-partition of the router logits, averaged over layers (ST-MoE, arXiv
    2202.08906, eq. 5).
    """
    return jnp.mean(sums.squared_logsumexp / jnp.maximum(sums.tokens, 1))


def next_bias(
    bias_LE: jax.Array, load_LE: jax.Array, rate: jax.typing.ArrayLike, *, is_zero_mean: bool
) -> jax.Array:
    """The balance bias after a step whose routes were `load_LE`: up where the load is under its
    mean, else down.

    b + rate * sign(mean n - n) (arXiv 2408.15664, algorithm 1), then less its mean over experts if
    asked for.
    """
    mean_L1 = jnp.mean(load_LE, axis=-1, keepdims=True)
    bias_LE += rate * jnp.sign(mean_L1 - load_LE)
    return bias_LE - jnp.mean(bias_LE, axis=-1, keepdims=True) if is_zero_mean else bias_LE
