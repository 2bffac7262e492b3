"""Chooses the next token: the most likely one, or a sample with temperature, top-k and top-p.

A sample depends on the row's own seed, on the number of its tokens so far, and on its logits. It
does not depend on the other rows or on the mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.parallel.rules import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """The sampling settings per row. A row with temperature 0 takes the most likely token.

    Logits are divided by the temperature. Then only the `top_k` most likely tokens are kept (0:
    all), and of these the fewest whose probabilities sum to `top_p` (nucleus sampling, arXiv
    1904.09751).
    """

    temperature_B: jax.Array  # float32
    top_p_B: jax.Array  # float32
    top_k_B: jax.Array  # int32
    seed_B: jax.Array  # uint32


def choose_tokens(
    logits_BV: jax.Array,
    sampling: Sampling | None,
    num_chosen: jax.Array,
    num_choices: int,
    rules: AxisRules,
    *,
    unused_ids: tuple[int, ...] = (),
) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
        sampling: None is greedy: the most likely token, and of equal logits the lowest id.
        num_chosen: how many tokens the rows have so far; it selects the random numbers.
        num_choices: ids from this number on are never chosen, because they have no meaning.
        unused_ids: lower ids that are never chosen either.
    """
    whole_BV = jax.reshard(logits_BV.astype(jnp.float32), rules.spec("batch", None))
    whole_BV = whole_BV[:, :num_choices]
    if unused_ids:
        whole_BV = whole_BV.at[:, np.array(unused_ids)].set(-jnp.inf)
    if sampling is None:
        return jnp.argmax(whole_BV, axis=-1).astype(jnp.int32)
    # No row needs another, so each device draws for its own rows. Outside `shard_map`, random
    # numbers would need a sharding.
    per_device = jax.shard_map(jax.vmap(_draw, in_axes=(0, 0, None)), out_specs=rules.spec("batch"))
    return per_device(whole_BV, sampling, num_chosen)


def _draw(logits_V: jax.Array, sampling: Sampling, num_chosen: jax.Array) -> jax.Array:
    """Samples one row's token with the Gumbel-max trick: the largest sum of logit and noise."""
    is_drawn = sampling.temperature_B > 0
    logits_V = logits_V / jnp.where(is_drawn, sampling.temperature_B, 1)
    top_k = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, len(logits_V))
    is_kept_V = _keep_head(logits_V, jnp.ones_like(logits_V), top_k)
    probability_V = jax.nn.softmax(jnp.where(is_kept_V, logits_V, -jnp.inf))
    is_kept_V &= _keep_head(logits_V, probability_V, sampling.top_p_B) | (sampling.top_p_B >= 1)
    key = jax.random.fold_in(jax.random.key(sampling.seed_B), num_chosen)
    noise_V = jnp.where(is_drawn, jax.random.gumbel(key, logits_V.shape), 0)
    return jnp.argmax(jnp.where(is_kept_V, logits_V + noise_V, -jnp.inf)).astype(jnp.int32)


def _keep_head(logits_V: jax.Array, weight_V: jax.Array, wanted: jax.Array) -> jax.Array:
    """Marks the fewest of the largest logits whose weights sum to `wanted`.

    Of equal logits, those with the lowest ids are marked. The smallest marked logit is found by
    bisection: sorting 32,000 logits takes longer than running a small model.
    """
    rank_V = _as_integers(logits_V)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # (low + high) / 2 would overflow.
        is_enough = jnp.sum(jnp.where(rank_V > middle, weight_V, 0)) >= wanted
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    # Invariant: the logits above `low` weigh at least `wanted` (unless all together weigh less);
    # those above `high` weigh less.
    limits = jnp.iinfo(jnp.int32)
    bounds = (jnp.full_like(rank_V[0], limits.min), jnp.full_like(rank_V[0], limits.max))
    _, least = jax.lax.fori_loop(0, 32, halve, bounds)
    is_larger_V, is_least_V = rank_V > least, rank_V == least
    weight_before_V = jnp.sum(jnp.where(is_larger_V, weight_V, 0)) + weight_V * (
        jnp.cumsum(is_least_V) - 1
    )
    return is_larger_V | (is_least_V & (weight_before_V < wanted))


def _as_integers(x: jax.Array) -> jax.Array:
    """Maps float32 numbers to integers of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)
