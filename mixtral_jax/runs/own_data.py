"""Data that a program gives in place of `data.path`: texts, token ids or conversations in memory.

They become a file in the workdir that the config then names, so that they take the way of all other
data, and resuming, evaluation and analysis find them again. Files are named after their content.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.config import Config, ConfigError, require
from mixtral_jax.runs.workdir import not_writable
from mixtral_jax.whole_files import make_mark

Document = str | Sequence[int] | np.ndarray
Message = Mapping[str, Any]
Conversation = Sequence[Message] | Mapping[str, Any]


def keep_documents(documents: Iterable[Document], config: Config, workdir: Path) -> Config:
    """Writes texts, or lists of token ids, into the workdir; the config then names them.

    Raises:
        ConfigError: there is no document, or one is neither text nor a list of whole numbers.
    """
    _require_many(documents, "documents")
    rows = ({config.data.text_field: _to_json(document)} for document in documents)
    return _name_data(config, _write_rows(rows, workdir, "documents"))


def keep_conversations(
    conversations: Iterable[Conversation], config: Config, workdir: Path
) -> Config:
    """Writes conversations into the workdir; the config then names them.

    A conversation is a list of messages, or a row of any chat format that `data.path` takes.

    Raises:
        ConfigError: there is no conversation, or one is something else.
    """
    _require_many(conversations, "conversations")
    rows = map(_to_row, conversations)
    return _name_data(config, _write_rows(rows, workdir, "conversations"))


def _require_many(data: Any, what: str) -> None:
    is_one = isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable)
    require(not is_one, f"data must be many {what}, such as a list of them: found {data!r:.60}")


def _to_json(document: Any) -> str | list[int]:
    if isinstance(document, str):
        return document
    array = np.asarray(document)
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(
            f"data: a document must be text or a list of token ids: found {document!r:.60}"
        )
    return array.tolist()


def _to_row(conversation: Any) -> dict[str, Any]:
    if isinstance(conversation, Mapping):
        return {str(key): value for key, value in conversation.items()}
    is_list = isinstance(conversation, Sequence) and not isinstance(conversation, str)
    if not is_list or not all(isinstance(message, Mapping) for message in conversation):
        raise ConfigError(
            "data: a conversation must be a list of messages, or a row of a chat format: found "
            f"{conversation!r:.60}"
        )
    messages: list[Mapping[str, Any]] = list(conversation)
    return {"messages": [dict(message) for message in messages]}


def _name_data(config: Config, path: Path) -> Config:
    # Absolute, so that the run is the same one from another current folder.
    data = dataclasses.replace(config.data, path=str(path.absolute()), suffixes=None)
    return dataclasses.replace(config, data=data)


def _write_rows(rows: Iterator[dict[str, Any]], workdir: Path, what: str) -> Path:
    """Writes rows as JSON lines; a file of the same rows stays as it is."""
    folder = workdir / "data"
    temporary = folder / f".{what}.{make_mark()}.partial"
    digest, num_rows = hashlib.sha256(), 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for row in rows:
                num_rows += 1
                line = _encode_row(row)
                digest.update(line)
                file.write(line)
        require(num_rows, f"data holds no {what}: give some")
        path = folder / f"{what}-{digest.hexdigest()[:16]}.jsonl"
        if not path.exists():
            temporary.replace(path)
        return path
    except OSError as error:
        raise not_writable(workdir, error.strerror or str(error)) from error
    finally:
        if folder.is_dir():
            temporary.unlink(missing_ok=True)


def _encode_row(row: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(row) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data: {row!r:.60} cannot be written as JSON ({error})") from None
