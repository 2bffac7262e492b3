"""Packs documents of any length into rows of one length, by a plan made once.

A plan says which pieces of which documents lie in each row; `make_row` reads them. The order in
which rows are trained on, and their place on the devices, are for `batches`.
"""

import bisect
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np

from mixtral_jax.config import require
from mixtral_jax.data.store import TokenStore

LongDocuments = Literal["split", "cut", "drop", "error"]


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """The pieces of every row; row r has pieces `row_offsets[r]` to `row_offsets[r + 1]`.

    Attributes:
        sequence_length: tokens in a row.
        documents: int64 [num_pieces], the document a piece is cut from.
        starts: int64 [num_pieces], its first token in that document.
        lengths: int64 [num_pieces], its (input, target) pairs: it reads one token more.
        row_offsets: int64 [num_rows + 1].
        num_supervised: int64 [num_rows], the targets of a row that are to be learnt.
        rows_by_source: how many rows come from each source, in order; no row holds two sources.
        num_long: documents longer than a row.
        num_unsupervised: documents left out because no target to be learnt was left of them.
        fingerprint: hex; equal if and only if every row is.
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


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Pieces of documents, as in `PackPlan`; `supervised` are their targets to be learnt."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray

    def select(self, which: np.ndarray) -> "_Pieces":
        """Some of them, by a mask or in an order."""
        return _Pieces(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))


def plan_rows(
    store: TokenStore, sequence_length: int, *, long_documents: LongDocuments = "split"
) -> PackPlan:
    """Packs documents, or pieces of them, into rows of `sequence_length` pairs of a token and the
    next.

    A document of n tokens is n - 1 pairs. Pieces without a target to be learnt are left out.

    Args:
        long_documents: what becomes of those of more pairs than a row has. `split`: pieces, of
            which neighbours share a token, the last target of one and the first input of the other,
            so that each token after BOS is a target exactly once. `cut`: the first piece alone.
            `drop`: nothing. `error`: there must be none.

    Raises:
        ConfigError: a document is too long where none may be.
    """
    num_pairs = np.diff(store.offsets) - 1
    num_long = int((num_pairs > sequence_length).sum())
    require(
        not num_long or long_documents != "error",
        f"{num_long} of {len(num_pairs)} conversations are longer than "
        f"train.sequence_length={sequence_length}, the "
        f"longest of {num_pairs.max(initial=0) + 1} tokens: lengthen it, or set "
        "data.chat.long_rows to cut or drop "
        f"(mixtral-jax data validate --sequence_length={sequence_length} names them)",
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


def make_row(store: TokenStore, plan: PackPlan, i: int) -> Row:
    """Row `i` of the plan: a pure function of its arguments."""
    row = Row(*np.zeros((5, plan.sequence_length), np.int32))
    end = 0
    for segment, piece in enumerate(range(plan.row_offsets[i], plan.row_offsets[i + 1]), start=1):
        length = plan.lengths[piece]
        document = store.read(plan.documents[piece], plan.starts[piece], length + 1)
        span = slice(end, end + length)
        row.tokens[span] = document.tokens[:-1]
        row.targets[span] = document.tokens[1:]
        row.loss_mask[span] = 1 if document.loss_mask is None else document.loss_mask[1:]
        row.segment_ids[span] = segment
        row.positions[span] = np.arange(length)
        end += length
    return row


def label_row(label: Callable[[int], np.ndarray], plan: PackPlan, i: int) -> np.ndarray:
    """What `label` says of each input of row `i`, int32 [sequence_length]; 0 at padding.

    Args:
        label: a number for each token of a document.
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
    """All pieces, in the order of the text; `num_pairs` are those of each document."""
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
    """The targets to be learnt of every piece, int64."""
    if store.loss_mask is None or not len(documents):
        return lengths
    first = store.offsets[documents] + starts + 1
    bounds = np.stack([first, first + lengths], axis=1).reshape(-1)
    # A sum for every two neighbouring bounds, of which every other is of a piece; the last bound
    # may be the very end.
    return np.add.reduceat(np.append(store.loss_mask, np.uint8(0)), bounds, dtype=np.int64)[::2]


def _assign_by_source(
    pieces: _Pieces, documents_by_source: tuple[int, ...], sequence_length: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The row of every piece, and how many rows each source has: each is packed by itself."""
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
