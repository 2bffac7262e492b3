"""The cache: for each corpus and tokenizer a folder with two token stores, train and held-out.

`text` and `chat.prepare` define what goes into the stores and name the folder.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic

import numpy as np

from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.data.corpus import CorpusCount, ItemT, Placed, RowCount
from mixtral_jax.data.store import StoreWriter, TokenStore, open_store
from mixtral_jax.data.tokenized import Tokenized
from mixtral_jax.whole_files import whole_folder

log = logging.getLogger(__name__)

_MAX_GROUP_CHARACTERS = 4_000_000


@dataclasses.dataclass(frozen=True)
class CachedCorpus:
    """Two stores without a common item, and the number of rows that were read for them."""

    train: TokenStore
    held_out: TokenStore
    count: CorpusCount


@dataclasses.dataclass(frozen=True)
class Tokenizing(Generic[ItemT]):
    """How to turn a corpus into stores.

    Attributes:
        items: reads all items, each with its side; gives the same at every call.
        count: the numbers of rows and bad rows among them.
        encode: tokenizes many items at once.
        vocab_size: every id is below this.
    """

    items: Callable[[], Iterator[Placed[ItemT]]]
    count: Callable[[], CorpusCount]
    encode: Callable[[list[ItemT]], Iterable[Tokenized]]
    vocab_size: int


def default_cache_dir() -> Path:
    """`mixtral_jax` under $XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mixtral_jax"


def open_or_write(folder: Path, tokenizing: Tokenizing, config: DataConfig) -> CachedCorpus:
    """Opens the stores in `folder`; first tokenizes into it if it is missing or damaged.

    Raises:
        ConfigError: the items cannot be read, or too many rows are bad.
    """
    cached = _open_or_write(folder, tokenizing)
    try:
        cached.count.check(config)  # The limit may have changed since it was written.
    except ConfigError:
        tokenizing.count()  # The rows are read again, to name the bad ones where they lie by now.
        raise
    if cached.count.num_bad:
        log.warning("%d bad rows are left out", cached.count.num_bad)
    return cached


def _open_or_write(folder: Path, tokenizing: Tokenizing) -> CachedCorpus:
    if folder.exists():
        try:
            return _open(folder)
        except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
            log.warning("%s is damaged (%s): the text is tokenized again", folder, error)
            shutil.rmtree(folder)
    _write(folder, tokenizing)
    return _open(folder)


def _open(folder: Path) -> CachedCorpus:
    summary = json.loads((folder / "summary.json").read_text())
    own = summary["of_held_out"]
    count = CorpusCount(
        RowCount(**summary["of_path"]), RowCount(**own) if own else None, summary["num_shared"]
    )
    return CachedCorpus(open_store(folder / "train"), open_store(folder / "held_out"), count)


def _write(folder: Path, tokenizing: Tokenizing) -> None:
    try:
        with whole_folder(folder) as temporary:
            _write_stores(temporary, tokenizing)
            summary = json.dumps(dataclasses.asdict(tokenizing.count()))
            (temporary / "summary.json").write_text(summary)
    except OSError:
        if not folder.exists():  # Otherwise another process wrote the same first.
            raise


def _write_stores(folder: Path, tokenizing: Tokenizing) -> None:
    dtype = np.dtype(np.uint16 if tokenizing.vocab_size <= 2**16 else np.uint32)
    with (
        StoreWriter(folder / "train", dtype) as train,
        StoreWriter(folder / "held_out", dtype) as held_out,
    ):
        for group in _group(tokenizing.items()):
            encoded = tokenizing.encode([placed.item for placed in group])
            for tokenized, placed in zip(encoded, group, strict=True):
                writer = held_out if placed.is_held_out else train
                writer.add(tokenized, placed.source, placed.item.category)


def _group(items: Iterator[Placed[ItemT]]) -> Iterator[list[Placed[ItemT]]]:
    """Groups items: enough to use every core, but few enough to hold in memory."""
    group, characters = [], 0
    for placed in items:
        group.append(placed)
        characters += placed.item.num_characters
        if characters >= _MAX_GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    yield group
