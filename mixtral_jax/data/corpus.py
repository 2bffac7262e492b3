"""All that `data.path` names, read twice: once to see what is bad and what to hold out, once to be
tokenised.

What an item is (a document, a conversation) and how it becomes ids is for `text` and `chats` to
say.
"""

import array
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

import numpy as np

from mixtral_jax.config import DataConfig, require
from mixtral_jax.data.domains import Category
from mixtral_jax.data.readers import BadRow
from mixtral_jax.data.sources import Source, split_sources

log = logging.getLogger(__name__)

_NAMED_BAD_ROWS = 20


class Item(Protocol):
    """What a corpus consists of."""

    @property
    def key(self) -> str:
        """Items of one key are on one side of the held-out split."""
        ...

    @property
    def num_characters(self) -> int:
        """How much there is to encode."""
        ...

    @property
    def category(self) -> Category:
        """What its file says of it."""
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
    """How many rows there were, and how many of them bad."""

    num_rows: int
    num_bad: int
    first_bad: str

    def check(self, config: DataConfig) -> None:
        """Makes sure that there is something to train on.

        Raises:
            ConfigError: too many rows are bad, or all of them.
        """
        num_rows, num_bad = self.num_rows, self.num_bad
        require(
            num_bad <= config.max_bad_fraction * num_rows,
            f"data.path={config.path}: {num_bad} of {num_rows} rows are bad "
            f"({num_bad / max(num_rows, 1):.1%}), over "
            f"data.max_bad_fraction={config.max_bad_fraction}; first: {self.first_bad}",
        )
        require(
            num_rows > num_bad,
            f"data.path={config.path} holds no document ({num_rows} rows): name files that hold "
            "text",
        )


class Corpus(Generic[ItemT]):
    """The items of a config and the side of each; every pass streams the files anew.

    The side of an item follows from its key alone, so that new files move no old item and copies
    lie on one side. One exception: a side left empty gets the item nearest to it, with its copies.

    Args:
        read: the items of a source, always in the same order.
    """

    def __init__(self, config: DataConfig, read: Callable[[Source], Iterator[ItemT | BadRow]]):
        self._config = config
        self._read = read
        self._sources = split_sources(config.path)

    def items(self) -> Iterator[Placed[ItemT]]:
        """Every item, source after source.

        Raises:
            ConfigError: too many rows are bad, or all of them.
        """
        held_out = iter(self._survey[0].tolist())
        for number, source in enumerate(self._sources):
            for row in self._read(source):
                if not isinstance(row, BadRow):
                    yield Placed(row, number, next(held_out))

    @property
    def is_single(self) -> bool:
        """Whether all items have one key: then there is no way to hold some of them out."""
        return self._survey[2]

    @property
    def count(self) -> RowCount:
        """What there is; raises as `items` does."""
        return self._survey[1]

    @functools.cached_property
    def _survey(self) -> tuple[np.ndarray, RowCount, bool]:
        places = array.array("d")
        first_bad, num_bad = "", 0
        for row in (row for source in self._sources for row in self._read(source)):
            if not isinstance(row, BadRow):
                places.append(_place(row.key))
                continue
            first_bad = first_bad or f"{row.origin}: {row.reason}"
            num_bad += 1
            if num_bad <= _NAMED_BAD_ROWS:
                log.warning("bad row %s: %s", row.origin, row.reason)
        if num_bad > _NAMED_BAD_ROWS:
            log.warning("... and %d more bad rows", num_bad - _NAMED_BAD_ROWS)
        count = RowCount(len(places) + num_bad, num_bad, first_bad)
        count.check(self._config)
        where = np.array(places)
        return (
            _choose_held_out(where, self._config.held_out_fraction),
            count,
            bool(where.min() == where.max()),
        )


def _place(key: str) -> float:
    """Where in [0, 1) a key lies: even over keys, and the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


def _choose_held_out(places: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each item is held out; equal keys have equal places."""
    held_out = places < fraction
    if not held_out.any():
        return places == places.min()
    return held_out if not held_out.all() else places != places.max()
