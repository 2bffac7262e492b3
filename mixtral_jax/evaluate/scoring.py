"""Scores given continuations of given contexts, as multiple-choice tasks need."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import require
from mixtral_jax.generate.batch import num_rows, place
from mixtral_jax.generate.cache import bucket
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.parallel.mesh import matmul_precision
from mixtral_jax.pretrained import Pretrained
from mixtral_jax.training.loss import cross_entropy

_MAX_TOKENS_PER_DEVICE = 2048
# The logits of a row are computed in parts of this many tokens, to bound their memory.
_MAX_LOGITS_PER_ROW = 512


@dataclasses.dataclass(frozen=True)
class Pair:
    """The ids of a context and of its continuation."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Score:
    """The log-probability of a continuation in nats, and whether greedy decoding would give it."""

    loglikelihood: float
    is_greedy: bool


def score_pairs(loaded: Pretrained, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
    """Yields the index and the score of each pair, the longest pairs first.

    With this order, the rows of a batch have similar lengths.

    Raises:
        ConfigError: a context is empty.
    """
    require(
        all(len(pair.context) for pair in pairs),
        "a context must have at least one token, such as BOS",
    )
    lengths = np.array([len(pair.context) + len(pair.continuation) - 1 for pair in pairs], np.int64)
    left = np.argsort(-lengths, kind="stable")
    devices = loaded.model.rules.count_row_devices(loaded.mesh)
    while len(left):
        T = bucket(int(lengths[left[0]]))
        chosen, left = np.split(left, [devices * max(1, _MAX_TOKENS_PER_DEVICE // T)])
        yield from zip(
            chosen.tolist(), _score_rows(loaded, [pairs[i] for i in chosen], T), strict=True
        )


def _score_rows(loaded: Pretrained, pairs: Sequence[Pair], T: int) -> Iterator[Score]:
    B = num_rows(len(pairs), loaded.mesh, loaded.model.rules)
    tokens_BT, targets_BT, mask_BT, segment_ids_BT = np.zeros((4, B, T), np.int32)
    for row, pair in enumerate(pairs):
        ids = [*pair.context, *pair.continuation]
        end, num_new = len(ids) - 1, len(pair.continuation)
        tokens_BT[row, :end], targets_BT[row, :end] = ids[:-1], ids[1:]
        segment_ids_BT[row, :end] = 1
        mask_BT[row, end - num_new : end] = 1
    arrays = (tokens_BT, targets_BT, mask_BT, segment_ids_BT)
    with (
        jax.set_mesh(loaded.mesh),
        jax.default_matmul_precision(matmul_precision(loaded.config.model.dtype)),
    ):
        rows = (place(array, loaded.mesh, loaded.model.rules) for array in arrays)
        sums = jax.tree.map(np.asarray, _sum_rows(loaded.model, *rows))
    for nats, misses in zip(sums.nats_B[: len(pairs)], sums.misses_B[: len(pairs)], strict=True):
        yield Score(-float(nats), bool(misses == 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _RowSums:
    """Sums over the masked targets of each row.

    Attributes:
        nats_B: the loss in nats.
        misses_B: the number of targets that are not the most likely token.
    """

    nats_B: jax.Array
    misses_B: jax.Array


@jax.jit
def _sum_rows(
    model: Transformer,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    segment_ids_BT: jax.Array,
) -> _RowSums:
    """Sums over the masked targets of each row. The results are replicated."""
    x_BTD = model.run_blocks(tokens_BT, segment_ids_BT=segment_ids_BT).x_BTD
    size = min(tokens_BT.shape[1], _MAX_LOGITS_PER_ROW)

    def add_part(sums, start):
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1
        )
        logits_BtV, targets_Bt = model.to_logits(part(x_BTD)), part(targets_BT)
        mask_Bt = part(mask_BT)
        nats_Bt = cross_entropy(logits_BtV, targets_Bt) * mask_Bt.astype(jnp.float32)
        nats_B = jnp.sum(nats_Bt, axis=1)
        misses_B = jnp.sum((jnp.argmax(logits_BtV, axis=-1) != targets_Bt) & (mask_Bt > 0), axis=1)
        return jax.tree.map(jnp.add, sums, _RowSums(nats_B, misses_B)), None

    B, T = tokens_BT.shape
    zeros = [
        jnp.zeros(B, dtype, out_sharding=model.rules.spec("batch"))
        for dtype in (jnp.float32, jnp.int32)
    ]
    sums, _ = jax.lax.scan(add_part, _RowSums(*zeros), jnp.arange(0, T, size))
    return jax.tree.map(lambda x_B: jax.reshard(x_B, jax.P(None)), sums)
