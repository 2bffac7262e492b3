"""Causal attention over packed rows, behind one signature for all back ends.

`xla` is flash attention in plain jax and works everywhere (`blockwise`). `splash` is the kernel of
jax for TPU. Both hold a block of scores at a time, and leave out blocks that no token may see.
Tokens may also attend to a past, the keys and values of earlier calls, which the caller keeps.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from mixtral_jax.config import AttentionName
from mixtral_jax.kernels import blockwise, splash


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys, already rotated, and values. Those of all layers have a leading L."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """Keys and values of earlier tokens of the same rows, and their segments (0: no token)."""

    key_values: KeyValues
    segment_ids_BS: jax.Array


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    kernel: AttentionName,
    past: Past | None = None,
) -> jax.Array:
    """Causal grouped-query attention within each segment: [B, T, N, H], softmax in float32.

    Segment 0 is padding, which no other segment attends to; the result of a padded query is finite
    and has no meaning. Every token of `past` comes before all tokens of its segment here. `xla`
    takes over from `splash` if there is a past, or if T is not a multiple of the kernel's tiles.
    """
    q_BTNH = q_BTNH * q_BTNH.shape[-1] ** -0.5
    if kernel == "splash" and past is None and splash.fits(q_BTNH.shape[1]):
        return splash.attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    if past is None:
        return blockwise.attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    return _attend_with_past(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, past)


def _attend_with_past(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    past: Past,
) -> jax.Array:
    """Holds the scores of all queries at once: while a text is written, they are few."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    # Without this, jax cannot tell whether K or G takes over the sharding of N if K is 1.
    by_kv_head = P(*jax.typeof(k_BTKH).sharding.spec[:3], None, None)
    q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=by_kv_head)
    is_earlier_1TT = jnp.tri(T, dtype=bool)[None]
    sees_BTS = _sees(segment_ids_BT, past.segment_ids_BS)
    sees_BTT = _sees(segment_ids_BT, segment_ids_BT) & is_earlier_1TT
    sources = [
        (past.key_values.k_BSKH, past.key_values.v_BSKH, sees_BTS),
        (k_BTKH, v_BTKH, sees_BTT),
    ]
    y_BTKGH = _attend_to(q_BTKGH, sources)
    return jnp.reshape(y_BTKGH, (B, T, N, H), out_sharding=jax.typeof(q_BTNH).sharding.spec)


def _sees(segment_ids_Bb: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
    """True for the keys of a query's own segment: [B, b, S]."""
    is_same_BbS = segment_ids_Bb[:, :, None] == segment_ids_BS[:, None, :]
    return is_same_BbS & (segment_ids_BS > 0)[:, None, :]


def _attend_to(
    q_BbKGH: jax.Array, sources: list[tuple[jax.Array, jax.Array, jax.Array]]
) -> jax.Array:
    """One softmax over several sets of keys: (k_BSKH, v_BSKH, sees_BbS) of each set."""

    def score(k_BSKH, sees_BbS):
        scores_BKGbS = jnp.einsum(
            "BbKGH,BSKH->BKGbS", q_BbKGH, k_BSKH, preferred_element_type=jnp.float32
        )
        # Finite rather than -inf: the softmax of a row that sees no key must not be NaN.
        return jnp.where(sees_BbS[:, None, None], scores_BKGbS, jnp.finfo(jnp.float32).min)

    weights_BKGbS = jax.nn.softmax(
        jnp.concatenate([score(k, sees) for k, _, sees in sources], axis=-1)
    )
    ends = np.cumsum([k_BSKH.shape[1] for k_BSKH, _, _ in sources])[:-1]
    parts = zip(jnp.split(weights_BKGbS, ends, axis=-1), sources, strict=True)
    sums = [
        jnp.einsum("BKGbS,BSKH->BbKGH", weights.astype(v.dtype), v) for weights, (_, v, _) in parts
    ]
    return functools.reduce(jnp.add, sums)
