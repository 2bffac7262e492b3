"""Which token comes next: the likeliest, or one drawn from a distribution that is cut to its head.

A draw depends on the row's own seed, on how many tokens it has so far and on its logits: not on the other rows, nor on
the mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mixtral_jax.parallel.rules import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each row draws; a row of temperature 0 takes the likeliest token.

    Logits are divided by the temperature, then cut to the `top_k` likeliest tokens (0: all), then to the fewest of
    these that together have a probability of `top_p` (arXiv 1904.09751).
    """

    temperature_B: jax.Array  # float32
    top_p_B: jax.Array  # float32
    top_k_B: jax.Array  # int32
    seed_B: jax.Array  # uint32


def choose_tokens(
    logits_BV: jax.Array, sampling: Sampling | None, number: jax.Array, num_choices: int, rules: AxisRules
) -> jax.Array:
    """The next token of each row, int32 [B], its `number`-th; None takes the likeliest.

    Ids from `num_choices` on have no meaning, and are never taken. Of equal logits the lowest id comes first.
    """
    whole_BV = jax.reshard(logits_BV.astype(jnp.float32), rules.spec("batch", None))
    whole_BV = whole_BV[:, :num_choices]
    if sampling is None:
        return jnp.argmax(whole_BV, axis=-1).astype(jnp.int32)
    # Per device, since no row needs another: sorts and random numbers would ask for their sharding.
    per_device = jax.shard_map(jax.vmap(_draw, in_axes=(0, 0, None)), out_specs=rules.spec("batch"))
    return per_device(whole_BV, sampling, number)


def _draw(logits_V: jax.Array, sampling: Sampling, number: jax.Array) -> jax.Array:
    """One row's token. A draw is the largest sum of a logit and its token's Gumbel noise."""
    key = jax.random.fold_in(jax.random.key(sampling.seed_B), number)
    logits_V = logits_V / jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1)
    noise_V = jax.random.gumbel(key, logits_V.shape)
    noise_V = jnp.where(sampling.temperature_B > 0, noise_V, 0)
    ids_V = jnp.arange(len(logits_V), dtype=jnp.int32)
    minus_logits_V, noise_V, ids_V = jax.lax.sort((-logits_V, noise_V, ids_V), num_keys=1, is_stable=True)
    is_kept_V = ids_V == ids_V[0]
    is_kept_V |= _is_in_head(-minus_logits_V, sampling.top_p_B, sampling.top_k_B)
    return ids_V[jnp.argmax(jnp.where(is_kept_V, noise_V - minus_logits_V, -jnp.inf))]


def _is_in_head(sorted_V: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Which of the logits, sorted from the largest down, may be drawn."""
    in_top_k_V = (jnp.arange(len(sorted_V)) < top_k) | (top_k == 0)
    probability_V = jax.nn.softmax(jnp.where(in_top_k_V, sorted_V, -jnp.inf))
    before_V = jnp.cumsum(probability_V) - probability_V
    return in_top_k_V & ((before_V < top_p) | (top_p >= 1))
