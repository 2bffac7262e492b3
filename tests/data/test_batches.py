"""Training batches: their order, their layout on the mesh, their hash; and held-out batches."""

import contextlib
import dataclasses
import threading

import jax
import numpy as np
import pytest

from mixtral_jax.config import ConfigError, MeshConfig
from mixtral_jax.data import batches
from mixtral_jax.data.batches import TrainBatches, held_out_batches
from mixtral_jax.data.packing import make_row, plan_rows
from mixtral_jax.data.store import TokenStore
from mixtral_jax.parallel.batch import batch_spec
from mixtral_jax.parallel.mesh import make_mesh
from mixtral_jax.parallel.rules import AxisRules

BATCH, LENGTH = 8, 16
FIELDS = {"tokens", "targets", "loss_mask", "segment_ids", "positions"}
MESHES = [
    MeshConfig(data=8, expert=1),
    MeshConfig(data=1, expert=4, fsdp=2),
    MeshConfig(data=1, expert=2, fsdp=2, tensor=2),
    MeshConfig(data=1, expert=1, tensor=8),
]


def make_store(num_documents):
    lengths = np.random.default_rng(0).integers(3, 40, num_documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.random.default_rng(1).integers(1, 1000, offsets[-1]).astype(np.uint16)
    return TokenStore(tokens, offsets, f"{num_documents} documents")


STORE = make_store(60)
PLAN = plan_rows(STORE, LENGTH)


def make_batches(*, seed=0, gradient_accumulation=1, mesh=MESHES[0], store=STORE, plan=PLAN):
    return TrainBatches(
        store,
        plan,
        batch_size=BATCH,
        gradient_accumulation=gradient_accumulation,
        seed=seed,
        mesh=make_mesh(mesh),
        rules=AxisRules(),
    )


def take(source, count, start=0):
    """The batches as numpy, and their hashes."""
    iterator = source.iterate(start)
    taken = [next(iterator) for _ in range(count)]
    iterator.close()
    return [
        ({name: np.asarray(array) for name, array in vars(batch).items() if name in FIELDS}, digest)
        for batch, digest in taken
    ]


def assert_same(taken, expected):
    for (arrays, digest), (other_arrays, other_digest) in zip(taken, expected, strict=True):
        assert digest == other_digest
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, other_arrays[name])


def test_a_batch_holds_the_rows_it_names():
    source = make_batches()
    ((arrays, _),) = take(source, 1, start=3)
    rows = [make_row(STORE, PLAN, i) for i in source.row_ids(3)]
    for name, array in arrays.items():
        assert array.shape == (1, BATCH, LENGTH) and array.dtype == np.int32
        np.testing.assert_array_equal(array[0], np.stack([getattr(row, name) for row in rows]))


def test_iterating_from_k_is_iterating_from_the_start():
    assert_same(take(make_batches(), 3, start=5), take(make_batches(), 8)[5:])


def test_every_epoch_is_another_permutation_of_the_rows():
    source = make_batches()
    order = np.concatenate([source.row_ids(b) for b in range(3 * PLAN.num_rows // BATCH + 1)])
    epochs = order[: 3 * PLAN.num_rows].reshape(3, PLAN.num_rows)
    assert all(sorted(epoch) == list(range(PLAN.num_rows)) for epoch in epochs)
    assert len({epoch.tobytes() for epoch in epochs}) == 3


def test_the_seed_alone_changes_the_order():
    assert np.array_equal(make_batches(seed=7).row_ids(0), make_batches(seed=7).row_ids(0))
    orders = [make_batches(seed=seed) for seed in (0, 1, 2**32, 2**40, 2**64, 2**64 + 1)]
    assert (
        len({np.concatenate([order.row_ids(b) for b in range(4)]).tobytes() for order in orders})
        == 6
    )


def test_seeds_are_no_shifted_epochs_of_each_other():
    rows = PLAN.num_rows
    first, second = (
        np.concatenate([make_batches(seed=seed).row_ids(b) for b in range(2 * rows // BATCH + 1)])
        for seed in (0, 1)
    )
    assert not np.array_equal(first[rows : 2 * rows], second[:rows])


def test_hashes_differ_between_batches_and_plans():
    hashes = [digest for _, digest in take(make_batches(), 6)]
    other = take(make_batches(plan=plan_rows(STORE, LENGTH + 1)), 1)[0][1]
    assert len({*hashes, other}) == 7
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in hashes)


def test_gradient_accumulation_only_reshapes():
    whole = take(make_batches(mesh=MESHES[3]), 2)
    dealt = take(make_batches(mesh=MESHES[3], gradient_accumulation=4), 2)
    assert dealt[0][0]["tokens"].shape == (4, BATCH // 4, LENGTH)
    joined = [
        ({name: a.reshape(1, BATCH, LENGTH) for name, a in arrays.items()}, digest)
        for arrays, digest in dealt
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("mesh", MESHES)
def test_batches_are_the_same_on_every_mesh(mesh):
    source = make_batches(mesh=mesh)
    iterator = source.iterate(0)
    batch, _ = next(iterator)
    iterator.close()
    assert isinstance(batch.tokens, jax.Array)
    assert batch.tokens.sharding.is_equivalent_to(
        jax.sharding.NamedSharding(make_mesh(mesh), batch_spec(AxisRules())), ndim=3
    )
    assert_same(take(source, 2), take(make_batches(), 2))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_row_is_made_once_for_all_arrays_and_copies(monkeypatch, mesh):
    made = []
    monkeypatch.setattr(
        batches, "make_row", lambda store, plan, i: made.append(i) or make_row(store, plan, i)
    )
    held_out_batches(
        STORE, PLAN, num_sequences=BATCH, batch_size=BATCH, mesh=make_mesh(mesh), rules=AxisRules()
    )
    assert len(made) == len(set(made)) == BATCH


def test_a_small_plan_is_read_several_times_in_a_batch():
    store = make_store(2)
    plan = plan_rows(store, 64)
    assert plan.num_rows < BATCH // 2
    rows = make_batches(store=store, plan=plan).row_ids(0)
    assert set(rows) == set(range(plan.num_rows))


def test_the_thread_ends_with_the_iterator():
    iterator = make_batches().iterate(0)
    next(iterator)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    iterator.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_batches_are_placed_on_the_devices_before_they_are_asked_for(monkeypatch):
    placed, is_made = [], threading.Event()
    place = batches._place_rows

    def note(*arguments, **layout):
        batch = place(*arguments, **layout)
        placed.append(batch)
        if len(placed) == 3:
            is_made.set()
        return batch

    monkeypatch.setattr(batches, "_place_rows", note)
    with contextlib.closing(make_batches().iterate(0)) as iterator:
        first, _ = next(iterator)
        assert is_made.wait(timeout=60)
    assert first is placed[0]
    assert all(isinstance(batch.tokens, jax.Array) for batch in placed)


def test_a_failure_in_the_thread_reaches_the_caller(monkeypatch):
    def fail(store, plan, i):
        raise OSError("the disk is gone")

    monkeypatch.setattr(batches, "make_row", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        next(make_batches().iterate(0))


def sample_held_out(num_sequences):
    return held_out_batches(
        STORE,
        PLAN,
        num_sequences=num_sequences,
        batch_size=BATCH,
        mesh=make_mesh(MESHES[0]),
        rules=AxisRules(),
    )


def test_the_held_out_sample_is_spread_evenly_and_padded_with_masked_rows():
    sample = sample_held_out(12)
    assert [batch.tokens.shape for batch in sample] == [(1, BATCH, LENGTH)] * 2
    tokens = np.concatenate([np.asarray(batch.tokens)[0] for batch in sample])
    rows = [make_row(STORE, PLAN, i * PLAN.num_rows // 12).tokens for i in range(12)]
    np.testing.assert_array_equal(tokens[:12], np.stack(rows))
    assert all(not np.asarray(array)[0, 4:].any() for array in jax.tree.leaves(sample[1]))


def test_the_held_out_sample_is_at_most_the_whole_plan():
    counted = sum(int(np.asarray(batch.loss_mask).sum()) for batch in sample_held_out(10_000))
    assert counted == PLAN.lengths.sum()


def test_a_plan_without_rows_is_a_config_error():
    empty = make_store(0)
    plan = plan_rows(empty, LENGTH)
    with pytest.raises(ConfigError, match=r"data.path gives no train row: give more text"):
        make_batches(store=empty, plan=plan)
    with pytest.raises(ConfigError, match="no held-out row"):
        held_out_batches(
            empty,
            plan,
            num_sequences=4,
            batch_size=BATCH,
            mesh=make_mesh(MESHES[0]),
            rules=AxisRules(),
        )


SOURCES = dataclasses.replace(STORE, documents_by_source=(45, 15))


def test_sources_are_dealt_out_by_their_weights_each_in_epochs_of_its_own():
    plan = plan_rows(SOURCES, LENGTH)
    first, second = plan.rows_by_source
    batches = TrainBatches(
        SOURCES,
        plan,
        batch_size=BATCH,
        gradient_accumulation=1,
        seed=3,
        mesh=make_mesh(MESHES[0]),
        rules=AxisRules(),
        weights=[1.0, 3.0],
    )
    rows = np.concatenate([batches.row_ids(number) for number in range(10)])
    np.testing.assert_array_equal(rows[8:16], batches.row_ids(1))
    assert (rows < first).sum() == 20 and (rows >= first).sum() == 60
    own = rows[rows >= first][: second * (60 // second)].reshape(-1, second)
    assert all(sorted(epoch) == list(range(first, first + second)) for epoch in own)
    assert len({tuple(epoch) for epoch in own}) > 1


def test_a_source_with_a_weight_and_no_row_is_a_config_error():
    with pytest.raises(ConfigError, match="source 2 has a weight, and no row"):
        TrainBatches(
            STORE,
            PLAN,
            batch_size=BATCH,
            gradient_accumulation=1,
            seed=3,
            mesh=make_mesh(MESHES[0]),
            rules=AxisRules(),
            weights=[1.0, 3.0],
        )


def test_a_batch_without_a_token_to_learn_is_a_config_error():
    plan = dataclasses.replace(PLAN, num_supervised=np.zeros(PLAN.num_rows, np.int64))
    with pytest.raises(ConfigError, match="batch 2 has no token to learn"):
        next(make_batches(plan=plan).iterate(2))
