"""Files and folders that appear at once: a reader finds the old content or the new, never a part.

Each is written beside its place under a temporary name, flushed to the disk and renamed. The name
is random, since process ids repeat across containers that share storage. Every room may import
this module; it knows nothing of the rest.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes or replaces a file; text is encoded as UTF-8.

    Raises:
        OSError: the file cannot be written. What was at `path` before is still there.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes or replaces a file of indented JSON that ends with a newline.

    A file name that is not UTF-8 is a string with lone surrogates; JSON escapes them (`\\udc80`).

    Raises:
        OSError: the file cannot be written. What was at `path` before is still there.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to; the file takes the place of `path` when the block ends.

    If the block raises, the temporary file is deleted and `path` is left as it was.

    Raises:
        OSError: the file cannot be flushed or renamed.
    """
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{make_mark()}.partial")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush_entries(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(
    path: Path, mark: str | None = None, *, is_writer: bool = True, is_flushed: bool = True
) -> Iterator[Path]:
    """Gives a temporary folder to fill; it takes the place of `path` when the block ends.

    If the block raises, the temporary folder is deleted. Folders above `path` are made.

    Args:
        mark: part of the temporary name. Several processes that fill one folder on shared storage
            pass the same mark; by default it is random.
        is_writer: whether this process renames or deletes the temporary folder. It must end its
            block last.
        is_flushed: whether all files are on the disk before the folder is renamed, which a crash of
            the machine then cannot undo. It takes as long as the disk needs to write them.

    Raises:
        OSError: the folder cannot be made, flushed or renamed; for example, `path` is a folder
            that is not empty.
    """
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{mark or make_mark()}.partial")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        if is_writer:
            if is_flushed:
                _flush_tree(temporary)
            temporary.replace(path)
            _flush_entries(path.parent)
    finally:
        if is_writer:
            shutil.rmtree(temporary, ignore_errors=True)


def make_mark() -> str:
    """Makes a part of a name that no other process or container uses."""
    return secrets.token_hex(8)


def _flush_tree(folder: Path) -> None:
    """Flushes everything below `folder`: a rename may reach the disk before the content does."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _flush_entries(path)
        else:
            _flush(path)


def _flush_entries(folder: Path) -> None:
    """Flushes the names in a folder. Some network file systems do not offer this."""
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
