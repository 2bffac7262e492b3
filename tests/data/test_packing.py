"""Packed rows: every target once, nothing from another document, little padding."""

import dataclasses

import jax
import numpy as np
import pytest

from mixtral_jax.config import ConfigError
from mixtral_jax.data.packing import make_row, plan_rows
from mixtral_jax.data.store import TokenStore


def make_store(lengths, seed=0):
    """Documents of these lengths, BOS and EOS included; every id is another, so that rows can be
    traced back.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.random.default_rng(seed).permutation(offsets[-1]).astype(np.uint32) + 1
    return TokenStore(tokens, offsets, f"store {seed}")


def make_rows(store, plan):
    return [make_row(store, plan, i) for i in range(plan.num_rows)]


@pytest.fixture(scope="module")
def lumpy():
    return make_store(np.random.default_rng(1).lognormal(4, 1.5, 500).astype(int) + 2)


@pytest.mark.parametrize("sequence_length", [2, 7, 64, 100_000])
def test_every_token_after_bos_is_a_target_exactly_once(lumpy, sequence_length):
    rows = make_rows(lumpy, plan_rows(lumpy, sequence_length))
    targets = np.concatenate([row.targets[row.loss_mask == 1] for row in rows])
    after_bos = np.delete(lumpy.tokens, lumpy.offsets[:-1])
    np.testing.assert_array_equal(np.sort(targets), np.sort(after_bos))


def test_a_segment_reads_one_document_in_order(lumpy):
    place = np.argsort(lumpy.tokens)  # place[i] is where token id i + 1 stands.
    for row in make_rows(lumpy, plan_rows(lumpy, 64)):
        for segment in range(1, row.segment_ids.max() + 1):
            inside = row.segment_ids == segment
            read = place[row.tokens[inside] - 1]
            np.testing.assert_array_equal(read, read[0] + np.arange(len(read)))
            np.testing.assert_array_equal(place[row.targets[inside] - 1], read + 1)
            documents = np.searchsorted(lumpy.offsets, [read[0], read[-1] + 1], side="right")
            assert documents[0] == documents[1]
            np.testing.assert_array_equal(row.positions[inside], np.arange(len(read)))


def test_segments_are_numbered_from_one_and_padding_is_zero(lumpy):
    for row in make_rows(lumpy, plan_rows(lumpy, 64)):
        used = row.segment_ids > 0
        steps = np.diff(row.segment_ids[used])
        assert row.segment_ids[0] == 1 and set(steps) <= {0, 1}
        np.testing.assert_array_equal(used, np.arange(64) < used.sum())
        np.testing.assert_array_equal(row.loss_mask, used.astype(np.int32))
        assert all(not field[~used].any() for field in jax.tree.leaves(row))
        assert all(field.dtype == np.int32 for field in jax.tree.leaves(row))


def test_a_lumpy_corpus_fills_its_rows(lumpy):
    plan = plan_rows(lumpy, 128)
    assert plan.lengths.sum() > 0.95 * plan.num_rows * 128


def test_pieces_that_fit_nowhere_lie_alone():
    plan = plan_rows(make_store([7, 7, 7]), 10)
    assert plan.num_rows == 3


def test_full_pieces_fill_rows_and_the_best_fit_is_taken():
    plan = plan_rows(make_store([1 + 10, 1 + 7, 1 + 4, 1 + 6, 1 + 3]), 10)
    assert np.split(plan.lengths, plan.row_offsets[1:-1])[0].tolist() == [10]
    assert sorted(sum(row) for row in np.split(plan.lengths, plan.row_offsets[1:-1])) == [
        10,
        10,
        10,
    ]


def test_the_plan_is_arrays_and_deterministic(lumpy):
    plan, again = plan_rows(lumpy, 64), plan_rows(lumpy, 64)
    for field in ("documents", "starts", "lengths", "row_offsets"):
        assert getattr(plan, field).dtype == np.int64
        np.testing.assert_array_equal(getattr(plan, field), getattr(again, field))
    assert plan.fingerprint == again.fingerprint


def test_the_fingerprint_follows_text_and_length(lumpy):
    other_text = make_store(np.diff(lumpy.offsets), seed=5)
    plans = [plan_rows(lumpy, 64), plan_rows(lumpy, 65), plan_rows(other_text, 64)]
    assert len({plan.fingerprint for plan in plans}) == 3


def test_row_i_does_not_depend_on_the_rows_read_before(lumpy):
    plan = plan_rows(lumpy, 64)
    forward = make_rows(lumpy, plan)
    for i in reversed(range(plan.num_rows)):
        np.testing.assert_array_equal(make_row(lumpy, plan, i).tokens, forward[i].tokens)


def test_an_empty_store_has_no_row():
    assert plan_rows(make_store([]), 8).num_rows == 0


def make_chats(lengths, seed=0):
    """Documents of these lengths with random masks; those of an even number end in a token to be
    learnt.
    """
    store = make_store(lengths, seed)
    mask = np.random.default_rng(seed + 1).integers(0, 2, len(store.tokens)).astype(np.uint8)
    mask[store.offsets[:-1]] = 0
    mask[store.offsets[1:][::2] - 1] = 1
    return dataclasses.replace(store, loss_mask=mask)


CHAT_LENGTHS = np.random.default_rng(2).integers(2, 40, 200)


@pytest.mark.parametrize(
    ("long", "sequence_length"), [("cut", 64), ("cut", 13), ("drop", 13), ("split", 13)]
)
def test_the_mask_goes_with_its_targets(long, sequence_length):
    store = make_chats(CHAT_LENGTHS)
    plan = plan_rows(store, sequence_length, long_documents=long)
    learnt = store.loss_mask[np.argsort(store.tokens)]  # learnt[i] is of token id i + 1.
    for row, num_supervised in zip(make_rows(store, plan), plan.num_supervised, strict=True):
        used = row.segment_ids > 0
        np.testing.assert_array_equal(row.loss_mask[used], learnt[row.targets[used] - 1])
        assert not row.loss_mask[~used].any()
        assert row.loss_mask.sum() == num_supervised > 0


def test_long_conversations_are_cut_dropped_or_an_error():
    lengths = np.array([12, 30, 5, 13, 8])
    store = dataclasses.replace(make_store(lengths), loss_mask=np.ones(lengths.sum(), np.uint8))
    cut, drop = (plan_rows(store, 11, long_documents=long) for long in ("cut", "drop"))
    assert cut.num_long == drop.num_long == 2
    assert sorted(cut.lengths) == [4, 7, 11, 11, 11] and not cut.starts.any()
    assert sorted(drop.lengths) == [4, 7, 11] and set(drop.documents) == {0, 2, 4}
    with pytest.raises(
        ConfigError, match=r"2 of 5 .*sequence_length=11, the longest of 30 tokens: .*cut or drop"
    ):
        plan_rows(store, 11, long_documents="error")
    assert plan_rows(store, 29, long_documents="error").num_long == 0


def test_documents_of_which_nothing_is_left_to_learn_are_left_out_and_counted():
    lengths = np.array([6, 9, 4])
    mask = np.zeros(lengths.sum(), np.uint8)
    mask[[5, 14, 18]] = 1  # The last of each.
    store = dataclasses.replace(make_store(lengths), loss_mask=mask)
    plan = plan_rows(store, 6, long_documents="cut")
    assert plan.num_unsupervised == 1 and set(plan.documents) == {0, 2}
    assert plan_rows(store, 8, long_documents="cut").num_unsupervised == 0
    assert plan_rows(dataclasses.replace(store, loss_mask=mask * 0), 8).num_rows == 0


def test_no_row_holds_two_sources():
    store = dataclasses.replace(make_chats(CHAT_LENGTHS), documents_by_source=(120, 0, 80))
    plan = plan_rows(store, 64, long_documents="cut")
    source_of_row = np.repeat([0, 1, 2], plan.rows_by_source)
    assert plan.rows_by_source[1] == 0 and len(source_of_row) == plan.num_rows
    for row, source in enumerate(source_of_row):
        documents = plan.documents[plan.row_offsets[row] : plan.row_offsets[row + 1]]
        assert {2 * (document >= 120) for document in documents} == {source}
