"""How tokens and experts are matched: one function per value of `router.choice`.

A selector sees whole sequences of one device, since no sequence depends on another. No gradient
flows through it. docs/routers.md tells how to add one.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mixtral_jax.config import RouterChoice, RouterConfig
from mixtral_jax.model.capacity import rank_in_expert
from mixtral_jax.model.tokens import Tokens

SINKHORN_ROUNDS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """What a selector selects by.

    Attributes:
        preference_BTE: a top-k takes the largest of these: logits, or with a balance bias
            `scores_BTE`.
        scores_BTE: the router's scores plus the balance bias; positive if there is no bias.
        salt: in training, a number of this layer and step; otherwise 0. A uint32 scalar.
    """

    preference_BTE: jax.Array
    scores_BTE: jax.Array
    tokens: Tokens
    salt: jax.Array
    is_training: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_experts(self) -> int:
        """The number of experts, E."""
        return self.preference_BTE.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Experts of each token, int32, best first.

    `is_chosen_BTA` is False where a token has fewer than A experts. It is None if every token has A
    experts.
    """

    experts_BTA: jax.Array
    is_chosen_BTA: jax.Array | None = None

    def is_chosen_by(self, is_real_BT: jax.Array) -> jax.Array:
        """True for the routes that real tokens have chosen, [B, T, A]."""
        is_real_BTA = jnp.broadcast_to(is_real_BT[..., None], self.experts_BTA.shape)
        return is_real_BTA if self.is_chosen_BTA is None else is_real_BTA & self.is_chosen_BTA


Selector = Callable[[Candidates, RouterConfig], Selection]


def select_top_k(candidates: Candidates, router: RouterConfig) -> Selection:
    """Each token takes its k best experts (arXiv 1701.06538; Mixtral, arXiv 2401.04088, 2.1)."""
    return _top_k(candidates.preference_BTE, router)


def select_within_groups(candidates: Candidates, router: RouterConfig) -> Selection:
    """Top-k within each token's best groups of experts, which bounds the devices it travels to.

    The experts form `num_groups` equal groups. A group's value is the sum of its best scores with
    bias, k / groups_per_token of them (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """
    B, T, E = candidates.scores_BTE.shape
    grouped_BTGe = candidates.scores_BTE.reshape(B, T, router.num_groups, -1)
    num_best = max(1, router.num_experts_per_token // router.groups_per_token)
    best_BTGe, _ = jax.lax.top_k(grouped_BTGe, min(num_best, grouped_BTGe.shape[-1]))
    _, groups_BTg = jax.lax.top_k(jnp.sum(best_BTGe, axis=-1), router.groups_per_token)
    group_E = jnp.arange(E) // (E // router.num_groups)
    is_open_BTE = jnp.any(groups_BTg[..., None] == group_E[None, None, None], axis=2)
    return _top_k(jnp.where(is_open_BTE, candidates.scores_BTE, -jnp.inf), router)


def select_by_sinkhorn(candidates: Candidates, router: RouterConfig) -> Selection:
    """Top-k of a transport plan that gives each expert an equal share of every sequence.

    Rows and columns of exp(logits) are scaled in turn until they sum to 1 and n / E (BASE, arXiv
    2103.16716; S-BASE). The scale of a row changes no top-k, so only that of the columns is kept.
    Later tokens influence the choice of earlier ones, so this is done in training only; otherwise
    it is top-k.
    """
    logits_BTE = candidates.preference_BTE
    if not candidates.is_training:
        return _top_k(logits_BTE, router)
    is_real_BT1 = candidates.tokens.is_real_BT[..., None]
    real_BTE = jnp.where(is_real_BT1, logits_BTE, -jnp.inf)
    log_tokens_B1 = jnp.log(jnp.maximum(jnp.sum(is_real_BT1, axis=1), 1))
    log_experts = jnp.log(candidates.num_experts)

    def rescale(_: int, column_BE: jax.Array) -> jax.Array:
        row_BT1 = -jax.nn.logsumexp(logits_BTE + column_BE[:, None], axis=-1, keepdims=True)
        full_BE = jax.nn.logsumexp(real_BTE + row_BT1, axis=1)
        return log_tokens_B1 - log_experts - jnp.where(jnp.isfinite(full_BE), full_BE, 0)

    column_BE = jax.lax.fori_loop(0, SINKHORN_ROUNDS, rescale, jnp.zeros_like(logits_BTE[:, 0]))
    return _top_k(logits_BTE + column_BE[:, None], router)


def select_tokens(candidates: Candidates, router: RouterConfig) -> Selection:
    """Expert choice: each expert takes the ceil(k n / E) tokens of a sequence it scores highest.

    Source: arXiv 2202.09368. This is not causal: whether a token is taken depends on later tokens.
    So it is used only in training, and the training loss is then not that of a language model. In
    evaluation and generation each token takes its k best experts.
    """
    if not candidates.is_training:
        return _top_k(candidates.preference_BTE, router)
    everyone = select_all(candidates, router).experts_BTA
    is_real_BT = candidates.tokens.is_real_BT
    rank_BTE = rank_in_expert(everyone, candidates.scores_BTE, is_real_BT, candidates.num_experts)
    num_tokens_B11 = jnp.sum(is_real_BT, axis=1)[:, None, None]
    is_chosen_BTE = (
        rank_BTE * candidates.num_experts < router.num_experts_per_token * num_tokens_B11
    )
    return Selection(everyone, is_chosen_BTE)


def select_by_hash(candidates: Candidates, router: RouterConfig) -> Selection:
    """Each token id always has the same k experts, in all layers.

    Source: Hash Layers, arXiv 2106.04426, random hash.
    """
    return _top_k(_hash(candidates, candidates.tokens.ids_BT), router)


def select_at_random(candidates: Candidates, router: RouterConfig) -> Selection:
    """Any k experts, as a control: loads are as even as chance makes them.

    In training they are drawn anew each step; otherwise they depend on id and position.
    """
    ids_BT, positions_BT = candidates.tokens.ids_BT, candidates.tokens.positions_BT
    return _top_k(_hash(candidates, ids_BT, positions_BT, candidates.salt[None, None]), router)


def select_in_turn(candidates: Candidates, router: RouterConfig) -> Selection:
    """Position p takes the experts k p to k p + k - 1, modulo E, whatever the token is.

    The load is even over E positions.
    """
    k = router.num_experts_per_token
    turn_BTA = candidates.tokens.positions_BT[..., None] * k + jnp.arange(k)[None, None]
    return Selection(turn_BTA % candidates.num_experts)


def select_all(candidates: Candidates, router: RouterConfig) -> Selection:
    """All experts in their order.

    With k experts in all, this is one dense layer with the same work per token as top-k.
    """
    shape = candidates.preference_BTE.shape
    return Selection(jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape))


SELECTORS: dict[RouterChoice, Selector] = {
    "top_k": select_top_k,
    "group_limited": select_within_groups,
    "sinkhorn": select_by_sinkhorn,
    "expert_choice": select_tokens,
    "hash": select_by_hash,
    "random": select_at_random,
    "uniform": select_in_turn,
    "dense": select_all,
}


def _top_k(preference_BTE: jax.Array, router: RouterConfig) -> Selection:
    return Selection(jax.lax.top_k(preference_BTE, router.num_experts_per_token)[1])


def _hash(candidates: Candidates, *numbers: jax.Array) -> jax.Array:
    """Spreads tokens and experts evenly over [0, 1), by the numbers alone.

    Each number is mixed by the final mix of MurmurHash3, salted with those before it.
    """
    hashed_BTE = jnp.arange(candidates.num_experts, dtype=jnp.uint32)[None, None]
    for number in numbers:
        salted = hashed_BTE * jnp.uint32(0x9E3779B9) + number.astype(jnp.uint32)[..., None]
        salted = (salted ^ (salted >> 16)) * jnp.uint32(0x85EBCA6B)
        salted = (salted ^ (salted >> 13)) * jnp.uint32(0xC2B2AE35)
        hashed_BTE = salted ^ (salted >> 16)
    return (hashed_BTE >> 8).astype(jnp.float32) * 2.0**-24
