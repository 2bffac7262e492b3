"""Finds what `data.path` names and reads its rows, whatever files they lie in.

How a file is read is for `readers`; how many bad rows are too many is for `text` to judge, as are
tokens and the held-out split.
"""

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError, require
from mixtral_jax.data.readers import READERS, BadRow, Document, judge, read_file

STDLIB = "python-stdlib"
HUB = "hub:"

# Beside code worth learning from, the standard library holds installed packages, its own tests, and
# modules that are tables written out by a program.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
# What `datasets` notes about a folder of Arrow files; not rows.
_BOOKKEEPING = {"dataset_info.json", "dataset_dict.json", "state.json"}


def read_documents(path: str, text_field: str) -> Iterator[Document | BadRow]:
    """The rows `path` names, always in the same order.

    Args:
        path: a value of `data.path` (docs/data.md lists its forms).
        text_field: the field, or column, that holds the text of a row.

    Raises:
        ConfigError: at once, when there is nothing to read; at a file that cannot be read.
    """
    if path.startswith(HUB):
        rows = enumerate(_load_hub(path), start=1)
        return (judge(row, text_field, f"{path}:{number}") for number, row in rows)
    return (row for file in _list_files(path) for row in read_file(file, text_field))


def fingerprint_source(path: str) -> str:
    """A hex hash of the names, sizes and times of the files that `path` names: it changes when they do."""
    if path.startswith(HUB):
        files = [Path(cached["filename"]) for cached in _load_hub(path).cache_files]
    else:
        files = _list_files(path)
    digest = hashlib.sha256(f"{path} {platform.python_version() if path == STDLIB else ''}".encode())
    for file in files:
        stat = file.stat()
        digest.update(f"\n{file.absolute()} {stat.st_size} {stat.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _list_files(path: str) -> list[Path]:
    if path == STDLIB:
        return _list_stdlib()
    place = Path(path).expanduser()
    forms = ", ".join(READERS)
    if place.is_file():
        require(place.suffix in READERS, f"data.path={path} is none of {forms}: convert it, or rename it")
        return [place]
    if place.is_dir():
        found = _walk(place, lambda name: name.startswith("."))
    else:
        found = map(Path, glob.glob(str(place), recursive=True))
        require(
            glob.has_magic(path), f"data.path={path} does not exist: name a file, folder, glob, hub:NAME or {STDLIB}"
        )
    files = sorted(file for file in found if file.suffix in READERS and file.is_file())
    files = [file for file in files if file.name not in _BOOKKEEPING]
    require(files, f"data.path={path} holds no readable file: it must hold at least one of {forms}")
    return files


def _walk(root: Path, is_skipped: Callable[[str], bool]) -> Iterator[Path]:
    """The files in and below `root`, without entering folders of a skipped name: they may hold millions."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_skipped(name)]
        yield from (Path(folder, name) for name in files if not is_skipped(name))


def _list_stdlib() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = _walk(root, _STDLIB_SKIPPED.__contains__)
    # Some `__init__.py` are empty on purpose: nothing to learn, and nothing to warn about.
    files = sorted(file for file in found if file.suffix == ".py" and file.stat().st_size > 1)
    require(files, f"data.path={STDLIB}: this Python has no .py sources under {root}; name a file or a folder instead")
    return files


def _load_hub(path: str) -> Any:
    """The Hugging Face dataset that `hub:NAME[:SPLIT]` names."""
    import datasets  # Slow to import, and most runs read files.

    name, _, split = path.removeprefix(HUB).partition(":")
    require(name, f"data.path={path} names no dataset: write hub:NAME or hub:NAME:SPLIT")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"data.path={path} cannot be had ({reason}): check NAME and SPLIT of hub:NAME[:SPLIT] and the network, "
            "or name local files"
        ) from error
