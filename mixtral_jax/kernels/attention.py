"""Causal attention over packed rows: one signature, an implementation for each back end.

`xla` materialises the scores of a block of queries at a time, and works everywhere. `splash` is the
flash attention that jax ships for TPU: it never materialises them, and skips what causality forbids.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import P

from mixtral_jax.config import ModelConfig, require
from mixtral_jax.kernels import splash
from mixtral_jax.kernels.choice import Choice

AttentionKernel = Literal["xla", "splash"]
# Queries whose scores are held at once: [B, K, G, QUERY_BLOCK, S] in float32.
QUERY_BLOCK = 512


def choose_attention(config: ModelConfig, sequence_length: int, platform: str) -> Choice:
    """The attention for a device of `platform` (`cpu`, `gpu`, `tpu`).

    Raises:
        ConfigError: the one asked for does not work here.
    """
    obstacle = splash.find_obstacle(config.head_dim, sequence_length, platform)
    if config.attention != "auto":
        require(config.attention == "xla" or not obstacle, f"model.attention=splash needs {obstacle}; use xla")
        return Choice(config.attention, "as asked")
    if obstacle:
        return Choice("xla", f"flash attention here needs {obstacle}" if platform == "tpu" else "works everywhere")
    return Choice("splash", "scores are never materialised")


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array, kernel: AttentionKernel
) -> jax.Array:
    """Causal grouped-query attention within each segment: [B, T, N, H], softmax in float32.

    Segment 0 is padding, which no other segment attends to; what a padded query gets is finite and meaningless.
    """
    q_BTNH = q_BTNH * q_BTNH.shape[-1] ** -0.5
    if kernel == "splash":
        return splash.attend(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    return _attend_in_blocks(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)


def _attend_in_blocks(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Said aloud, since where one head is shared by all, N could also be sharded as G.
    by_kv_head = P(*jax.typeof(k_BSKH).sharding.spec[:3], None, None)
    q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=by_kv_head)
    if T <= QUERY_BLOCK or T % QUERY_BLOCK:
        y_BTKGH = _attend_block(q_BTKGH, k_BSKH, v_BSKH, segment_ids_BT, segment_ids_BT, jnp.int32(0))
    else:

        def attend_block(_, start):
            q_BbKGH = jax.lax.dynamic_slice_in_dim(q_BTKGH, start, QUERY_BLOCK, axis=1)
            segment_ids_Bb = jax.lax.dynamic_slice_in_dim(segment_ids_BT, start, QUERY_BLOCK, axis=1)
            return None, _attend_block(q_BbKGH, k_BSKH, v_BSKH, segment_ids_Bb, segment_ids_BT, start)

        # Scores are computed again in the backward pass: kept, they would be as large as all at once.
        _, y_iBbKGH = jax.lax.scan(jax.checkpoint(attend_block), None, jnp.arange(0, T, QUERY_BLOCK))
        y_BTKGH = jnp.reshape(jnp.moveaxis(y_iBbKGH, 0, 1), q_BTKGH.shape, out_sharding=by_kv_head)
    return jnp.reshape(y_BTKGH, (B, T, N, H), out_sharding=jax.typeof(q_BTNH).sharding.spec)


def _attend_block(q_BbKGH, k_BSKH, v_BSKH, segment_ids_Bb, segment_ids_BS, start):
    """Attention of the queries from `start` on to all keys."""
    scores_BKGbS = jnp.einsum("BbKGH,BSKH->BKGbS", q_BbKGH, k_BSKH, preferred_element_type=jnp.float32)
    same_BbS = segment_ids_Bb[:, :, None] == segment_ids_BS[:, None, :]
    earlier_bS = jnp.arange(k_BSKH.shape[1])[None] <= start + jnp.arange(q_BbKGH.shape[1])[:, None]
    sees_BbS = same_BbS & (segment_ids_BS > 0)[:, None, :] & earlier_bS[None]
    # Finite, not -inf: the softmax of a row that sees nothing must not be NaN.
    scores_BKGbS = jnp.where(sees_BbS[:, None, None], scores_BKGbS, jnp.finfo(jnp.float32).min)
    weights_BKGbS = jax.nn.softmax(scores_BKGbS).astype(v_BSKH.dtype)
    return jnp.einsum("BKGbS,BSKH->BbKGH", weights_BKGbS, v_BSKH)
