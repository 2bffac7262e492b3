"""The items that `data.path` names, and the side of each in the held-out split.

Files are read twice: first to count bad rows and choose what to hold out, then to be tokenized.
`text` and `chat.prepare` define what an item is (a document, a conversation) and tokenize it.
"""

import array
import collections
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from mixtral_jax.config import DataConfig, require
from mixtral_jax.data.domains import Category
from mixtral_jax.data.readers import BadRow
from mixtral_jax.data.sources import Source, split_sources

log = logging.getLogger(__name__)

_MAX_NAMED_BAD_ROWS = 20


class Item(Protocol):
    """What a corpus consists of: a document or a conversation."""

    @property
    def key(self) -> str:
        """Items with equal keys are on the same side of the held-out split."""
        ...

    @property
    def num_characters(self) -> int:
        """Number of characters to encode."""
        ...

    @property
    def category(self) -> Category:
        """The kind of text, judged by its file."""
        ...

    @property
    def unread(self) -> Sequence[str]:
        """What its row fills and nothing reads."""
        ...


ItemT = TypeVar("ItemT", bound=Item)


@dataclasses.dataclass(frozen=True)
class Placed(Generic[ItemT]):
    """An item, the number of its source, and whether it is held out."""

    item: ItemT
    source: int
    is_held_out: bool


@dataclasses.dataclass(frozen=True)
class RowCount:
    """Numbers of rows and of bad rows, and what is wrong with the first of those.

    `unread`: what good rows fill and nothing reads, and the number of these rows.
    """

    num_rows: int
    num_bad: int
    first_bad: str
    unread: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def check(self, config: DataConfig) -> None:
        """Makes sure that there is something to train on and that few rows are bad.

        Raises:
            ConfigError: too many rows are bad, or all of them.
        """
        num_rows, num_bad = self.num_rows, self.num_bad
        require(
            num_bad <= config.max_bad_fraction * num_rows,
            f"data.path={config.path}: {num_bad} of {num_rows} rows are bad "
            f"({num_bad / max(num_rows, 1):.1%}), over "
            f"data.max_bad_fraction={config.max_bad_fraction}: mend them or raise that fraction; "
            f"first: {self.first_bad}",
        )
        require(
            num_rows > num_bad,
            f"data.path={config.path} holds no document ({num_rows} rows): name files that hold "
            "text",
        )


@dataclasses.dataclass(frozen=True)
class _Survey:
    """What the first pass finds; `is_held_out` is bool [num_items]."""

    is_held_out: np.ndarray
    count: RowCount
    is_single: bool


class Corpus(Generic[ItemT]):
    """The items that a config names, each with its side; every pass reads the files again.

    The side of an item depends on its key alone, so adding files moves no old item, and copies are
    on the same side. One exception: a side that would be empty gets the item nearest to it, with
    its copies.

    Args:
        read: reads the items of a source, always in the same order.
    """

    def __init__(self, config: DataConfig, read: Callable[[Source], Iterator[ItemT | BadRow]]):
        self._config = config
        self._read = read
        self._sources = split_sources(config.path)

    def items(self) -> Iterator[Placed[ItemT]]:
        """Reads every item, source after source.

        Raises:
            ConfigError: too many rows are bad, or all of them.
        """
        held_out = iter(self._survey.is_held_out.tolist())
        for number, source in enumerate(self._sources):
            for row in self._read(source):
                if not isinstance(row, BadRow):
                    yield Placed(row, number, next(held_out))

    @property
    def is_single(self) -> bool:
        """Whether all items have the same key, so that none of them can be held out."""
        return self._survey.is_single

    @property
    def count(self) -> RowCount:
        """Numbers of rows and of bad rows.

        Raises:
            ConfigError: too many rows are bad, or all of them.
        """
        return self._survey.count

    @functools.cached_property
    def _survey(self) -> _Survey:
        places = array.array("d")
        first_bad, num_bad = "", 0
        unread: collections.Counter[str] = collections.Counter()
        for row in (row for source in self._sources for row in self._read(source)):
            if not isinstance(row, BadRow):
                places.append(_place(row.key))
                unread.update(row.unread)
                continue
            first_bad = first_bad or f"{row.origin}: {row.reason}"
            num_bad += 1
            if num_bad <= _MAX_NAMED_BAD_ROWS:
                log.warning("bad row %s: %s", row.origin, row.reason)
        if num_bad > _MAX_NAMED_BAD_ROWS:
            log.warning("... and %d more bad rows", num_bad - _MAX_NAMED_BAD_ROWS)
        count = RowCount(len(places) + num_bad, num_bad, first_bad, dict(unread))
        count.check(self._config)
        where = np.array(places)
        return _Survey(
            is_held_out=_choose_held_out(where, self._config.held_out_fraction),
            count=count,
            is_single=bool(where.min() == where.max()),
        )


def _place(key: str) -> float:
    """Maps a key to [0, 1): uniform over keys, and the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


def _choose_held_out(places: np.ndarray, fraction: float) -> np.ndarray:
    """Decides which items to hold out, bool [num_items]; equal keys have equal places."""
    held_out = places < fraction
    if not held_out.any():
        return places == places.min()
    return held_out if not held_out.all() else places != places.max()
