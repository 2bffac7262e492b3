"""Noise on what a router sees and says. Without a key there is none: evaluation has none."""

import jax
from jax import P

from mixtral_jax.config import NoiseConfig


def jitter(x_BTD: jax.Array, noise: NoiseConfig, key: jax.Array | None, rows: P) -> jax.Array:
    """x * U(1 - jitter, 1 + jitter), for the router alone (Switch Transformer, arXiv 2101.03961,
    section 2.2).
    """
    if key is None or not noise.jitter:
        return x_BTD
    low, high = 1 - noise.jitter, 1 + noise.jitter
    factor_BTD = jax.random.uniform(
        _of(key, 0), x_BTD.shape, minval=low, maxval=high, out_sharding=rows
    )
    return x_BTD * factor_BTD.astype(x_BTD.dtype)


def add_noise(
    logits_BTE: jax.Array, noise: NoiseConfig, key: jax.Array | None, rows: P
) -> jax.Array:
    """Logits with noisy_top_k * N(0, 1) / E (V-MoE, arXiv 2106.05974, eq. 1) and gumbel * Gumbel(0,
    1).
    """
    if key is None:
        return logits_BTE
    shape = logits_BTE.shape
    if noise.noisy_top_k:
        logits_BTE += (
            noise.noisy_top_k / shape[-1] * jax.random.normal(_of(key, 1), shape, out_sharding=rows)
        )
    if noise.gumbel:
        logits_BTE += noise.gumbel * jax.random.gumbel(_of(key, 2), shape, out_sharding=rows)
    return logits_BTE


def _of(key: jax.Array, purpose: int) -> jax.Array:
    return jax.random.fold_in(key, purpose)
