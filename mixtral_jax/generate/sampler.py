"""Which token comes next: the likeliest, or one drawn from a distribution that is cut to its head.

A draw depends on the row's own seed, on how many tokens it has so far and on its logits: not on the
other rows, nor on the mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mixtral_jax.parallel.rules import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each row draws; a row of temperature 0 takes the likeliest token.

    Logits are divided by the temperature, then cut to the `top_k` likeliest tokens (0: all), then
    to the fewest of these that together have a probability of `top_p` (arXiv 1904.09751).
    """

    temperature_B: jax.Array  # float32
    top_p_B: jax.Array  # float32
    top_k_B: jax.Array  # int32
    seed_B: jax.Array  # uint32


def choose_tokens(
    logits_BV: jax.Array,
    sampling: Sampling | None,
    number: jax.Array,
    num_choices: int,
    rules: AxisRules,
) -> jax.Array:
    """The next token of each row, int32 [B], its `number`-th; None takes the likeliest.

    Ids from `num_choices` on have no meaning, and are never taken. Of equal logits the lowest id
    comes first.
    """
    whole_BV = jax.reshard(logits_BV.astype(jnp.float32), rules.spec("batch", None))
    whole_BV = whole_BV[:, :num_choices]
    if sampling is None:
        return jnp.argmax(whole_BV, axis=-1).astype(jnp.int32)
    # Per device, since no row needs another: random numbers would ask for their sharding.
    per_device = jax.shard_map(jax.vmap(_draw, in_axes=(0, 0, None)), out_specs=rules.spec("batch"))
    return per_device(whole_BV, sampling, number)


def _draw(logits_V: jax.Array, sampling: Sampling, number: jax.Array) -> jax.Array:
    """One row's token: that of the largest sum of a logit and its own Gumbel noise."""
    is_drawn = sampling.temperature_B > 0
    logits_V = logits_V / jnp.where(is_drawn, sampling.temperature_B, 1)
    top_k = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, len(logits_V))
    is_kept_V = _keep_head(logits_V, jnp.ones_like(logits_V), top_k)
    probability_V = jax.nn.softmax(jnp.where(is_kept_V, logits_V, -jnp.inf))
    is_kept_V &= _keep_head(logits_V, probability_V, sampling.top_p_B) | (sampling.top_p_B >= 1)
    key = jax.random.fold_in(jax.random.key(sampling.seed_B), number)
    noise_V = jnp.where(is_drawn, jax.random.gumbel(key, logits_V.shape), 0)
    return jnp.argmax(jnp.where(is_kept_V, logits_V + noise_V, -jnp.inf)).astype(jnp.int32)


def _keep_head(logits_V: jax.Array, weight_V: jax.Array, wanted: jax.Array) -> jax.Array:
    """Which are the fewest of the largest logits that together weigh `wanted`; of equal ones, those
    of the lowest ids.

    Looks for the least of them by halving, not by sorting: a sort of 32,000 logits takes longer
    than a small model.
    """
    rank_V = _as_integers(logits_V)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # Their sum would overflow.
        is_enough = jnp.sum(jnp.where(rank_V > middle, weight_V, 0)) >= wanted
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    # What lies above `low` is enough, if anything is, and what lies above `high` is not.
    limits = jnp.iinfo(jnp.int32)
    bounds = (jnp.full_like(rank_V[0], limits.min), jnp.full_like(rank_V[0], limits.max))
    _, least = jax.lax.fori_loop(0, 32, halve, bounds)
    is_larger_V, is_least_V = rank_V > least, rank_V == least
    weight_before_V = jnp.sum(jnp.where(is_larger_V, weight_V, 0)) + weight_V * (
        jnp.cumsum(is_least_V) - 1
    )
    return is_larger_V | (is_least_V & (weight_before_V < wanted))


def _as_integers(x: jax.Array) -> jax.Array:
    """Integers in the order of the float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)
