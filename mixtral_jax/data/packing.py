"""Packs documents of any length into rows of one length, by a plan made once.

A plan lists the pieces of documents in each row; `make_row` reads them. `batches` decides in which
order rows are trained on, and places them on the devices.
"""

import bisect
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np

from mixtral_jax.config import require
from mixtral_jax.data.store import TokenStore
from mixtral_jax.parallel.batch import Batch

LongDocuments = Literal["split", "cut", "drop", "error"]


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """The pieces of every row; row r has pieces `row_offsets[r]` to `row_offsets[r + 1]`.

    Attributes:
        sequence_length: tokens per row.
        documents: int64 [num_pieces], the document that a piece is cut from.
        starts: int64 [num_pieces], its first token in that document.
        lengths: int64 [num_pieces], its number of (input, target) pairs; it reads one token more.
        row_offsets: int64 [num_rows + 1].
        num_supervised: int64 [num_rows], the number of targets in a row that are trained on.
        rows_by_source: number of rows from each source, in order; no row mixes sources.
        num_long: number of documents longer than a row.
        num_unsupervised: number of documents left out because none of their targets that fit is
            trained on.
        fingerprint: hex; two plans have equal fingerprints if and only if all rows are equal.
    """

    sequence_length: int
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    row_offsets: np.ndarray
    num_supervised: np.ndarray
    rows_by_source: tuple[int, ...]
    num_long: int
    num_unsupervised: int
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Number of rows per epoch."""
        return len(self.row_offsets) - 1


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Pieces of documents, as in `PackPlan`; `supervised` counts the targets trained on."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray

    def select(self, which: np.ndarray) -> "_Pieces":
        """Selects pieces by a mask, or orders them by indices."""
        return _Pieces(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))


def plan_rows(
    store: TokenStore,
    sequence_length: int,
    *,
    long_documents: LongDocuments = "split",
    key: str = "train.sequence_length",
) -> PackPlan:
    """Packs documents into rows of `sequence_length` (input, target) pairs.

    A document of n tokens has n - 1 pairs. Pieces without a target to train on are left out.

    Args:
        long_documents: what to do with documents longer than a row. `split` cuts them into pieces;
            neighbouring pieces share a token, the last target of one and the first input of the
            next, so that each token after BOS is a target exactly once. `cut` keeps the first
            piece. `drop` leaves them out. `error` raises if there are any.
        key: the key or flag that sets `sequence_length`, for the message of an error.

    Raises:
        ConfigError: a document is too long and `long_documents` is `error`.
    """
    num_pairs = np.diff(store.offsets) - 1
    num_long = int((num_pairs > sequence_length).sum())
    require(
        not num_long or long_documents != "error",
        f"{num_long} of {len(num_pairs)} conversations are longer than "
        f"{key}={sequence_length}, the longest of {num_pairs.max(initial=0) + 1} "
        "tokens: raise it, or set data.chat.long_rows to cut or drop (mixtral-jax data validate "
        f"--sequence_length={sequence_length} names them)",
    )
    all_pieces = _cut_pieces(store, num_pairs, sequence_length, long_documents)
    pieces = all_pieces.select(all_pieces.supervised > 0)
    rows, rows_by_source = _assign_by_source(pieces, store.documents_by_source, sequence_length)
    order = np.argsort(rows, kind="stable")
    pieces, rows = pieces.select(order), rows[order]
    num_rows = sum(rows_by_source)
    row_offsets = np.searchsorted(rows, np.arange(num_rows + 1)).astype(np.int64)
    digest = hashlib.sha256(f"{store.fingerprint} {sequence_length}".encode())
    for numbers in (pieces.documents, pieces.starts, pieces.lengths, row_offsets):
        digest.update(numbers.tobytes())
    return PackPlan(
        sequence_length,
        pieces.documents,
        pieces.starts,
        pieces.lengths,
        row_offsets,
        num_supervised=np.bincount(rows, pieces.supervised, minlength=num_rows).astype(np.int64),
        rows_by_source=rows_by_source,
        num_long=num_long,
        num_unsupervised=len(np.unique(all_pieces.documents)) - len(np.unique(pieces.documents)),
        fingerprint=digest.hexdigest(),
    )


def make_row(store: TokenStore, plan: PackPlan, i: int) -> Batch:
    """Makes row `i` of the plan, in arrays [sequence_length]: a pure function of its arguments."""
    tokens, targets, loss_mask, segment_ids, positions, text_bytes = np.zeros(
        (6, plan.sequence_length), np.int32
    )
    end = 0
    for segment, piece in enumerate(range(plan.row_offsets[i], plan.row_offsets[i + 1]), start=1):
        length = plan.lengths[piece]
        document = store.read(plan.documents[piece], plan.starts[piece], length + 1)
        span = slice(end, end + length)
        tokens[span] = document.tokens[:-1]
        targets[span] = document.tokens[1:]
        loss_mask[span] = 1 if document.loss_mask is None else document.loss_mask[1:]
        segment_ids[span] = segment
        positions[span] = np.arange(length)
        if document.text_bytes is not None:
            text_bytes[span] = document.text_bytes[1:]
        end += length
    has_text_bytes = store.text_bytes is not None
    return Batch(
        tokens, targets, loss_mask, segment_ids, positions, text_bytes if has_text_bytes else None
    )


def label_row(label: Callable[[int], np.ndarray], plan: PackPlan, i: int) -> np.ndarray:
    """Labels each input of row `i`, int32 [sequence_length]; padding has label 0.

    Args:
        label: gives a number for each token of a document.
    """
    row, end = np.zeros(plan.sequence_length, np.int32), 0
    for piece in range(plan.row_offsets[i], plan.row_offsets[i + 1]):
        start, length = plan.starts[piece], plan.lengths[piece]
        row[end : end + length] = label(plan.documents[piece])[start : start + length]
        end += length
    return row


def _cut_pieces(
    store: TokenStore, num_pairs: np.ndarray, sequence_length: int, long_documents: LongDocuments
) -> _Pieces:
    """Cuts all pieces, in the order of the text; `num_pairs`: number of pairs per document."""
    num_pieces = -(-num_pairs // sequence_length)
    if long_documents != "split":
        num_pieces = np.minimum(num_pieces, 1)
    if long_documents == "drop":
        num_pieces = np.where(num_pairs > sequence_length, 0, num_pieces)
    documents = np.repeat(np.arange(len(num_pairs)), num_pieces)
    first_pieces = np.cumsum(num_pieces) - num_pieces
    starts = (np.arange(len(documents)) - first_pieces[documents]) * sequence_length
    lengths = np.minimum(num_pairs[documents] - starts, sequence_length)
    return _Pieces(documents, starts, lengths, _count_supervised(store, documents, starts, lengths))


def _count_supervised(
    store: TokenStore, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Counts the targets of every piece that are trained on, int64."""
    if store.loss_mask is None or not len(documents):
        return lengths
    first = store.offsets[documents] + starts + 1
    bounds = np.stack([first, first + lengths], axis=1).reshape(-1)
    # reduceat sums between neighbouring bounds; every other sum is that of a piece. The appended 0
    # lets the last bound be the end of the store.
    return np.add.reduceat(np.append(store.loss_mask, np.uint8(0)), bounds, dtype=np.int64)[::2]


def _assign_by_source(
    pieces: _Pieces, documents_by_source: tuple[int, ...], sequence_length: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Packs each source by itself: gives the row of every piece, and the rows of each source."""
    first_documents = np.cumsum((0, *documents_by_source[:-1]))
    sources = np.searchsorted(first_documents, pieces.documents, side="right") - 1
    rows = np.empty(len(sources), np.int64)
    counts: list[int] = []
    for source in range(len(first_documents)):
        inside = sources == source
        own = _assign_rows(pieces.lengths[inside], sequence_length)
        rows[inside] = own + sum(counts)
        counts.append(int(own.max()) + 1 if len(own) else 0)
    return rows, tuple(counts)


def _assign_rows(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """Assigns a row to every piece, int64: best fit, longest piece first.

    A piece goes into the row with the least free space that still holds it; equal pieces in order.
    """
    rows = np.empty(len(lengths), np.int64)
    full = lengths == sequence_length
    num_rows = int(full.sum())
    rows[full] = np.arange(num_rows)
    rows_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # The keys of rows_by_space in ascending order.
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
