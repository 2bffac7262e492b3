"""Noise on the input and the logits of a router. Without a key, as in evaluation, there is none."""

import jax
from jax import P

from mixtral_jax.config import NoiseConfig

# Each kind of noise has random numbers of its own.
_JITTER, _NOISY_TOP_K, _GUMBEL = range(3)


def jitter(x_BTD: jax.Array, noise: NoiseConfig, key: jax.Array | None, rows: P) -> jax.Array:
    """x * U(1 - jitter, 1 + jitter), for the router only.

    Source: Switch Transformer, arXiv 2101.03961, section 2.2.
    """
    if key is None or not noise.jitter:
        return x_BTD
    low, high = 1 - noise.jitter, 1 + noise.jitter
    own_key = jax.random.fold_in(key, _JITTER)
    factor_BTD = jax.random.uniform(
        own_key, x_BTD.shape, minval=low, maxval=high, out_sharding=rows
    )
    return x_BTD * factor_BTD.astype(x_BTD.dtype)


def add_noise(
    logits_BTE: jax.Array, noise: NoiseConfig, key: jax.Array | None, rows: P
) -> jax.Array:
    """Adds noisy_top_k * N(0, 1) / E and gumbel * Gumbel(0, 1) to the logits.

    Source of the first: V-MoE, arXiv 2106.05974, eq. 1.
    """
    if key is None:
        return logits_BTE
    shape = logits_BTE.shape
    if noise.noisy_top_k:
        own_key = jax.random.fold_in(key, _NOISY_TOP_K)
        normal_BTE = jax.random.normal(own_key, shape, out_sharding=rows)
        logits_BTE += noise.noisy_top_k / shape[-1] * normal_BTE
    if noise.gumbel:
        own_key = jax.random.fold_in(key, _GUMBEL)
        logits_BTE += noise.gumbel * jax.random.gumbel(own_key, shape, out_sharding=rows)
    return logits_BTE
