"""Reads the rows of one file, in the format that its suffix names, decompressed if need be.

A line that cannot be read becomes a `BadRow`, which says where it is and what is wrong with it. A
file that cannot be read is an error, because nobody knows how many rows are lost. `sources` decides
which files to read; `documents` and `conversations` decide what a row must hold.
"""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError
from mixtral_jax.data.compression import (
    DAMAGED,
    find_compression,
    find_suffix,
    is_compressed,
    open_bytes,
)
from mixtral_jax.data.domains import UNKNOWN, Category
from mixtral_jax.data.encodings import find_other_encoding, require_utf8
from mixtral_jax.data.field_names import fold_name
from mixtral_jax.data.unique_names import parse_json, require_unique

INVALID_JSON = "invalid JSON"
INVALID_UTF8 = "invalid UTF-8"
INVALID_CSV = "invalid CSV"
# The value of a column that is filled, but was not loaded.
NOT_LOADED = object()

_POINTER = b"version https://git-lfs.github.com/"
# A boolean is also an int in Python, so it comes first.
_TYPE_NAMES: tuple[tuple[type, str], ...] = (
    (type(None), "null"),
    (bool, "a boolean"),
    (int, "a number"),
    (float, "a number"),
    (str, "text"),
    (bytes, "bytes"),
    (Mapping, "an object"),
    (Sequence, "a list"),
)


@dataclasses.dataclass(frozen=True)
class RawRow:
    """The content of a row, not yet checked.

    Attributes:
        origin: where it was read, such as `file.jsonl:17`.
        category: the kind of text, judged by its file (`domains`).
    """

    value: object
    origin: str
    category: Category = UNKNOWN


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why; `kind` groups rows with the same kind of mistake."""

    origin: str
    reason: str
    kind: str


def describe_invalid_utf8(place: str) -> str:
    """The reason of a bad row whose text is not UTF-8 at `place`, such as `byte 10`."""
    return f"{INVALID_UTF8} at {place}: save the text as UTF-8, or leave the row out"


def name_type(value: object) -> str:
    """The type of a value in the words of JSON, with an article."""
    return next((name for kind, name in _TYPE_NAMES if isinstance(value, kind)), "another type")


def read_file(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    """Reads the rows of a file. A file of a suffix that is not in `READERS` is read as one text.

    Args:
        fields: the fields that are needed. Columns of other names are not loaded: a row has
            `NOT_LOADED` in their place, or None. A text becomes the value of the first field.

    Raises:
        ConfigError: the file, or the rest of it, cannot be read; names it and the reason.
    """
    try:
        with file.open("rb") as content:  # As it lies there: a pointer is never compressed.
            head = content.read(len(_POINTER))
        if head == _POINTER:
            raise ValueError("it only points to the data: run `git lfs pull`")
        if (suffix := find_compression(head)) and not is_compressed(file):
            raise ValueError(f"it is compressed: call it {file.name}{suffix}")
        yield from READERS.get(find_suffix(file), _read_text)(file, fields)
    # pyarrow's errors are subclasses of these.
    except (OSError, ValueError, RuntimeError, *DAMAGED) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{file}: unreadable {file.suffix} file ({reason}): mend it, or move it out of "
            "data.path"
        ) from error


def _read_json_line(line: bytes, origin: str) -> RawRow | BadRow:
    try:
        return RawRow(parse_json(line.decode("utf-8-sig")), origin)
    except UnicodeDecodeError as error:
        return BadRow(origin, describe_invalid_utf8(f"byte {error.start}"), INVALID_UTF8)
    except (ValueError, RecursionError) as error:
        reason = f"{INVALID_JSON}: {error}: a line must hold one whole JSON object"
        return BadRow(origin, reason, INVALID_JSON)


def _read_text(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    with open_bytes(file) as content:
        if encoding := find_other_encoding(content):
            yield BadRow(str(file), encoding, INVALID_UTF8)
            return
        with io.TextIOWrapper(content, "utf-8-sig", "surrogateescape") as opened:
            text = opened.read()
    yield RawRow({fields[0]: text}, str(file))


def _read_json_lines(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    # Read as bytes, so that invalid UTF-8 makes only its own line bad.
    with open_bytes(file) as lines:
        require_utf8(lines)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _read_json_line(line.rstrip(b"\r\n"), f"{file}:{number}")


def _read_json(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    with open_bytes(file) as opened:
        require_utf8(opened)
        content = opened.read()
    try:
        rows = parse_json(content.decode("utf-8-sig"))
    except ValueError:
        if not _begins_with_json_line(content):
            raise
        yield from _read_json_lines(file, fields)  # Some JSON Lines files are named `.json`.
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield RawRow(row, f"{file}:{number}")


def _begins_with_json_line(content: bytes) -> bool:
    try:
        json.loads(content.lstrip(b"\xef\xbb\xbf \r\n").partition(b"\n")[0].decode())
    except ValueError:
        return False
    return True


def _read_csv(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    csv.field_size_limit(sys.maxsize)  # Documents may exceed the default of 128 KB.
    with (
        open_bytes(file) as content,
        io.TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="") as lines,
    ):
        require_utf8(content)
        # Strict, since a quote that is not closed would join all rows after it to one.
        reader = csv.DictReader(lines, strict=True)
        last_line = 0
        try:
            require_unique(reader.fieldnames or ())
            last_line = reader.line_num
            for row in reader:
                origin = f"{file}:{last_line + 1}"
                last_line = reader.line_num
                if None in row:  # Cells that no name of the header belongs to.
                    reason = "it has more cells than the header: put texts with commas into quotes"
                    yield BadRow(origin, f"{INVALID_CSV}: {reason}", INVALID_CSV)
                else:
                    yield RawRow(row, origin)
        except csv.Error as error:
            raise ValueError(f"the quotes of the row in line {last_line + 1}: {error}") from error


def _read_parquet(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    import pyarrow.parquet

    def read_groups() -> Iterator[tuple[Any, Sequence[str]]]:
        names = table.schema_arrow.names
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            full = [name for name in _find_unneeded(names, fields) if _is_full(group, name)]
            columns = [name for name in names if name not in full]
            for batch in table.iter_batches(1024, row_groups=[number], columns=columns):
                yield batch, full

    with pyarrow.parquet.ParquetFile(_open_anywhere(file)) as table:
        require_unique(table.schema_arrow.names)
        yield from _read_columns(read_groups(), fields, file)


def _is_full(group: Any, name: str) -> bool:
    """Whether the statistics of a row group say that the column is null in no row."""
    parts = map(group.column, range(group.num_columns))
    return any(
        part.statistics is not None
        and part.statistics.has_null_count
        and part.statistics.null_count == 0
        for part in parts
        if part.path_in_schema == name or part.path_in_schema.startswith(f"{name}.")
    )


def _read_arrow(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    import pyarrow

    with _open_anywhere(file) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:  # The streaming format, which `datasets` writes.
            source.seek(0)
            batches = reader = pyarrow.ipc.open_stream(source)
        require_unique(reader.schema.names)
        yield from _read_columns(((batch, ()) for batch in batches), fields, file)


def _find_unneeded(columns: Iterable[str], fields: Sequence[str]) -> list[str]:
    """The columns that are none of the fields, however these are spelled."""
    needed = set(map(fold_name, fields))
    return [name for name in columns if fold_name(name) not in needed]


def _open_anywhere(file: Path) -> Any:
    """Opens a file whose parts are read in any order; a compressed one is held in memory."""
    import pyarrow

    if not is_compressed(file):
        return pyarrow.memory_map(str(file))
    with open_bytes(file) as content:
        return pyarrow.BufferReader(content.read())


def _read_columns(
    batches: Iterator[tuple[Any, Sequence[str]]], fields: Sequence[str], file: Path
) -> Iterator[RawRow | BadRow]:
    """Reads rows of record batches, numbered from 1.

    Args:
        batches: each with the names of further columns, which are filled in all of its rows.
    """
    number = 0
    for batch, full in batches:
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        unneeded = _find_unneeded(columns, fields)
        others = {name: columns.pop(name).is_valid().to_pylist() for name in unneeded}
        for place in range(batch.num_rows):
            number += 1
            origin = f"{file}:{number}"
            row = dict.fromkeys(full, NOT_LOADED)
            row |= {name: NOT_LOADED if valid[place] else None for name, valid in others.items()}
            try:
                row |= {name: column[place].as_py() for name, column in columns.items()}
            except UnicodeDecodeError as error:
                reason = describe_invalid_utf8(f"byte {error.start}")
                yield BadRow(origin, reason, INVALID_UTF8)
            else:
                yield RawRow(row, origin)


# Suffix -> the reader of such a file's rows.
READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[RawRow | BadRow]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
}
