"""Scaled dot-product attention over packed rows."""

import jax
import jax.numpy as jnp


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Causal grouped-query attention within each segment: [B, T, N, H], softmax in float32.

    Segment 0 is padding, which nothing attends to; what a padded query gets is finite and meaningless.
    The scores are materialised (XLA's own implementation, on every back end).
    """
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    is_real_BTS = segment_ids_BT[:, None, :] > 0
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=jnp.logical_and(same_BTS, is_real_BTS)[:, None], is_causal=True,
        implementation="xla",
    )  # fmt: skip
