"""Reads the rows of one file, by the form that its suffix names.

A row that gives no document becomes a `BadRow` that says where it is and what is wrong with it; a
file that gives no rows is an error, since what it should have held is lost. Which files to read is
for `sources` to say.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Document:
    """One text to train on; `origin` is where it was read, such as `file.jsonl:17`."""

    text: str
    origin: str


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that gives no document, and why."""

    origin: str
    reason: str


def read_file(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    """The rows of a file; one whose suffix is not in `READERS` is text.

    Raises:
        ConfigError: the file, or what is left of it, cannot be read; names it and the reason.
    """
    try:
        yield from READERS.get(file.suffix, _read_text)(file, text_field)
    except (OSError, ValueError, RuntimeError, csv.Error) as error:  # pyarrow's own errors are among these.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{file}: unreadable {file.suffix} file ({reason}): mend it, or move it out of data.path"
        ) from error


def judge(row: object, text_field: str, origin: str) -> Document | BadRow:
    """The document in a row, or what is wrong with it."""
    if not isinstance(row, Mapping):
        return BadRow(origin, f"a row must be an object with the field {text_field!r}, not {type(row).__name__}")
    if text_field not in row:
        names = ", ".join(map(str, row)) or "none"
        return BadRow(origin, f"no field {text_field!r}; it has {names} (data.text_field names the field)")
    text = row[text_field]
    if not isinstance(text, str):
        return BadRow(origin, f"field {text_field!r} must be text, not {type(text).__name__}")
    if not text.strip():
        return BadRow(origin, "empty text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Lone surrogates: \ud800 in JSON, or bytes a reader could not decode.
        return BadRow(origin, f"invalid UTF-8 at character {error.start}")
    return Document(text, origin)


def _judge_json(line: bytes, text_field: str, origin: str) -> Document | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(origin, f"invalid UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRow(origin, f"invalid JSON: {error}")
    return judge(row, text_field, origin)


def _read_text(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    yield judge({text_field: text}, text_field, str(file))


def _read_json_lines(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    # Binary, so that a line of invalid UTF-8 is bad alone.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _judge_json(line.rstrip(b"\r\n"), text_field, f"{file}:{number}")


def _read_json(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    content = file.read_bytes()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except ValueError:
        if not _begins_with_json_line(content):
            raise
        yield from _read_json_lines(file, text_field)  # Many a JSON Lines file is named `.json`.
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield judge(row, text_field, f"{file}:{number}")


def _begins_with_json_line(content: bytes) -> bool:
    try:
        json.loads(content.lstrip(b"\xef\xbb\xbf \r\n").partition(b"\n")[0].decode())
    except ValueError:
        return False
    return True


def _read_csv(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    csv.field_size_limit(sys.maxsize)  # The default, 128 KB, is less than many a document.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        last_line = reader.line_num if reader.fieldnames else 0
        for row in reader:
            yield judge(row, text_field, f"{file}:{last_line + 1}")
            last_line = reader.line_num


def _read_parquet(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        columns = [text_field] if text_field in table.schema_arrow.names else None
        yield from _judge_columns(table.iter_batches(batch_size=1024, columns=columns), text_field, file)


def _read_arrow(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:  # The streaming form, which `datasets` writes.
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        yield from _judge_columns(batches, text_field, file)


def _judge_columns(batches: Any, text_field: str, file: Path) -> Iterator[Document | BadRow]:
    """The rows of record batches, counted from 1."""
    number = 0
    for batch in batches:
        names = batch.schema.names
        texts = batch.column(text_field) if text_field in names else [None] * batch.num_rows
        for text in texts:
            number += 1
            origin = f"{file}:{number}"
            try:
                row = {text_field: text.as_py()} if text is not None else dict.fromkeys(names)
            except UnicodeDecodeError as error:
                yield BadRow(origin, f"invalid UTF-8 at byte {error.start}")
            else:
                yield judge(row, text_field, origin)


READERS: dict[str, Callable[[Path, str], Iterator[Document | BadRow]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
}
