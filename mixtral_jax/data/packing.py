"""Packs documents of any length into rows of one length, by a plan made once.

A plan says which pieces of which documents lie in each row; `make_row` reads them. The order in
which rows are trained on, and their place on the devices, are for `batches`.
"""

import bisect
import dataclasses
import hashlib

import numpy as np

from mixtral_jax.data.text import TokenStore


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """The pieces of every row; row r has pieces `row_offsets[r]` to `row_offsets[r + 1]`.

    Attributes:
        sequence_length: tokens in a row.
        documents: int64 [num_pieces], the document a piece is cut from.
        starts: int64 [num_pieces], its first token in that document.
        lengths: int64 [num_pieces], its (input, target) pairs: it reads one token more.
        row_offsets: int64 [num_rows + 1].
        fingerprint: hex; equal if and only if every row is.
    """

    sequence_length: int
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    row_offsets: np.ndarray
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Rows in an epoch."""
        return len(self.row_offsets) - 1


@dataclasses.dataclass(frozen=True)
class Row:
    """A packed row, every array int32 [sequence_length]; the fields mean what they do in `Batch`."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def plan_rows(store: TokenStore, sequence_length: int) -> PackPlan:
    """Cuts every document into pieces of at most `sequence_length` pairs and packs those into rows.

    A document of n tokens is n - 1 pairs of a token and the next. Neighbouring pieces share a token,
    the last target of one and the first input of the other, so that each token after BOS is a target
    exactly once.
    """
    documents, starts, lengths = _cut_pieces(np.diff(store.offsets) - 1, sequence_length)
    rows = _assign_rows(lengths, sequence_length)
    order = np.argsort(rows, kind="stable")
    documents, starts, lengths, rows = documents[order], starts[order], lengths[order], rows[order]
    num_rows = int(rows[-1]) + 1 if len(rows) else 0
    row_offsets = np.searchsorted(rows, np.arange(num_rows + 1)).astype(np.int64)
    digest = hashlib.sha256(f"{store.fingerprint} {sequence_length}".encode())
    for numbers in (documents, starts, lengths, row_offsets):
        digest.update(numbers.tobytes())
    return PackPlan(sequence_length, documents, starts, lengths, row_offsets, digest.hexdigest())


def make_row(store: TokenStore, plan: PackPlan, i: int) -> Row:
    """Row `i` of the plan: a pure function of its arguments."""
    row = Row(*np.zeros((5, plan.sequence_length), np.int32))
    end = 0
    for segment, piece in enumerate(range(plan.row_offsets[i], plan.row_offsets[i + 1]), start=1):
        length = plan.lengths[piece]
        first = store.offsets[plan.documents[piece]] + plan.starts[piece]
        tokens = store.tokens[first : first + length + 1]
        span = slice(end, end + length)
        row.tokens[span] = tokens[:-1]
        row.targets[span] = tokens[1:]
        row.loss_mask[span] = 1
        row.segment_ids[span] = segment
        row.positions[span] = np.arange(length)
        end += length
    return row


def _cut_pieces(num_pairs: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The document, start and length of every piece, int64, in the order of the text."""
    num_pieces = -(-num_pairs // sequence_length)
    documents = np.repeat(np.arange(len(num_pairs)), num_pieces)
    first_pieces = np.cumsum(num_pieces) - num_pieces
    starts = (np.arange(len(documents)) - first_pieces[documents]) * sequence_length
    return documents, starts, np.minimum(num_pairs[documents] - starts, sequence_length)


def _assign_rows(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """The row of every piece, int64: best fit, from the longest piece down.

    A piece goes to the row with the least space that still holds it; equal ones, in order.
    """
    rows = np.empty(len(lengths), np.int64)
    full = lengths == sequence_length
    num_rows = int(full.sum())
    rows[full] = np.arange(num_rows)
    rows_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # The keys of rows_by_space, ascending.
    rest = np.flatnonzero(~full)
    for piece in rest[np.argsort(-lengths[rest], kind="stable")]:
        length = int(lengths[piece])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, space = num_rows, sequence_length
            num_rows += 1
        else:
            space = spaces[at]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[at]
        rows[piece] = row
        left = space - length
        if left and left not in rows_by_space:
            bisect.insort(spaces, left)
            rows_by_space[left] = []
        if left:
            rows_by_space[left].append(row)
    return rows
