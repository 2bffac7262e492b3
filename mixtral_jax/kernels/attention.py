"""Causal attention over packed rows, behind one signature for all back ends.

`xla` materialises the scores of one block of queries at a time and works everywhere. `splash` is
the flash attention that jax ships for TPU: it never materialises scores and skips blocks that
causality forbids. Tokens may also attend to a past, the keys and values of earlier calls, which the
caller keeps.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from mixtral_jax.config import AttentionName
from mixtral_jax.kernels import splash

# `xla` holds scores of [B, K, G, QUERIES_PER_BLOCK, S] in float32 at once.
QUERIES_PER_BLOCK = 512


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
    return _attend_in_blocks(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, past)


def _attend_in_blocks(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    past: Past | None,
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    # Without this, jax cannot tell whether K or G takes over the sharding of N if K is 1.
    by_kv_head = P(*jax.typeof(k_BTKH).sharding.spec[:3], None, None)
    q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=by_kv_head)

    def attend_block(q_BbKGH, segment_ids_Bb, start):
        sees_BbT = _sees(segment_ids_Bb, segment_ids_BT) & _is_earlier(start, q_BbKGH.shape[1], T)
        sources = [(k_BTKH, v_BTKH, sees_BbT)]
        if past is not None:
            sees_BbS = _sees(segment_ids_Bb, past.segment_ids_BS)
            sources.insert(0, (past.key_values.k_BSKH, past.key_values.v_BSKH, sees_BbS))
        return _attend_to(q_BbKGH, sources)

    if T <= QUERIES_PER_BLOCK or T % QUERIES_PER_BLOCK:
        y_BTKGH = attend_block(q_BTKGH, segment_ids_BT, jnp.int32(0))
    else:

        def cut_and_attend(_, start):
            q_BbKGH, segment_ids_Bb = (
                jax.lax.dynamic_slice_in_dim(x_BTX, start, QUERIES_PER_BLOCK, axis=1)
                for x_BTX in (q_BTKGH, segment_ids_BT)
            )
            return None, attend_block(q_BbKGH, segment_ids_Bb, start)

        # The backward pass computes scores again: kept for all blocks, they would be as large as
        # those of all queries at once.
        starts = jnp.arange(0, T, QUERIES_PER_BLOCK)
        _, y_iBbKGH = jax.lax.scan(jax.checkpoint(cut_and_attend), None, starts)
        y_BTKGH = jnp.reshape(jnp.moveaxis(y_iBbKGH, 0, 1), q_BTKGH.shape, out_sharding=by_kv_head)
    return jnp.reshape(y_BTKGH, (B, T, N, H), out_sharding=jax.typeof(q_BTNH).sharding.spec)


def _sees(segment_ids_Bb: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
    """True for the keys of a query's own segment: [B, b, S]."""
    is_same_BbS = segment_ids_Bb[:, :, None] == segment_ids_BS[:, None, :]
    return is_same_BbS & (segment_ids_BS > 0)[:, None, :]


def _is_earlier(start: jax.Array, num_queries: int, num_keys: int) -> jax.Array:
    """True for keys that are not after a query: [1, b, S]. `start` numbers the first query."""
    return (jnp.arange(num_keys)[None] <= start + jnp.arange(num_queries)[:, None])[None]


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
