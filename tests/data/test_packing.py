"""Packed rows: every target once, nothing from another document, little padding."""

import numpy as np
import pytest

from mixtral_jax.data.packing import make_row, plan_rows
from mixtral_jax.data.text import TokenStore


def make_store(lengths, seed=0):
    """Documents of these lengths, BOS and EOS included; every id is another, so that rows can be traced back."""
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
    place = np.argsort(lumpy.tokens)  # Of token id + 1.
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
        assert all(not field[~used].any() for field in vars(row).values())
        assert all(field.dtype == np.int32 for field in vars(row).values())


def test_a_lumpy_corpus_fills_its_rows(lumpy):
    plan = plan_rows(lumpy, 128)
    assert plan.lengths.sum() > 0.95 * plan.num_rows * 128


def test_pieces_that_fit_nowhere_lie_alone():
    plan = plan_rows(make_store([7, 7, 7]), 10)
    assert plan.num_rows == 3


def test_full_pieces_fill_rows_and_the_best_fit_is_taken():
    plan = plan_rows(make_store([1 + 10, 1 + 7, 1 + 4, 1 + 6, 1 + 3]), 10)
    assert np.split(plan.lengths, plan.row_offsets[1:-1])[0].tolist() == [10]
    assert sorted(sum(row) for row in np.split(plan.lengths, plan.row_offsets[1:-1])) == [10, 10, 10]


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
