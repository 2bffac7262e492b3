"""Files as bytes, whatever compresses them, and the suffix that names what is inside."""

import functools
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# What reading a damaged file may raise besides OSError and ValueError.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)

_XZ_END = b"YZ"
_COMPARED_BYTES = 2**20
# Enough to tell most files of one size apart.
_START_BYTES = 4096


def _open_by_arrow(codec: str, file: Path) -> Any:
    import pyarrow  # Slow to import.

    return pyarrow.input_stream(str(file), compression=codec)


def _open_xz(file: Path) -> Any:
    with file.open("rb") as content:
        content.seek(max(file.stat().st_size - len(_XZ_END), 0))
        if content.read() != _XZ_END:
            raise lzma.LZMAError("it does not end as xz files do")
    return lzma.open(file)


# Each reads a file to its end, and fails if something there is not compressed. Python's own readers
# of bz2 and xz leave that out in silence, and its library has zstandard only from 3.14 on.
_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": functools.partial(_open_by_arrow, "bz2"),
    ".xz": _open_xz,
    ".zst": functools.partial(_open_by_arrow, "zstd"),
}


# The suffix of a compression -> the bytes that its files begin with.
_BEGINNINGS = {
    ".gz": b"\x1f\x8b\x08",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\0",
    ".zst": b"\x28\xb5\x2f\xfd",
}
_BZIP2_BLOCK = b"1AY&SY"  # After the size of blocks, which is a digit.


def find_compression(head: bytes) -> str:
    """The suffix of the compression of a file that begins with `head`; empty if there is none."""
    for suffix, beginning in _BEGINNINGS.items():
        if head.startswith(beginning) and (suffix != ".bz2" or head[4:10] == _BZIP2_BLOCK):
            return suffix
    return ""


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


def find_copies(files: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Each file with the same bytes as one before it, after that one.

    Only files of the same size are opened, and read to the end if they begin alike.
    """
    by_size: dict[tuple[str, int], list[Path]] = {}
    for file in files:
        by_size.setdefault((file.suffix, file.stat().st_size), []).append(file)
    for alike in (files for files in by_size.values() if len(files) > 1):
        by_start: dict[bytes, list[Path]] = {}
        for file in alike:
            try:
                with file.open("rb") as content:
                    others = by_start.setdefault(content.read(_START_BYTES), [])
            except OSError:
                continue  # Whoever reads it says what is wrong.
            first = next((other for other in others if have_same_content(other, file)), None)
            if first is None:
                others.append(file)
            else:
                yield first, file


def have_same_content(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes, decompressed; False if one of them is damaged."""
    stamps = [(status.st_size, status.st_mtime_ns) for status in (one.stat(), other.stat())]
    return _have_same_content(one, other, *stamps)


@functools.cache  # A folder is listed several times in a run, and its files may be large.
def _have_same_content(one: Path, other: Path, *_stamps: tuple[int, int]) -> bool:
    try:
        with open_bytes(one) as content, open_bytes(other) as copy:
            while (read := content.read(_COMPARED_BYTES)) == copy.read(_COMPARED_BYTES):
                if not read:
                    return True
    except (OSError, ValueError, *DAMAGED):
        pass  # Whoever reads it says what is wrong.
    return False
