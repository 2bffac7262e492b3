"""The sources that `data.path` and `data.held_out` name, and their rows.

`folders` finds the files of a source, `hub` loads data sets, `readers` reads one file, `documents`
and `conversations` interpret rows, and `corpus` limits the number of bad ones.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.config import DataConfig, names_existing, require
from mixtral_jax.data.chat.stdlib_chat import make_conversations
from mixtral_jax.data.compression import find_copies, find_suffix
from mixtral_jax.data.domains import find_category, find_root
from mixtral_jax.data.folders import Listing, list_files
from mixtral_jax.data.hub import HUB, load_hub
from mixtral_jax.data.not_read import describe
from mixtral_jax.data.readers import READERS, BadRow, RawRow, read_file
from mixtral_jax.data.splits import TRAIN, split_of_folder
from mixtral_jax.data.stdlib import list_stdlib, stdlib_root

STDLIB = "python-stdlib"
STDLIB_CHAT = "python-stdlib-chat"
_DOUBT = "read as training data, although the name looks like another split"
# Such a value of `data.held_out` names a split, not a path.
_SPLIT_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the sources that `data.path` or `data.held_out` names.

    Attributes:
        weight: its share of the rows of a batch, relative to the other weights. None: in proportion
            to its size.
        split: the split of a data set with several; None as in `list_files`.
        key: the setting that gives the path.
    """

    path: str
    weight: float | None = None
    split: str | None = TRAIN
    key: str = "data.path"


def split_sources(path: str, key: str = "data.path") -> list[Source]:
    """Splits a value of `data.path` into its sources: one, or `PATH[:WEIGHT],PATH[:WEIGHT],...`.

    If one source has a weight, the default weight of the others is 1. The path of an existing file
    or folder is one source, even if it contains commas or colons.

    Args:
        key: the setting that gives the path.

    Raises:
        ConfigError: a source is empty or named twice, or a weight is not positive.
    """
    parts = [path] if names_existing(path) else path.split(",")
    sources = [_split_weight(part.strip(), key) for part in parts]
    paths = [source.path for source in sources]
    for name in paths:
        require(name, f"{key}={path} has an empty source: write PATH:WEIGHT,PATH:WEIGHT")
        require(
            paths.count(name) == 1,
            f"{key}={path} names {name} twice: name it once, with a weight",
        )
    if any(source.weight is not None for source in sources):
        sources = [dataclasses.replace(source, weight=source.weight or 1.0) for source in sources]
    return sources


def find_weights(path: str) -> list[float] | None:
    """Finds the weights of the sources in a value of `data.path`; None if they have none."""
    weights = [source.weight for source in split_sources(path)]
    return None if None in weights else [weight for weight in weights if weight is not None]


def find_held_out(config: DataConfig) -> list[Source]:
    """The sources of `data.held_out`: those that it names, or that split of each source of
    `data.path`. Empty if held-out data are drawn from `data.path`.

    Raises:
        ConfigError: a source has a weight, or the value is the training split, or a split and a
            file or folder too.
    """
    held_out = config.held_out
    if held_out is None:
        return []
    if not _SPLIT_NAME.fullmatch(held_out):
        sources = split_sources(held_out, "data.held_out")
        require(
            all(source.weight is None for source in sources),
            f"data.held_out={held_out} has a weight, but all of it is held out: leave the weight "
            "out",
        )
        return [dataclasses.replace(source, split=None) for source in sources]
    split = split_of_folder(held_out)
    require(
        split is None or split.role != TRAIN,
        f"data.held_out={held_out} is what is trained on: name another split, or a path",
    )
    require(
        not names_existing(held_out),
        f"data.held_out={held_out} is a split of data.path, and a file or folder is called so too: "
        f"for that, write ./{held_out}",
    )
    return [
        dataclasses.replace(source, weight=None, split=held_out)
        for source in split_sources(config.path)
    ]


def all_sources(config: DataConfig) -> list[Source]:
    """The sources of `data.path`, then those of `data.held_out`."""
    return split_sources(config.path) + find_held_out(config)


def _split_weight(part: str, key: str) -> Source:
    name, _, weight = part.rpartition(":")
    if not name or f"{name}:" == HUB or names_existing(part):
        return Source(part, key=key)
    try:
        number = float(weight)
    except ValueError:
        return Source(part, key=key)
    require(
        0 < number < math.inf,
        f"{key}: {weight} is not a positive number: give {name} a weight such as 1 or 0.5",
    )
    return Source(name, number, key=key)


def list_source(source: Source, suffixes: str | None = None) -> Listing:
    """The files of a source.

    Args:
        suffixes: which files to read, as in `DataConfig`.

    Raises:
        ConfigError: there is nothing to read.
    """
    if source.path.startswith(HUB):
        dataset = _load(source)
        return Listing([Path(cached["filename"]) for cached in dataset.cache_files], {})
    if source.path in (STDLIB, STDLIB_CHAT):
        require(
            source.split in (TRAIN, None),
            f"data.held_out={source.split} names a split, and {source.path} has none: name a path",
        )
        return Listing(list_stdlib(), {})
    return list_files(source.path, source.key, suffixes, source.split)


def require_sources(config: DataConfig, *, with_hub: bool = True) -> None:
    """Makes sure that there is something to read in every source.

    Args:
        with_hub: also of data sets of the Hub, which may be downloaded for that.

    Raises:
        ConfigError: a source has nothing to read.
    """
    for source in all_sources(config):
        if with_hub or not source.path.startswith(HUB):
            list_source(source, config.suffixes)


def describe_files(config: DataConfig) -> list[str]:
    """Lines about files that are not read, are read more than once, or may have to be held out."""
    sources = [source for source in all_sources(config) if not source.path.startswith(HUB)]
    listings = [list_source(source, config.suffixes) for source in sources]
    # One file may have several names: links, or paths of several sources.
    read: set[str] = set()
    names_by_file: dict[tuple[int, int], list[str]] = {}
    for file in (file for listing in listings for file in listing.files):
        status, name = file.stat(), os.path.realpath(file)
        names_by_file.setdefault((status.st_dev, status.st_ino), []).append(name)
        read.add(name)
    lines: dict[str, str] = {}
    for source, listing in zip(sources, listings, strict=True):
        left = {
            reason: [path for path in paths if os.path.realpath(path) not in read]
            for reason, paths in listing.not_read.items()
        }
        left = {reason: paths for reason, paths in left.items() if paths}
        if left:  # Two splits of one path have the same beside them.
            described = describe(left, find_root(source.path))
            lines[source.path] = f"{source.key}={source.path}: not read: {described}"
        if listing.doubtful:
            described = describe({_DOUBT: listing.doubtful}, find_root(source.path))
            lines[f"doubtful {source.path}"] = f"{source.key}={source.path}: {described}"
    twice = [names[0] for names in names_by_file.values() if len(names) > 1]
    if twice:
        more = ", ..." if len(twice) > 1 else ""
        lines["twice"] = f"files read more than once: {len(twice):,} ({twice[0]}{more})"
    # The names of texts say what they are about, and licences are everywhere.
    all_files = [Path(names[0]) for names in names_by_file.values()]
    copies = list(find_copies([file for file in all_files if find_suffix(file) in READERS]))
    if copies:
        (first, copy), more = copies[0], ", ..." if len(copies) > 1 else ""
        lines["copies"] = (
            f"files that hold what another one holds, and are read too: {len(copies):,} ({copy} "
            f"is {first}{more})"
        )
    return list(lines.values())


def read_rows(
    source: Source | str, fields: Sequence[str], suffixes: str | None = None
) -> Iterator[RawRow | BadRow]:
    """Reads the rows of one source, always in the same order.

    Args:
        source: or the path of one; docs/data.md lists its forms.
        fields: the fields that are needed, as in `read_file`.
        suffixes: which files to read, as in `DataConfig`.

    Raises:
        ConfigError: there is nothing to read (raised at once), a file cannot be read (raised when
            its turn comes), or no file holds a row (raised at the end).
    """
    source = Source(source) if isinstance(source, str) else source
    return _require_row(source, _read_source(source, fields, suffixes))


def _read_source(
    source: Source, fields: Sequence[str], suffixes: str | None
) -> Iterator[RawRow | BadRow]:
    path = source.path
    if path.startswith(HUB):
        rows = enumerate(_load(source), start=1)
        return (RawRow(row, f"{path}:{number}") for number, row in rows)
    files = list_source(source, suffixes).files
    if path == STDLIB_CHAT:
        rows = enumerate(make_conversations(stdlib_root(), files), start=1)
        return (RawRow(row, f"{path}:{number}") for number, row in rows)
    root = stdlib_root() if path == STDLIB else find_root(path)
    return (row for file in files for row in _read_file(file, fields, root))


def _load(source: Source) -> Any:
    own = None if source.split in (TRAIN, None) else source.split
    return load_hub(source.path, source.key, own)


def _require_row(source: Source, rows: Iterator[RawRow | BadRow]) -> Iterator[RawRow | BadRow]:
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    part = "" if source.split in (TRAIN, None) else f", split {source.split},"
    require(
        not is_empty, f"{source.key}={source.path}{part} holds no row: name files that hold some"
    )


def _read_file(file: Path, fields: Sequence[str], root: Path) -> Iterator[RawRow | BadRow]:
    category = find_category(file, root, holds_rows=find_suffix(file) in READERS)
    for row in read_file(file, fields):
        yield row if isinstance(row, BadRow) else dataclasses.replace(row, category=category)
