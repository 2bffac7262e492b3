"""Batches on the mesh: rows in training order, and a fixed sample of held-out rows.

Batch b is a pure function of (plan, seed, b). So a run resumes in its data from one integer, on any
number of processes. `packing` defines what is in a row.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from mixtral_jax.config import require
from mixtral_jax.data.packing import PackPlan, label_row, make_row
from mixtral_jax.data.store import TokenStore
from mixtral_jax.parallel.batch import Batch, batch_spec
from mixtral_jax.parallel.rules import AxisRules

_TRAIN_FIELDS = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
_NUM_PREFETCHED = 2
_NO_ROW = -1


@dataclasses.dataclass(frozen=True)
class _HashedBatch:
    batch: Batch
    row_hash: str


class TrainBatches:
    """The endless batches of a run: epoch after epoch, each in its own order.

    Global row i is row `permutation(seed, epoch)[i % num_rows]` of the plan, with epoch =
    i // num_rows; batch b holds the global rows from b * batch_size. A batch larger than the plan
    repeats rows. With weights, rows are drawn evenly from the sources in that proportion, and each
    source has its own epochs.

    Args:
        batch_size: sequences per batch, over all processes.
        gradient_accumulation: number of micro-batches per batch; changes the shape, not the rows.
        weights: the weight of each source; None: each row of the plan once per epoch.

    Raises:
        ConfigError: the plan has no row, or no row of a source that has a weight.
    """

    def __init__(
        self,
        store: TokenStore,
        plan: PackPlan,
        *,
        batch_size: int,
        gradient_accumulation: int,
        seed: int,
        mesh: jax.sharding.Mesh,
        rules: AxisRules,
        weights: Sequence[float] | None = None,
    ):
        _require_rows(plan, "train")
        self._plan = plan
        self._shape = (gradient_accumulation, batch_size // gradient_accumulation)
        self._order = _mix(plan, seed, weights) if weights else _shuffle(0, plan.num_rows, seed)
        self._place = functools.partial(_place_rows, store, plan, mesh=mesh, rules=rules)

    def iterate(self, start: int) -> Generator[tuple[Batch, str], None, None]:
        """Yields batch `start` and all that follow; a thread, which ends with the iterator, makes
        them ahead of time.

        Yields:
            The batch, its arrays [gradient_accumulation, batch_size / gradient_accumulation, T];
            and a hash, 16 hex digits, of the plan and the batch's row numbers, which determine the
            batch. It is equal on every process, and for any number of processes and micro-batches.
        """
        maker = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        try:
            made = collections.deque(
                maker.submit(self._make, start + ahead) for ahead in range(_NUM_PREFETCHED)
            )
            for number in itertools.count(start + _NUM_PREFETCHED):
                made.append(maker.submit(self._make, number))
                next_one = made.popleft().result()
                yield next_one.batch, next_one.row_hash
        finally:
            maker.shutdown(cancel_futures=True)

    def row_ids(self, number: int) -> np.ndarray:
        """The rows of the plan in batch `number`, int64 [batch_size]."""
        size = self._shape[0] * self._shape[1]
        return np.array(
            [self._order[i] for i in range(number * size, (number + 1) * size)], np.int64
        )

    def _make(self, number: int) -> _HashedBatch:
        row_ids = self.row_ids(number)
        require(
            self._plan.num_supervised[row_ids].any(),
            f"batch {number} has no token to learn, so its mean loss would be 0 / 0: leave rows "
            "without an answer that is trained on out of data.path, or raise train.batch_size",
        )
        digest = hashlib.sha256(self._plan.fingerprint.encode() + row_ids.tobytes())
        batch = self._place(row_ids.reshape(self._shape))
        return _HashedBatch(batch, digest.hexdigest()[:16])


def held_out_batches(
    store: TokenStore,
    plan: PackPlan,
    *,
    num_sequences: int,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
) -> list[Batch]:
    """Makes all of `spread_batches` at once, for a plan that must have rows.

    Raises:
        ConfigError: the plan has no row.
    """
    _require_rows(plan, "held-out")
    layout = {"mesh": mesh, "rules": rules}
    return list(
        spread_batches(store, plan, num_sequences=num_sequences, batch_size=batch_size, **layout)
    )


def spread_batches(
    store: TokenStore,
    plan: PackPlan,
    *,
    num_sequences: int,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
) -> Iterator[Batch]:
    """Makes batches of at most `num_sequences` rows spread evenly over the plan, always the same.

    Arrays are [1, batch_size, T]; the last batch is padded with rows whose mask is all 0.
    """
    fields = _TRAIN_FIELDS if store.text_bytes is None else (*_TRAIN_FIELDS, "text_bytes")
    for ids in _spread_row_ids(plan, num_sequences, batch_size):
        yield _place_rows(store, plan, ids[None], mesh=mesh, rules=rules, fields=fields)


def spread_labels(
    labels: Sequence[Callable[[int], np.ndarray]],
    plan: PackPlan,
    *,
    num_sequences: int,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
) -> Iterator[jax.Array]:
    """Labels the inputs in each of `spread_batches`, int32 [len(labels), batch_size, T].

    Args:
        labels: each gives a number for every token of a document; padding has label 0.
    """
    sharding = jax.sharding.NamedSharding(mesh, batch_spec(rules))
    # Rows that are made together often hold pieces of the same document.
    cached = [functools.lru_cache(maxsize=64)(label) for label in labels]

    def build(ids: np.ndarray, index: Any) -> np.ndarray:
        block = np.zeros((len(labels), *ids[index[1]].shape, plan.sequence_length), np.int32)
        for (number, place), _ in np.ndenumerate(block[..., 0]):
            if (row_id := int(ids[index[1]][place])) != _NO_ROW:
                block[number, place] = label_row(cached[number], plan, row_id)
        return block

    for ids in _spread_row_ids(plan, num_sequences, batch_size):
        shape = (len(labels), batch_size, plan.sequence_length)
        yield jax.make_array_from_callback(shape, sharding, functools.partial(build, ids))


def _spread_row_ids(plan: PackPlan, num_sequences: int, batch_size: int) -> Iterator[np.ndarray]:
    """The rows of each batch, int64 [batch_size]; the last batch is padded with `_NO_ROW`."""
    count = min(num_sequences, plan.num_rows)
    padding = [_NO_ROW] * (-count % batch_size)
    spread = np.arange(count) * plan.num_rows // max(count, 1)
    yield from np.concatenate([spread, padding]).astype(np.int64).reshape(-1, batch_size)


def _shuffle(first: int, end: int, seed: int) -> grain.MapDataset:
    """Endless row ids, in a new order every epoch."""
    return grain.MapDataset.range(first, end).seed(seed).shuffle().repeat()


def _mix(plan: PackPlan, seed: int, weights: Sequence[float]) -> grain.MapDataset:
    """Row ids of all sources, mixed in proportion to their weights."""
    ends = list(itertools.accumulate(plan.rows_by_source))
    ends += [plan.num_rows] * (len(weights) - len(ends))
    for source, (first, end) in enumerate(itertools.pairwise([0, *ends])):
        require(
            end > first,
            f"data.path: source {source + 1} has a weight, and no row to train on: give it more "
            "text, or leave it out",
        )
    parts = [_shuffle(first, end, seed) for first, end in itertools.pairwise([0, *ends])]
    return grain.MapDataset.mix(parts, list(weights))


def _require_rows(plan: PackPlan, side: str) -> None:
    require(
        plan.num_rows,
        f"data.path gives no {side} row: give more text, or change data.held_out_fraction",
    )


def _place_rows(
    store: TokenStore,
    plan: PackPlan,
    row_ids: np.ndarray,
    *,
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
    fields: Sequence[str] = _TRAIN_FIELDS,
) -> Batch:
    """Places these fields of the rows `row_ids` [micro-batches, sequences] on the mesh.

    Each process makes only the rows that its devices hold.
    """
    shape = (*row_ids.shape, plan.sequence_length)
    sharding = jax.sharding.NamedSharding(mesh, batch_spec(rules))

    @functools.cache  # Called with equal arguments for each field and for each copy on a device.
    def build(first: int, end: int) -> np.ndarray:
        return _build_rows(store, plan, row_ids[:, first:end], fields)

    def place(field: int) -> jax.Array:
        def cut(index: Any) -> np.ndarray:
            first, end, _ = index[1].indices(shape[1])
            return build(first, end)[field]

        return jax.make_array_from_callback(shape, sharding, cut)

    return Batch(**{name: place(field) for field, name in enumerate(fields)})


def _build_rows(
    store: TokenStore, plan: PackPlan, row_ids: np.ndarray, fields: Sequence[str]
) -> np.ndarray:
    """Makes int32 [fields, *row_ids.shape, T]; all zeros where there is no row."""
    block = np.zeros((len(fields), *row_ids.shape, plan.sequence_length), np.int32)
    for place, row_id in np.ndenumerate(row_ids):
        if row_id != _NO_ROW:
            row = make_row(store, plan, row_id)
            for field, name in enumerate(fields):
                block[field, *place] = getattr(row, name)
    return block
