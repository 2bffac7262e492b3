"""Attention in blocks of queries and keys, in plain jax, for every back end.

Of the scores only one block exists at a time, in the forward and in the backward pass, so memory is
linear in the length of a row. Pairs of blocks in which no query may see a key are left out. The
softmax is corrected from block to block (FlashAttention, arXiv 2205.14135, algorithm 1), and the
backward pass computes the scores again (FlashAttention-2, arXiv 2307.08691, algorithm 2).

In the names of arrays, b is a block of queries and c a block of keys.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# On a CPU, the matmuls of smaller blocks are slower, and larger blocks leave out less of what
# causality forbids.
MAX_BLOCK_TOKENS = 256
# Finite, so that the softmax of a query that sees no key is not NaN.
_LOWEST_SCORE = float(np.finfo(np.float32).min)
# The name of the loop contains this and then the number of its steps without padding and documents.
_SCOPE = "pairs_of_blocks_"


def attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """As `kernels.attention.attend`, but queries are already scaled."""

    def per_device(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
        q_BKGTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
        k_BKTH, v_BKTH = (jnp.moveaxis(x_BTKH, 1, 2) for x_BTKH in (k_BTKH, v_BTKH))
        y_BKGTH = _attend(q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT)
        return jnp.moveaxis(y_BKGTH, 3, 1).reshape(B, T, N, H)

    # Along mesh axes that the inputs do not name, all devices compute the same result.
    out_specs = jax.typeof(q_BTNH).sharding.spec
    return jax.shard_map(per_device, out_specs=out_specs, check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, segment_ids_BT
    )


def count_pairs(loop_name: str) -> int | None:
    """How often a loop of this file runs on rows of one document each.

    Returns None if `loop_name` is not the name of such a loop.
    """
    found = re.search(rf"{_SCOPE}(\d+)", loop_name)
    return int(found.group(1)) if found else None


@jax.custom_vjp
def _attend(
    q_BKGTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    return _forward(q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT)[0]


def _forward(
    q_BKGTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segment_ids_BT: jax.Array
) -> tuple[jax.Array, Any]:
    pairs = _Pairs.of(segment_ids_BT)
    q, k, v = (pairs.pad(x) for x in (q_BKGTH, k_BKTH, v_BKTH))

    def add_keys(pair: "_Pair", carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        max_BKGb1, sum_BKGb1, y_BKGbH = map(pair.read_queries, carry)
        sees_BKGbc = pair.sees()
        scores_BKGbc = _score(pair.read_queries(q), pair.read_keys(k))
        scores_BKGbc = jnp.where(sees_BKGbc, scores_BKGbc, _LOWEST_SCORE)
        new_max_BKGb1 = jnp.maximum(max_BKGb1, jnp.max(scores_BKGbc, axis=-1, keepdims=True))
        # If a query has seen no key so far, all its scores are the lowest one, and exp gives 1.
        weights_BKGbc = jnp.where(sees_BKGbc, jnp.exp(scores_BKGbc - new_max_BKGb1), 0)
        shrink_BKGb1 = jnp.exp(max_BKGb1 - new_max_BKGb1)
        sum_BKGb1 = sum_BKGb1 * shrink_BKGb1 + jnp.sum(weights_BKGbc, axis=-1, keepdims=True)
        weighed_BKGbH = _matmul(
            "BKGbc,BKcH->BKGbH", weights_BKGbc.astype(v.dtype), pair.read_keys(v)
        )
        new = (new_max_BKGb1, sum_BKGb1, y_BKGbH * shrink_BKGb1 + weighed_BKGbH)
        return tuple(map(pair.write_queries, carry, new))

    zeros = jnp.zeros_like(q[..., :1], dtype=jnp.float32)
    start = (zeros + _LOWEST_SCORE, zeros, jnp.zeros_like(q, dtype=jnp.float32))
    max_BKGP1, sum_BKGP1, y_BKGPH = pairs.fold(add_keys, start)
    # The sum of a query that sees no key, which is padding, is 0.
    sum_BKGP1 = jnp.where(sum_BKGP1 > 0, sum_BKGP1, 1)
    y_BKGTH = pairs.unpad(y_BKGPH / sum_BKGP1).astype(q_BKGTH.dtype)
    log_sum_BKGT1 = pairs.unpad(max_BKGP1 + jnp.log(sum_BKGP1))
    return y_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, y_BKGTH, log_sum_BKGT1)


def _backward(residuals: Any, dy_BKGTH: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, y_BKGTH, log_sum_BKGT1 = residuals
    pairs = _Pairs.of(segment_ids_BT)
    along_y_BKGT1 = jnp.sum(
        y_BKGTH.astype(jnp.float32) * dy_BKGTH.astype(jnp.float32), axis=-1, keepdims=True
    )
    q, k, v, dy, log_sum, along_y = (
        pairs.pad(x) for x in (q_BKGTH, k_BKTH, v_BKTH, dy_BKGTH, log_sum_BKGT1, along_y_BKGT1)
    )

    def add_pair(pair: "_Pair", carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dq, dk, dv = carry
        q_BKGbH, dy_BKGbH, log_sum_BKGb1, along_y_BKGb1 = map(
            pair.read_queries, (q, dy, log_sum, along_y)
        )
        k_BKcH, v_BKcH = pair.read_keys(k), pair.read_keys(v)
        scores_BKGbc = _score(q_BKGbH, k_BKcH)
        weights_BKGbc = jnp.where(pair.sees(), jnp.exp(scores_BKGbc - log_sum_BKGb1), 0)
        dweights_BKGbc = _matmul("BKGbH,BKcH->BKGbc", dy_BKGbH, v_BKcH)
        dscores_BKGbc = (weights_BKGbc * (dweights_BKGbc - along_y_BKGb1)).astype(q.dtype)
        dq_BKGbH = _matmul("BKGbc,BKcH->BKGbH", dscores_BKGbc, k_BKcH)
        dk_BKcH = _matmul("BKGbc,BKGbH->BKcH", dscores_BKGbc, q_BKGbH)
        dv_BKcH = _matmul("BKGbc,BKGbH->BKcH", weights_BKGbc.astype(v.dtype), dy_BKGbH)
        return (
            pair.write_queries(dq, pair.read_queries(dq) + dq_BKGbH),
            pair.write_keys(dk, pair.read_keys(dk) + dk_BKcH),
            pair.write_keys(dv, pair.read_keys(dv) + dv_BKcH),
        )

    start = tuple(jnp.zeros_like(x, dtype=jnp.float32) for x in (q, k, v))
    gradients = map(pairs.unpad, pairs.fold(add_pair, start))
    inputs = (q_BKGTH, k_BKTH, v_BKTH)
    return *(dx.astype(x.dtype) for dx, x in zip(gradients, inputs, strict=True)), None


_attend.defvjp(_forward, _backward)


def _score(q_BKGbH: jax.Array, k_BKcH: jax.Array) -> jax.Array:
    return _matmul("BKGbH,BKcH->BKGbc", q_BKGbH, k_BKcH)


def _matmul(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A block of queries and a block of keys, by the number of their first token in a row.

    Every array that is read or written has the tokens of a row in the last dimension but one.
    """

    query: jax.Array | int
    key: jax.Array | int
    segment_ids_BP: jax.Array
    size: int

    def read_queries(self, x: jax.Array) -> jax.Array:
        return self._read(x, self.query)

    def read_keys(self, x: jax.Array) -> jax.Array:
        return self._read(x, self.key)

    def write_queries(self, x: jax.Array, block: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, block, self.query, axis=-2)

    def write_keys(self, x: jax.Array, block: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, block, self.key, axis=-2)

    def sees(self) -> jax.Array:
        """True for the keys of a query's own segment that are not after it: [B, 1, 1, b, c]."""
        ids_BP1 = self.segment_ids_BP[..., None]
        query_Bb, key_Bc = (read(ids_BP1)[..., 0] for read in (self.read_queries, self.read_keys))
        is_same_Bbc = (query_Bb[:, :, None] == key_Bc[:, None]) & (key_Bc > 0)[:, None]
        place = jnp.arange(self.size)
        is_earlier_bc = (self.key + place)[None] <= (self.query + place)[:, None]
        return (is_same_Bbc & is_earlier_bc[None])[:, None, None]

    def _read(self, x: jax.Array, start: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, self.size, axis=-2)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """All pairs of a block of queries and a block of keys that is not after it."""

    segment_ids_BP: jax.Array  # of T tokens, and then of padding up to a whole block
    T: int
    size: int

    @classmethod
    def of(cls, segment_ids_BT: jax.Array) -> "_Pairs":
        T = segment_ids_BT.shape[1]
        size = min(T, MAX_BLOCK_TOKENS)
        return cls(jnp.pad(segment_ids_BT, ((0, 0), (0, -T % size))), T, size)

    def pad(self, x: jax.Array) -> jax.Array:
        unchanged = ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, (*unchanged, (0, -self.T % self.size), (0, 0)))

    def unpad(self, x: jax.Array) -> jax.Array:
        return x[..., : self.T, :]

    def fold(self, body: Callable[[_Pair, Any], Any], carry: Any) -> Any:
        """Folds `body(pair, carry)` over the pairs in which a query may see a key."""

        def step(starts: Any, carry: Any) -> Any:
            query, key = starts
            return body(_Pair(query, key, self.segment_ids_BP, self.size), carry)

        num_blocks = self.segment_ids_BP.shape[1] // self.size
        if num_blocks == 1:
            return step((0, 0), carry)
        query_X, key_X = np.tril_indices(num_blocks)
        is_needed_X = self._overlap(num_blocks)[query_X, key_X]
        order_X = jnp.argsort(~is_needed_X, stable=True)
        starts_X2 = self.size * jnp.asarray(np.stack([query_X, key_X], axis=1))[order_X]
        with jax.named_scope(f"{_SCOPE}{len(query_X)}"):
            return jax.lax.fori_loop(
                0, jnp.sum(is_needed_X), lambda i, carry: step(starts_X2[i], carry), carry
            )

    def _overlap(self, num_blocks: int) -> jax.Array:
        """Whether two blocks of any row may hold tokens of one segment: [blocks, blocks]."""
        ids_BNb = self.segment_ids_BP.reshape(-1, num_blocks, self.size)
        last_BN = jnp.max(ids_BNb, axis=-1)
        first_BN = jnp.min(jnp.where(ids_BNb > 0, ids_BNb, jnp.iinfo(jnp.int32).max), axis=-1)
        overlap_BNN = (first_BN[:, :, None] <= last_BN[:, None]) & (
            first_BN[:, None] <= last_BN[:, :, None]
        )
        return jnp.any(overlap_BNN, axis=0)
