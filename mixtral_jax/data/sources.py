"""Finds what `data.path` names and reads its rows, from files of any format.

`readers` reads one file, `documents` and `conversations` interpret rows, and `corpus` limits the
number of bad ones.
"""

import dataclasses
import glob
import hashlib
import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError, local_path, names_existing, require
from mixtral_jax.data.chat.stdlib_chat import make_conversations
from mixtral_jax.data.domains import find_category, find_root
from mixtral_jax.data.readers import READERS, BadRow, RawRow, read_file
from mixtral_jax.data.stdlib import list_stdlib, stdlib_root, walk

STDLIB = "python-stdlib"
STDLIB_CHAT = "python-stdlib-chat"
HUB = "hub:"

# Files of metadata that `datasets` writes beside its Arrow files.
_METADATA_FILES = {"dataset_info.json", "dataset_dict.json", "state.json"}


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the sources that `data.path` names.

    `weight`: its share of the rows of a batch, relative to the other weights. None: in proportion
    to its size.
    """

    path: str
    weight: float | None = None


def split_sources(path: str) -> list[Source]:
    """Splits a value of `data.path` into its sources: one, or `PATH[:WEIGHT],PATH[:WEIGHT],...`.

    If one source has a weight, the default weight of the others is 1. The path of an existing file
    or folder is one source, even if it contains commas or colons.

    Raises:
        ConfigError: a source is empty or named twice, or a weight is not positive.
    """
    parts = [path] if names_existing(path) else path.split(",")
    sources = [_split_weight(part.strip()) for part in parts]
    paths = [source.path for source in sources]
    for name in paths:
        require(name, f"data.path={path} has an empty source: write PATH:WEIGHT,PATH:WEIGHT")
        require(
            paths.count(name) == 1,
            f"data.path={path} names {name} twice: name it once, with a weight",
        )
    if any(source.weight is not None for source in sources):
        sources = [dataclasses.replace(source, weight=source.weight or 1.0) for source in sources]
    return sources


def find_weights(path: str) -> list[float] | None:
    """Finds the weights of the sources in a value of `data.path`; None if they have none."""
    weights = [source.weight for source in split_sources(path)]
    return None if None in weights else [weight for weight in weights if weight is not None]


def _split_weight(part: str) -> Source:
    name, _, weight = part.rpartition(":")
    if not name or f"{name}:" == HUB or names_existing(part):
        return Source(part)
    try:
        number = float(weight)
    except ValueError:
        return Source(part)
    require(
        0 < number < math.inf,
        f"data.path: {weight} is not a positive number: give {name} a weight such as 1 or 0.5",
    )
    return Source(name, number)


def read_rows(
    path: str, fields: Sequence[str], suffixes: str | None = None
) -> Iterator[RawRow | BadRow]:
    """Reads the rows of one source, always in the same order.

    Args:
        path: the path of a `Source`; docs/data.md lists its forms.
        fields: the fields that are needed, as in `read_file`.
        suffixes: which files to read, as in `DataConfig`.

    Raises:
        ConfigError: there is nothing to read (raised at once), a file cannot be read (raised when
            its turn comes), or no file holds a row (raised at the end).
    """
    return _require_row(path, _read_source(path, fields, suffixes))


def _read_source(
    path: str, fields: Sequence[str], suffixes: str | None
) -> Iterator[RawRow | BadRow]:
    if path.startswith(HUB):
        rows = enumerate(_load_hub(path), start=1)
        return (RawRow(row, f"{path}:{number}") for number, row in rows)
    if path == STDLIB_CHAT:
        rows = enumerate(make_conversations(stdlib_root(), list_stdlib()), start=1)
        return (RawRow(row, f"{path}:{number}") for number, row in rows)
    root = stdlib_root() if path == STDLIB else find_root(path)
    return (row for file in _list_files(path, suffixes) for row in _read_file(file, fields, root))


def _require_row(path: str, rows: Iterator[RawRow | BadRow]) -> Iterator[RawRow | BadRow]:
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    require(not is_empty, f"data.path={path} holds no row: name files that hold some")


def fingerprint_source(path: str, suffixes: str | None = None) -> str:
    """Hashes, in hex, the names, sizes and modification times of all files that `path` names.

    Raises:
        ConfigError: there is nothing to read.
    """
    digest = hashlib.sha256(path.encode(errors="surrogateescape"))
    for source in split_sources(path):
        if source.path in (STDLIB, STDLIB_CHAT):
            digest.update(platform.python_version().encode())
        for file in _list_source(source.path, suffixes):
            stat = file.stat()
            described = f"\n{file.absolute()} {stat.st_size} {stat.st_mtime_ns}"
            digest.update(described.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read_file(file: Path, fields: Sequence[str], root: Path) -> Iterator[RawRow | BadRow]:
    category = find_category(file, root, holds_rows=file.suffix in READERS)
    for row in read_file(file, fields):
        yield row if isinstance(row, BadRow) else dataclasses.replace(row, category=category)


def _list_source(path: str, suffixes: str | None) -> list[Path]:
    if path.startswith(HUB):
        return [Path(cached["filename"]) for cached in _load_hub(path).cache_files]
    return list_stdlib() if path == STDLIB_CHAT else _list_files(path, suffixes)


def _list_files(path: str, suffixes: str | None) -> list[Path]:
    if path == STDLIB:
        return list_stdlib()
    place = local_path(path, "data.path")
    readable = suffixes.split(",") if suffixes else (".txt", *READERS)
    names = ", ".join(readable)
    if place.is_file():
        require(
            place.suffix in readable,
            f"data.path={path} is none of {names}: convert it, or if it is text, add its suffix to "
            "data.suffixes",
        )
        return [place]
    if place.is_dir():
        found = walk(place, lambda name: name.startswith("."))
    else:
        found = map(Path, glob.glob(str(place), recursive=True))
        require(
            glob.has_magic(path),
            f"data.path={path} does not exist: name a file, folder, glob, hub:NAME or {STDLIB}",
        )
    files = sorted(file for file in found if file.suffix in readable and file.is_file())
    files = [file for file in files if file.name not in _METADATA_FILES]
    require(
        files,
        f"data.path={path} holds no readable file: it must hold at least one of {names}; "
        "data.suffixes can name others",
    )
    return files


def _load_hub(path: str) -> Any:
    """Loads the Hugging Face dataset that `hub:NAME[:SPLIT]` names."""
    import datasets  # Slow to import, and most runs read files.

    name, _, split = path.removeprefix(HUB).partition(":")
    require(name, f"data.path={path} names no dataset: write hub:NAME or hub:NAME:SPLIT")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"data.path={path} cannot be loaded ({reason}): check NAME and SPLIT of "
            "hub:NAME[:SPLIT] and the network, or name local files"
        ) from error
