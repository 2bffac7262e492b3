"""The items that `data.path` and `data.held_out` name, and the side of each in the held-out split.

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
from mixtral_jax.data.sources import Source, find_held_out, split_sources

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
    """An item, the number of its source in `all_sources`, and whether it is held out."""

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

    def check(self, named: str, max_bad_fraction: float) -> None:
        """Makes sure that there is something to read and that few rows are bad.

        Args:
            named: the setting that names the rows, with its value.

        Raises:
            ConfigError: too many rows are bad, or all of them.
        """
        num_rows, num_bad = self.num_rows, self.num_bad
        require(
            num_bad <= max_bad_fraction * num_rows,
            f"{named}: {num_bad} of {num_rows} rows are bad ({num_bad / max(num_rows, 1):.1%}), "
            f"over data.max_bad_fraction={max_bad_fraction}: mend them or raise that fraction; "
            f"first: {self.first_bad}",
        )
        require(
            num_rows > num_bad,
            f"{named} holds no document ({num_rows} rows): name files that hold text",
        )


@dataclasses.dataclass(frozen=True)
class CorpusCount:
    """The rows of `data.path`, and those of `data.held_out`, if it is set.

    Attributes:
        num_shared: number of items of `data.held_out` whose key an item of `data.path` has too.
    """

    of_path: RowCount
    of_held_out: RowCount | None
    num_shared: int

    @property
    def num_bad(self) -> int:
        """The number of bad rows of both."""
        return sum(count.num_bad for count in self._counts)

    @property
    def unread(self) -> Mapping[str, int]:
        """The fields that rows of either fill and nobody reads; see `RowCount`."""
        total: collections.Counter[str] = collections.Counter()
        for count in self._counts:
            total.update(count.unread)
        return total

    @property
    def _counts(self) -> list[RowCount]:
        return [self.of_path, *([self.of_held_out] if self.of_held_out else [])]

    def check(self, config: DataConfig) -> None:
        """Checks both.

        Raises:
            ConfigError: too many rows of one are bad, or all of them.
        """
        self.of_path.check(f"data.path={config.path}", config.max_bad_fraction)
        if self.of_held_out:
            self.of_held_out.check(f"data.held_out={config.held_out}", config.max_bad_fraction)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows that were read once; `places` is float64 [num_items], where keys are in [0, 1)."""

    places: np.ndarray
    count: RowCount


@dataclasses.dataclass(frozen=True)
class _Survey:
    """What the first pass finds; `is_held_out` is bool [num_items]."""

    is_held_out: np.ndarray
    count: CorpusCount
    is_single: bool


class Corpus(Generic[ItemT]):
    """The items that a config names, each with its side; every pass reads the files again.

    Items of `data.held_out` are held out, and no others. Without it, the side of an item depends
    on its key alone, so adding files moves no old item, and copies are on the same side. One
    exception: a side that would be empty gets the item nearest to it, with its copies.

    Args:
        read: reads the items of a source, always in the same order.
    """

    def __init__(self, config: DataConfig, read: Callable[[Source], Iterator[ItemT | BadRow]]):
        self._config = config
        self._read = read
        self._sources = split_sources(config.path)
        self._own_held_out = find_held_out(config)

    def items(self) -> Iterator[Placed[ItemT]]:
        """Reads every item, source after source.

        Raises:
            ConfigError: too many rows are bad, or all of them.
        """
        held_out = iter(self._survey.is_held_out.tolist())
        for number, source in enumerate(self._sources + self._own_held_out):
            for row in self._read(source):
                if not isinstance(row, BadRow):
                    yield Placed(row, number, next(held_out))

    @property
    def is_single(self) -> bool:
        """Whether all items have the same key, so that none of them can be held out."""
        return self._survey.is_single

    @property
    def count(self) -> CorpusCount:
        """Numbers of rows and of bad rows.

        Raises:
            ConfigError: too many rows are bad, or all of them.
        """
        return self._survey.count

    @functools.cached_property
    def _survey(self) -> _Survey:
        config, rows = self._config, self._read_once(self._sources)
        rows.count.check(f"data.path={config.path}", config.max_bad_fraction)
        if not self._own_held_out:
            return _Survey(
                is_held_out=_choose_held_out(rows.places, config.held_out_fraction),
                count=CorpusCount(rows.count, None, num_shared=0),
                is_single=bool(rows.places.min() == rows.places.max()),
            )
        own = self._read_once(self._own_held_out)
        own.count.check(f"data.held_out={config.held_out}", config.max_bad_fraction)
        return _Survey(
            is_held_out=np.repeat([False, True], [len(rows.places), len(own.places)]),
            count=CorpusCount(rows.count, own.count, int(np.isin(own.places, rows.places).sum())),
            is_single=False,
        )

    def _read_once(self, sources: Sequence[Source]) -> _Rows:
        """Reads all rows of some sources; warns of the first bad ones.

        Raises:
            ConfigError: one of several sources holds no row.
        """
        places = array.array("d")
        first_bad, num_bad = "", 0
        unread: collections.Counter[str] = collections.Counter()
        for row in (row for source in sources for row in self._read(source)):
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
        return _Rows(np.array(places), count)


def _place(key: str) -> float:
    """Maps a key to [0, 1): uniform over keys, and the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


def _choose_held_out(places: np.ndarray, fraction: float) -> np.ndarray:
    """Decides which items to hold out, bool [num_items]; equal keys have equal places."""
    held_out = places < fraction
    if not held_out.any():
        return places == places.min()
    return held_out if not held_out.all() else places != places.max()
