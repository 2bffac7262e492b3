"""Who gets whom: the choices of `router.choice`, each a function from what a router says to experts
of tokens.

They see whole sequences of one device, since no sequence needs another; no gradient flows through
them. A new one is a function here, or in a file of its own that is imported here, and a line in
`config_router.CHOICES`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mixtral_jax.config import RouterConfig
from mixtral_jax.model.capacity import rank_in_expert
from mixtral_jax.model.tokens import Tokens

SINKHORN_ROUNDS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """What there is to choose by.

    `preference_BTE` is what a top-k takes the largest of: logits, or scores with the balance bias.
    `scores_BTE` are scores plus that bias; without one they are positive. `salt` is a number of
    this layer and step in training, else 0.
    """

    preference_BTE: jax.Array
    scores_BTE: jax.Array
    tokens: Tokens
    salt: jax.Array
    is_training: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_experts(self) -> int:
        """E."""
        return self.preference_BTE.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Experts of each token, int32, best first.

    `is_chosen_BTA` is False where a token has fewer (None: nowhere).
    """

    experts_BTA: jax.Array
    is_chosen_BTA: jax.Array | None = None


Choose = Callable[[Candidates, RouterConfig], Chosen]


def choose_top_k(candidates: Candidates, router: RouterConfig) -> Chosen:
    """Each token takes its k best experts (arXiv 1701.06538;

    Mixtral, arXiv 2401.04088, section 2.1).
    """
    return _top_k(candidates.preference_BTE, router)


def choose_within_groups(candidates: Candidates, router: RouterConfig) -> Chosen:
    """Top-k within each token's best groups of experts, which bounds the devices that it travels
    to.

    Experts stand in `num_groups` equal groups; a group is worth the sum of its best scores, bias
    included, as many as are chosen in each on average (DeepSeek-V3, arXiv 2412.19437, section
    2.1.2).
    """
    B, T, E = candidates.scores_BTE.shape
    grouped_BTGe = candidates.scores_BTE.reshape(B, T, router.num_groups, -1)
    num_best = max(1, router.num_experts_per_token // router.groups_per_token)
    best_BTGe, _ = jax.lax.top_k(grouped_BTGe, min(num_best, grouped_BTGe.shape[-1]))
    _, groups_BTg = jax.lax.top_k(jnp.sum(best_BTGe, axis=-1), router.groups_per_token)
    group_E = jnp.arange(E) // (E // router.num_groups)
    is_open_BTE = jnp.any(groups_BTg[..., None] == group_E[None, None, None], axis=2)
    return _top_k(jnp.where(is_open_BTE, candidates.scores_BTE, -jnp.inf), router)


def choose_by_sinkhorn(candidates: Candidates, router: RouterConfig) -> Chosen:
    """Top-k of a transport plan that gives each expert as much of every sequence (BASE, arXiv
    2103.16716; S-BASE).

    Rows and columns of exp(logits) are scaled in turn to their sums of 1 and n / E. A row's scale
    changes no top-k, so only the columns' is kept. Later tokens take part in the choice of earlier
    ones: in training alone, else top-k.
    """
    logits_BTE = candidates.preference_BTE
    if not candidates.is_training:
        return _top_k(logits_BTE, router)
    is_real_BT1 = candidates.tokens.is_real_BT[..., None]
    real_BTE = jnp.where(is_real_BT1, logits_BTE, -jnp.inf)
    log_tokens_B1 = jnp.log(jnp.maximum(jnp.sum(is_real_BT1, axis=1), 1))

    def rescale(_: int, column_BE: jax.Array) -> jax.Array:
        row_BT1 = -jax.nn.logsumexp(logits_BTE + column_BE[:, None], axis=-1, keepdims=True)
        full_BE = jax.nn.logsumexp(real_BTE + row_BT1, axis=1)
        return (
            log_tokens_B1
            - jnp.log(candidates.num_experts)
            - jnp.where(jnp.isfinite(full_BE), full_BE, 0)
        )

    column_BE = jax.lax.fori_loop(0, SINKHORN_ROUNDS, rescale, jnp.zeros_like(logits_BTE[:, 0]))
    return _top_k(logits_BTE + column_BE[:, None], router)


def choose_tokens(candidates: Candidates, router: RouterConfig) -> Chosen:
    """Expert choice: each expert takes the ceil(k n / E) tokens of a sequence that it scores
    highest.

    (arXiv 2202.09368.) Not causal: whether a token is taken depends on later ones. So it is for the
    training loss alone, which is then no language model's; evaluation and generation let each token
    take its k best experts.
    """
    if not candidates.is_training:
        return _top_k(candidates.preference_BTE, router)
    everyone = choose_all(candidates, router).experts_BTA
    is_real_BT = candidates.tokens.is_real_BT
    rank_BTE = rank_in_expert(everyone, candidates.scores_BTE, is_real_BT, candidates.num_experts)
    num_tokens_B11 = jnp.sum(is_real_BT, axis=1)[:, None, None]
    return Chosen(
        everyone, rank_BTE * candidates.num_experts < router.num_experts_per_token * num_tokens_B11
    )


def choose_by_hash(candidates: Candidates, router: RouterConfig) -> Chosen:
    """Each id has its k experts for ever, in all layers the same (Hash Layers, arXiv 2106.04426,
    random hash).
    """
    return _top_k(_hash(candidates, candidates.tokens.ids_BT), router)


def choose_at_random(candidates: Candidates, router: RouterConfig) -> Chosen:
    """Any k experts, as even as chance is: a control.

    In training anew each step; else by id and position.
    """
    ids_BT, positions_BT = candidates.tokens.ids_BT, candidates.tokens.positions_BT
    return _top_k(_hash(candidates, ids_BT, positions_BT, candidates.salt[None, None]), router)


def choose_in_turn(candidates: Candidates, router: RouterConfig) -> Chosen:
    """Position p takes experts k p to k p + k - 1, modulo E: even over E positions, and knows
    nothing of the token.
    """
    k = router.num_experts_per_token
    turn_BTA = candidates.tokens.positions_BT[..., None] * k + jnp.arange(k)[None, None]
    return Chosen(turn_BTA % candidates.num_experts)


def choose_all(candidates: Candidates, router: RouterConfig) -> Chosen:
    """All experts, in their order: of k experts, one dense layer of the same work a token as top-k."""
    shape = candidates.preference_BTE.shape
    return Chosen(jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape))


def _top_k(preference_BTE: jax.Array, router: RouterConfig) -> Chosen:
    return Chosen(jax.lax.top_k(preference_BTE, router.num_experts_per_token)[1])


def _hash(candidates: Candidates, *numbers: jax.Array) -> jax.Array:
    """An even spread of [0, 1) for each token and expert, by the numbers alone (MurmurHash3's final
    mix of each).
    """
    hashed_BTE = jnp.arange(candidates.num_experts, dtype=jnp.uint32)[None, None]
    for number in numbers:
        salted = hashed_BTE * jnp.uint32(0x9E3779B9) + number.astype(jnp.uint32)[..., None]
        salted = (salted ^ (salted >> 16)) * jnp.uint32(0x85EBCA6B)
        salted = (salted ^ (salted >> 13)) * jnp.uint32(0xC2B2AE35)
        hashed_BTE = salted ^ (salted >> 16)
    return (hashed_BTE >> 8).astype(jnp.float32) * 2.0**-24
