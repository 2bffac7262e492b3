"""Scaled dot-product attention over packed rows."""

import jax
import jax.numpy as jnp
from jax import P


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Causal grouped-query attention within each segment: [B, T, N, H], softmax in float32.

    Segment 0 is padding, which nothing attends to; what a padded query gets is finite and meaningless.
    Plain XLA on every back end: the scores [B, K, G, T, S] are materialised.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Said aloud, since where one head is shared by all, N could also be sharded as G.
    by_kv_head = P(*jax.typeof(k_BSKH).sharding.spec[:3], None, None)
    q_BTKGH = jnp.reshape(q_BTNH * H**-0.5, (B, T, K, N // K, H), out_sharding=by_kv_head)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    sees_BTS = same_BTS & (segment_ids_BT > 0)[:, None, :] & jnp.tri(T, dtype=bool)[None]
    # Finite, not -inf: the softmax of a row that sees nothing must not be NaN.
    scores_BKGTS = jnp.where(sees_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS).astype(v_BSKH.dtype)
    y_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return jnp.reshape(y_BTKGH, (B, T, N, H), out_sharding=jax.typeof(q_BTNH).sharding.spec)
