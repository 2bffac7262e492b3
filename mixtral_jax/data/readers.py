"""Reads the rows of one file, by the form that its suffix names.

A line that is no row becomes a `BadRow` that says where it is and what is wrong with it; a file
that gives no rows is an error, since what it should have held is lost. Which files to read, and
what a row must hold, is for others to say.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError
from mixtral_jax.data.domains import UNSAID, Category

INVALID_JSON = "invalid JSON"
INVALID_UTF8 = "invalid UTF-8"


@dataclasses.dataclass(frozen=True)
class RawRow:
    """What was read of a row, whatever it holds; `origin` is where, such as `file.jsonl:17`, and
    `category` what its file says of it.
    """

    value: object
    origin: str
    category: Category = UNSAID


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why; `kind` is the same for all rows with the same mistake."""

    origin: str
    reason: str
    kind: str


def read_file(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    """The rows of a file; one whose suffix is not in `READERS` is one text.

    Args:
        fields: what will be asked for: columns of other names are not read, and a text is filed
            under the first.

    Raises:
        ConfigError: the file, or what is left of it, cannot be read; names it and the reason.
    """
    try:
        yield from READERS.get(file.suffix, _read_text)(file, fields)
    except (
        OSError,
        ValueError,
        RuntimeError,
        csv.Error,
    ) as error:  # pyarrow's own errors are among these.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{file}: unreadable {file.suffix} file ({reason}): mend it, or move it out of "
            "data.path"
        ) from error


def _read_json_line(line: bytes, origin: str) -> RawRow | BadRow:
    try:
        return RawRow(json.loads(line.decode("utf-8-sig")), origin)
    except UnicodeDecodeError as error:
        return BadRow(origin, f"{INVALID_UTF8} at byte {error.start}", INVALID_UTF8)
    except (ValueError, RecursionError) as error:
        return BadRow(origin, f"{INVALID_JSON}: {error}", INVALID_JSON)


def _read_text(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    yield RawRow({fields[0]: text}, str(file))


def _read_json_lines(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    # Binary, so that a line of invalid UTF-8 is bad alone.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _read_json_line(line.rstrip(b"\r\n"), f"{file}:{number}")


def _read_json(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    content = file.read_bytes()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except ValueError:
        if not _begins_with_json_line(content):
            raise
        yield from _read_json_lines(file, fields)  # Many a JSON Lines file is named `.json`.
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
    csv.field_size_limit(sys.maxsize)  # The default, 128 KB, is less than many a document.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        last_line = reader.line_num if reader.fieldnames else 0
        for row in reader:
            yield RawRow(row, f"{file}:{last_line + 1}")
            last_line = reader.line_num


def _read_parquet(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        columns = [name for name in fields if name in table.schema_arrow.names] or None
        yield from _read_columns(table.iter_batches(batch_size=1024, columns=columns), fields, file)


def _read_arrow(file: Path, fields: Sequence[str]) -> Iterator[RawRow | BadRow]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:  # The streaming form, which `datasets` writes.
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        yield from _read_columns(batches, fields, file)


def _read_columns(batches: Any, fields: Sequence[str], file: Path) -> Iterator[RawRow | BadRow]:
    """The rows of record batches, counted from 1; all names and no values where none of `fields` is
    among them.
    """
    number = 0
    for batch in batches:
        names = batch.schema.names
        columns = {name: batch.column(name) for name in fields if name in names}
        for place in range(batch.num_rows):
            number += 1
            origin = f"{file}:{number}"
            try:
                row = {
                    name: column[place].as_py() for name, column in columns.items()
                } or dict.fromkeys(names)
            except UnicodeDecodeError as error:
                yield BadRow(origin, f"{INVALID_UTF8} at byte {error.start}", INVALID_UTF8)
            else:
                yield RawRow(row, origin)


# Of files of rows, by their suffix.
READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[RawRow | BadRow]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
}
