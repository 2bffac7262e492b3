"""Files of a folder that somebody else made: none outside of it is opened, and none is believed to
be small.

A Hugging Face cache may link from `snapshots/` to its own `blobs/`. What the files mean is for
others.
"""

import json
import os
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError, require

# Of text that is read whole. The index of 8x22B has 0.2 MB, a tokenizer.model 0.5 MB.
_MAX_BYTES = 100_000_000


def find_file(folder: Path, name: str, said_by: str = "this program") -> Path | None:
    """The file `name` of the folder, or None if there is none. `said_by` is whose word the name is.

    Raises:
        ConfigError: the name leaves the folder, itself or by symbolic links, or is not of a regular
            file.
    """
    is_plain = name and name not in (".", "..") and not set(name) & set("/\\\0")
    require(
        is_plain,
        f"{said_by} is in {name!r}, it says: that must be a file of the folder itself, without / "
        "and ..",
    )
    path, folder = folder / name, folder.resolve()
    if not path.is_symlink() and not path.exists():
        return None
    target = Path(os.path.realpath(path))  # Not `resolve`, which raises at a loop in Python 3.11.
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parents[1] / "blobs")
    require(
        any(home in target.parents for home in homes),
        f"{path} is a symbolic link that leaves the folder, to {target}: put the file itself there",
    )
    require(
        target.is_file(),
        f"{path} is no regular file"
        if target.exists()
        else f"{path} links to nothing, or to itself",
    )
    return path


def read_bytes(path: Path) -> bytes:
    """The whole of a small file.

    Raises:
        ConfigError: it cannot be read, or is not small.
    """
    try:
        size = path.stat().st_size
        require(
            size <= _MAX_BYTES,
            f"{path} has {size:,} bytes: more than {_MAX_BYTES:,} are not believed",
        )
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ConfigError if there is none."""
    return parse_object(read_bytes(path), str(path))


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `text`; `name` is for people.

    Raises:
        ConfigError: it is no JSON object, or says something twice.
    """

    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is there twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=refuse_twice)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON: {' '.join(str(error).split())}") from None
    require(isinstance(value, dict), f"{name} must hold a JSON object, not {type(value).__name__}")
    return value
