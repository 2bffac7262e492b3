"""Safe access to files of a folder that somebody else made.

Never opens a file outside the folder, and limits the size of what is read at once. The only links
that may leave the folder are those of a Hugging Face cache, from `snapshots/` to its own `blobs/`.
"""

import json
import os
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError, require

# For files that are read whole. The index of 8x22B has 0.2 MB, a tokenizer.model 0.5 MB.
_MAX_WHOLE_FILE_BYTES = 100_000_000


def find_file(folder: Path, name: str, named_by: str = "this program") -> Path | None:
    """The path of the file `name` in the folder, or None if there is no such file.

    Args:
        named_by: where the name comes from, for error messages.

    Raises:
        ConfigError: the name leads out of the folder, by itself or by symbolic links, or it is not
            a regular file.
    """
    is_plain = name and name not in (".", "..") and not set(name) & set("/\\\0")
    require(
        is_plain,
        f"{named_by} names the file {name!r}, which must be a file in the folder itself: give its "
        "name without /, \\ and ..",
    )
    path, folder = folder / name, folder.resolve()
    if not path.is_symlink() and not path.exists():
        return None
    target = Path(os.path.realpath(path))  # Not `resolve`, which raises at a loop in Python 3.11.
    allowed_parents = [folder]
    if folder.parent.name == "snapshots":
        allowed_parents.append(folder.parents[1] / "blobs")
    require(
        any(parent in target.parents for parent in allowed_parents),
        f"{path} is a symbolic link to {target}, outside the folder: copy the file itself there",
    )
    require(
        target.is_file(),
        f"{path} is not a regular file: put the file itself there"
        if target.exists()
        else f"{path} links to nothing, or to itself: put the file itself there",
    )
    return path


def read_bytes(path: Path) -> bytes:
    """The contents of a small file.

    Raises:
        ConfigError: the file cannot be read, or has more than 100 MB.
    """
    try:
        size = path.stat().st_size
        require(
            size <= _MAX_WHOLE_FILE_BYTES,
            f"{path} has {size:,} bytes, and at most {_MAX_WHOLE_FILE_BYTES:,} are read: it is "
            "probably not the file that its name says; copy it again",
        )
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ConfigError if the file holds anything else."""
    return parse_object(read_bytes(path), str(path))


def require_kind(path: Path, what: str, value: Any, kind: type) -> None:
    """Makes sure that `what`, a value in a JSON file, is a dict, a list or a str, else raises."""
    names = {dict: "an object", list: "a list", str: "a text"}
    require(
        isinstance(value, kind),
        f"{path}: {what} must be {names[kind]}, not {value!r:.60}: copy the file again",
    )


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `text`; `name` says in error messages where the text is from.

    Raises:
        ConfigError: the text is not a JSON object, or an object in it has a key twice.
    """

    def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {repeated} is there twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=refuse_repeated_keys)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} is not JSON: {reason}; mend it or copy it again") from None
    require(
        isinstance(value, dict),
        f"{name} must hold a JSON object, not a {type(value).__name__}: mend it or copy it again",
    )
    return value
