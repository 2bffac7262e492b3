"""The cache: a folder for each corpus and tokenizer, with two token stores, train and held-out.

What goes into the stores, and how a folder is named, is for `text` and `chats` to say.
"""

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic

import numpy as np

from mixtral_jax.config import DataConfig
from mixtral_jax.data.corpus import ItemT, Placed, RowCount
from mixtral_jax.data.store import StoreWriter, Tokenized, TokenStore, flush_to_disk, open_store

log = logging.getLogger(__name__)

_CHARACTERS_AT_ONCE = 4_000_000


@dataclasses.dataclass(frozen=True)
class CachedCorpus:
    """Two stores without a common item, and how many rows were read for them."""

    train: TokenStore
    held_out: TokenStore
    count: RowCount


@dataclasses.dataclass(frozen=True)
class Tokenizing(Generic[ItemT]):
    """How a corpus becomes stores: its items, where they lie, and their ids.

    Attributes:
        items: gives the same at every call.
        count: what reading them gave.
        encode: ids of many items at once.
        vocab_size: every id is below.
    """

    items: Callable[[], Iterator[Placed[ItemT]]]
    count: Callable[[], RowCount]
    encode: Callable[[list[ItemT]], Iterable[Tokenized]]
    vocab_size: int


def default_cache_dir() -> Path:
    """`mixtral_jax` under $XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mixtral_jax"


def open_or_write(folder: Path, tokenizing: Tokenizing, config: DataConfig) -> CachedCorpus:
    """What lies in `folder`; tokenised into it first, if nothing does or what does is damaged.

    Raises:
        ConfigError: the items cannot be read, or too many rows are bad.
    """
    cached = _open_or_write(folder, tokenizing)
    cached.count.check(config)  # The limit may be another than when it was written.
    if cached.count.num_bad:
        log.warning("data.path=%s: %d bad rows are left out", config.path, cached.count.num_bad)
    return cached


def _open_or_write(folder: Path, tokenizing: Tokenizing) -> CachedCorpus:
    if folder.exists():
        try:
            return _open(folder)
        except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
            log.warning("%s is damaged (%s): the text is tokenised again", folder, error)
            shutil.rmtree(folder)
    _write(folder, tokenizing)
    return _open(folder)


def _open(folder: Path) -> CachedCorpus:
    count = RowCount(**json.loads((folder / "summary.json").read_text()))
    return CachedCorpus(open_store(folder / "train"), open_store(folder / "held_out"), count)


def _write(folder: Path, tokenizing: Tokenizing) -> None:
    """Writes elsewhere and renames, so that `folder` is whole whenever it exists."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _write_stores(temporary, tokenizing)
        (temporary / "summary.json").write_text(json.dumps(dataclasses.asdict(tokenizing.count())))
        flush_to_disk(temporary)
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # If it does, another process wrote the same first.
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """Enough items at once to keep every core at work, few enough to hold in memory."""
    group, characters = [], 0
    for placed in items:
        group.append(placed)
        characters += placed.item.num_characters
        if characters >= _CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    yield group
