"""Causal attention over packed rows: one signature, an implementation for each back end.

`xla` materialises the scores of a block of queries at a time, and works everywhere. `splash` is the
flash attention that jax ships for TPU: it never materialises them, and skips what causality
forbids. Tokens may also attend to a past, the keys and values of earlier calls; where those are
kept is for callers.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from mixtral_jax.config import ModelConfig, require
from mixtral_jax.kernels import splash
from mixtral_jax.kernels.choice import Choice

AttentionKernel = Literal["xla", "splash"]
# Queries whose scores are held at once: [B, K, G, QUERY_BLOCK, S] in float32.
QUERY_BLOCK = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys, rotated already, and values; those of all layers have a leading L."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """What earlier tokens of the same rows left, and the segment of each: 0 where nothing is kept."""

    key_values: KeyValues
    segment_ids_BS: jax.Array


def choose_attention(config: ModelConfig, sequence_length: int, platform: str) -> Choice:
    """The attention for a device of `platform` (`cpu`, `gpu`, `tpu`).

    Raises:
        ConfigError: the one asked for does not work here.
    """
    obstacle = splash.find_obstacle(config.head_dim, sequence_length, platform)
    if config.attention != "auto":
        require(
            config.attention == "xla" or not obstacle,
            f"model.attention=splash needs {obstacle}; use xla",
        )
        return Choice(config.attention, "as asked")
    if obstacle:
        return Choice(
            "xla",
            f"flash attention here needs {obstacle}" if platform == "tpu" else "works everywhere",
        )
    return Choice("splash", "scores are never materialised")


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    kernel: AttentionKernel,
    past: Past | None = None,
) -> jax.Array:
    """Causal grouped-query attention within each segment: [B, T, N, H], softmax in float32.

    Segment 0 is padding, which no other segment attends to; what a padded query gets is finite and
    meaningless. All that is kept of a segment in `past` came before its tokens here. With a past,
    or in rows that are no multiple of its tiles, `splash` leaves the work to `xla`.
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
    # Said aloud, since where one head is shared by all, N could also be sharded as G.
    by_kv_head = P(*jax.typeof(k_BTKH).sharding.spec[:3], None, None)
    q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=by_kv_head)

    def attend_block(q_BbKGH, segment_ids_Bb, start):
        sees_BbT = _sees(segment_ids_Bb, segment_ids_BT) & _is_earlier(start, q_BbKGH.shape[1], T)
        seen = [(k_BTKH, v_BTKH, sees_BbT)]
        if past is not None:
            sees_BbS = _sees(segment_ids_Bb, past.segment_ids_BS)
            seen.insert(0, (past.key_values.k_BSKH, past.key_values.v_BSKH, sees_BbS))
        return _attend_to(q_BbKGH, seen)

    if T <= QUERY_BLOCK or T % QUERY_BLOCK:
        y_BTKGH = attend_block(q_BTKGH, segment_ids_BT, jnp.int32(0))
    else:

        def cut_and_attend(_, start):
            q_BbKGH = jax.lax.dynamic_slice_in_dim(q_BTKGH, start, QUERY_BLOCK, axis=1)
            segment_ids_Bb = jax.lax.dynamic_slice_in_dim(
                segment_ids_BT, start, QUERY_BLOCK, axis=1
            )
            return None, attend_block(q_BbKGH, segment_ids_Bb, start)

        # Scores are computed again in the backward pass: kept, they would be as large as all at
        # once.
        _, y_iBbKGH = jax.lax.scan(
            jax.checkpoint(cut_and_attend), None, jnp.arange(0, T, QUERY_BLOCK)
        )
        y_BTKGH = jnp.reshape(jnp.moveaxis(y_iBbKGH, 0, 1), q_BTKGH.shape, out_sharding=by_kv_head)
    return jnp.reshape(y_BTKGH, (B, T, N, H), out_sharding=jax.typeof(q_BTNH).sharding.spec)


def _sees(segment_ids_Bb: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
    """Which keys are of a query's segment: [B, b, S]."""
    return (segment_ids_Bb[:, :, None] == segment_ids_BS[:, None, :]) & (segment_ids_BS > 0)[
        :, None, :
    ]


def _is_earlier(start: jax.Array, num_queries: int, num_keys: int) -> jax.Array:
    """Which keys are not after a query, the first of which is number `start`: [1, b, S]."""
    return (jnp.arange(num_keys)[None] <= start + jnp.arange(num_queries)[:, None])[None]


def _attend_to(q_BbKGH: jax.Array, seen: list[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """One softmax over several sets of keys; each is k_BSKH, v_BSKH and which queries see them, [B,
    b, S].
    """

    def score(k_BSKH, sees_BbS):
        scores_BKGbS = jnp.einsum(
            "BbKGH,BSKH->BKGbS", q_BbKGH, k_BSKH, preferred_element_type=jnp.float32
        )
        # Finite, not -inf: the softmax of a row that sees nothing must not be NaN.
        return jnp.where(sees_BbS[:, None, None], scores_BKGbS, jnp.finfo(jnp.float32).min)

    weights_BKGbS = jax.nn.softmax(
        jnp.concatenate([score(k, sees) for k, _, sees in seen], axis=-1)
    )
    ends = np.cumsum([k_BSKH.shape[1] for k_BSKH, _, _ in seen])[:-1]
    parts = zip(jnp.split(weights_BKGbS, ends, axis=-1), seen, strict=True)
    sums = [
        jnp.einsum("BKGbS,BSKH->BbKGH", weights.astype(v.dtype), v) for weights, (_, v, _) in parts
    ]
    return functools.reduce(jnp.add, sums)
