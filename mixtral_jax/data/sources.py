"""Reads the documents that `data.path` names, whatever files they lie in.

A row that cannot be read becomes a `BadRow` that says where it is and what is wrong with it; how
many of those are too many is for `text` to judge, as are tokens and the held-out split.
"""

import csv
import dataclasses
import glob
import hashlib
import json
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError, require

STDLIB = "python-stdlib"
HUB = "hub:"

# Beside code worth learning from, the standard library holds installed packages, its own tests, and
# modules that are tables written out by a program.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
# What `datasets` notes about a folder of Arrow files; not rows.
_BOOKKEEPING = {"dataset_info.json", "dataset_dict.json", "state.json"}


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


def read_documents(path: str, text_field: str) -> Iterator[Document | BadRow]:
    """The rows `path` names, always in the same order.

    Args:
        path: a value of `data.path` (docs/data.md lists its forms).
        text_field: the field, or column, that holds the text of a row.

    Raises:
        ConfigError: at once, when there is nothing to read.
    """
    if path.startswith(HUB):
        rows = enumerate(_load_hub(path), start=1)
        return (_judge(row, text_field, f"{path}:{number}") for number, row in rows)
    return (row for file in _list_files(path) for row in _read_file(file, text_field))


def fingerprint_source(path: str) -> str:
    """A hex hash of the names, sizes and times of the files that `path` names: it changes when they do."""
    if path.startswith(HUB):
        files = [Path(cached["filename"]) for cached in _load_hub(path).cache_files]
    else:
        files = _list_files(path)
    digest = hashlib.sha256(f"{path} {platform.python_version() if path == STDLIB else ''}".encode())
    for file in files:
        stat = file.stat()
        digest.update(f"\n{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _list_files(path: str) -> list[Path]:
    if path == STDLIB:
        return _list_stdlib()
    place = Path(path).expanduser()
    forms = ", ".join(_READERS)
    if place.is_file():
        require(place.suffix in _READERS, f"data.path={path} is none of {forms}: convert it, or rename it")
        return [place]
    if place.is_dir():
        found = (file for file in place.rglob("*") if not _is_hidden(file.relative_to(place)))
    else:
        found = map(Path, glob.glob(str(place), recursive=True))
        require(
            glob.has_magic(path), f"data.path={path} does not exist: name a file, folder, glob, hub:NAME or {STDLIB}"
        )
    files = sorted(file for file in found if file.suffix in _READERS and file.is_file())
    files = [file for file in files if file.name not in _BOOKKEEPING]
    require(files, f"data.path={path} holds no readable file: it must hold at least one of {forms}")
    return files


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _list_stdlib() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    files = [file for file in files if _STDLIB_SKIPPED.isdisjoint(file.relative_to(root).parts)]
    # Some `__init__.py` are empty on purpose: nothing to learn, and nothing to warn about.
    files = [file for file in files if file.stat().st_size > 1]
    require(files, f"data.path={STDLIB}: this Python has no .py sources under {root}; name a file or a folder instead")
    return files


def _load_hub(path: str) -> Any:
    """The Hugging Face dataset that `hub:NAME[:SPLIT]` names."""
    import datasets  # Slow to import, and most runs read files.

    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"data.path={path} cannot be had ({reason}): check NAME and SPLIT of hub:NAME[:SPLIT] and the network, "
            "or name local files"
        ) from error


def _read_file(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    try:
        read = _READERS.get(file.suffix, _read_text)  # Only the standard library's sources are none of them.
        yield from read(file, text_field)
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's own errors are ValueErrors or OSErrors.
        yield BadRow(str(file), f"unreadable {file.suffix} file: {str(error).splitlines()[0]}")


def _judge(row: object, text_field: str, origin: str) -> Document | BadRow:
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
    return _judge(row, text_field, origin)


def _read_text(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    yield _judge({text_field: text}, text_field, str(file))


def _read_json_lines(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    # Binary, so that a line of invalid UTF-8 is bad alone.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _judge_json(line.rstrip(b"\r\n"), text_field, f"{file}:{number}")


def _read_json(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield _judge(row, text_field, f"{file}:{number}")


def _read_csv(file: Path, text_field: str) -> Iterator[Document | BadRow]:
    csv.field_size_limit(sys.maxsize)  # The default, 128 KB, is less than many a document.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        last_line = reader.line_num if reader.fieldnames else 0
        for row in reader:
            yield _judge(row, text_field, f"{file}:{last_line + 1}")
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
                yield _judge(row, text_field, origin)


_READERS: dict[str, Callable[[Path, str], Iterator[Document | BadRow]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
}
