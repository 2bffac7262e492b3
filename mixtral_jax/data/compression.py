"""Files as bytes, whatever compresses them, and the suffix that names what is inside."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What reading a damaged file may raise besides OSError and ValueError.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)


def _open_zstandard(file: Path) -> Any:
    import pyarrow  # Slow to import, and Python's library has zstandard only from 3.14 on.

    return pyarrow.input_stream(str(file), compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def is_compressed(file: Path) -> bool:
    """Whether the last suffix of a file names a compression."""
    return file.suffix.lower() in _OPENERS


def without_compression(file: Path) -> Path:
    """The file without the suffix of a compression: `a.jsonl` of `a.jsonl.gz`."""
    return file.with_suffix("") if is_compressed(file) else file


def find_suffix(file: Path) -> str:
    """The suffix that names a file's format, in lower case: `.jsonl` of `A.JSONL.gz`."""
    return without_compression(file).suffix.lower()


def open_bytes(file: Path) -> io.BufferedReader:
    """Opens a file to read its content, decompressed."""
    if not is_compressed(file):
        return file.open("rb")
    return io.BufferedReader(_OPENERS[file.suffix.lower()](file))
