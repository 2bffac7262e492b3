"""Rows in training order, as batches on the mesh; and a fixed sample of held-out rows.

Batch b is a pure function of (plan, seed, b), so the place of a run in its data is one integer and
the number of processes may change. What lies in a row is for `packing`.
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

_FIELDS = tuple(field.name for field in dataclasses.fields(Batch))
_PREFETCHED = 2
_NO_ROW = -1


class TrainBatches:
    """The batches of a run, without end: epoch after epoch, each in an order of its own.

    Global row i is row `permutation(seed, epoch)[i % num_rows]` of the plan, epoch = i // num_rows;
    batch b is the global rows from b * batch_size. A plan smaller than a batch is read several
    times in it. With weights, sources are dealt out evenly in that proportion, each in epochs of
    its own.

    Args:
        batch_size: sequences in a batch, over all processes.
        gradient_accumulation: micro-batches they are dealt into; changes the shape, not the rows.
        weights: the parts of the sources; None: each row of the plan once an epoch.

    Raises:
        ConfigError: the plan has no row, or none of a source that has a weight.
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
        """Batch `start` and all that follow, made ahead in a thread that ends with the iterator.

        Yields:
            The batch, its arrays [gradient_accumulation, batch_size / gradient_accumulation, T];
            and a hash of 16 hex digits of the plan and the batch's rows, which is all that the
            batch depends on: equal on every process, and for any number of processes and
            micro-batches.
        """
        maker = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        try:
            made = collections.deque(
                maker.submit(self._make, start + ahead) for ahead in range(_PREFETCHED)
            )
            for number in itertools.count(start + _PREFETCHED):
                made.append(maker.submit(self._make, number))
                yield made.popleft().result()
        finally:
            maker.shutdown(cancel_futures=True)

    def row_ids(self, number: int) -> np.ndarray:
        """The rows of the plan that batch `number` holds, int64 [batch_size]."""
        size = self._shape[0] * self._shape[1]
        return np.array(
            [self._order[i] for i in range(number * size, (number + 1) * size)], np.int64
        )

    def _make(self, number: int) -> tuple[Batch, str]:
        row_ids = self.row_ids(number)
        require(
            self._plan.num_supervised[row_ids].any(),
            f"batch {number} has no token to learn: its mean loss would be 0 / 0. Leave such rows "
            "out of data.path",
        )
        digest = hashlib.sha256(self._plan.fingerprint.encode() + row_ids.tobytes())
        return self._place(row_ids.reshape(self._shape)), digest.hexdigest()[:16]


def held_out_batches(
    store: TokenStore,
    plan: PackPlan,
    *,
    num_sequences: int,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
) -> list[Batch]:
    """`spread_batches` of a plan that must have rows, all at once.

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
    """Always the same rows, at most `num_sequences`, spread evenly over the plan.

    Arrays are [1, batch_size, T]; the last batch is filled up with rows that are masked throughout.
    """
    for ids in _spread_row_ids(plan, num_sequences, batch_size):
        yield _place_rows(store, plan, ids[None], mesh=mesh, rules=rules)


def spread_labels(
    labels: Sequence[Callable[[int], np.ndarray]],
    plan: PackPlan,
    *,
    num_sequences: int,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
) -> Iterator[jax.Array]:
    """Beside each of `spread_batches`: what `labels` say of its inputs, int32 [len(labels),
    batch_size, T].

    Args:
        labels: each a number for every token of a document, of which 0 is also that of padding.
    """
    sharding = jax.sharding.NamedSharding(mesh, batch_spec(rules))
    # Pieces of one document are often in rows that are made together.
    remembered = [functools.lru_cache(maxsize=64)(label) for label in labels]

    def build(ids: np.ndarray, index: Any) -> np.ndarray:
        block = np.zeros((len(labels), *ids[index[1]].shape, plan.sequence_length), np.int32)
        for (number, place), _ in np.ndenumerate(block[..., 0]):
            if (row_id := int(ids[index[1]][place])) != _NO_ROW:
                block[number, place] = label_row(remembered[number], plan, row_id)
        return block

    for ids in _spread_row_ids(plan, num_sequences, batch_size):
        shape = (len(labels), batch_size, plan.sequence_length)
        yield jax.make_array_from_callback(shape, sharding, functools.partial(build, ids))


def _spread_row_ids(plan: PackPlan, num_sequences: int, batch_size: int) -> Iterator[np.ndarray]:
    """The rows of each batch, int64 [batch_size]; the last are filled up with `_NO_ROW`."""
    count = min(num_sequences, plan.num_rows)
    padding = [_NO_ROW] * (-count % batch_size)
    row_ids = np.concatenate([np.arange(count) * plan.num_rows // max(count, 1), padding]).astype(
        np.int64
    )
    yield from row_ids.reshape(-1, batch_size)


def _shuffle(first: int, end: int, seed: int) -> grain.MapDataset:
    """Row ids without end, in another order every epoch."""
    return grain.MapDataset.range(first, end).seed(seed).shuffle().repeat()


def _mix(plan: PackPlan, seed: int, weights: Sequence[float]) -> grain.MapDataset:
    """Row ids of all sources, dealt out by their weights."""
    ends = list(itertools.accumulate(plan.rows_by_source))
    ends += [plan.num_rows] * (len(weights) - len(ends))
    for source, (first, end) in enumerate(itertools.pairwise([0, *ends])):
        require(
            end > first,
            f"data.path: source {source + 1} has a weight, and no row to train on: leave it out",
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
) -> Batch:
    """The rows `row_ids` [micro-batches, sequences] on the mesh; each process makes those it holds."""
    shape = (*row_ids.shape, plan.sequence_length)
    sharding = jax.sharding.NamedSharding(mesh, batch_spec(rules))

    @functools.cache  # Five arrays, and every device that holds a copy, ask for the same rows.
    def build(first: int, end: int) -> np.ndarray:
        return _build_rows(store, plan, row_ids[:, first:end])

    def place(field: int) -> jax.Array:
        def cut(index: Any) -> np.ndarray:
            first, end, _ = index[1].indices(shape[1])
            return build(first, end)[field]

        return jax.make_array_from_callback(shape, sharding, cut)

    return Batch(*map(place, range(len(_FIELDS))))


def _build_rows(store: TokenStore, plan: PackPlan, row_ids: np.ndarray) -> np.ndarray:
    """int32 [fields of Batch, *row_ids.shape, T]; zeros, masked throughout, where there is no row."""
    block = np.zeros((len(_FIELDS), *row_ids.shape, plan.sequence_length), np.int32)
    for place, row_id in np.ndenumerate(row_ids):
        if row_id != _NO_ROW:
            row = make_row(store, plan, row_id)
            for field, name in enumerate(_FIELDS):
                block[field, *place] = getattr(row, name)
    return block
