"""Rows in every format that chat data sets use, as messages.

docs/chat_data.md describes the formats. The rules for messages are in `messages`; what messages
become is in `template`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mixtral_jax.config import ChatFormat
from mixtral_jax.data.chat.errors import (
    InvalidRowException,
    InvalidSystemPromptException,
    InvalidTextException,
)
from mixtral_jax.data.chat.fields import Row
from mixtral_jax.data.chat.messages import Message, read_messages
from mixtral_jax.data.chat.refused import QUESTION_PARTS, REFUSED
from mixtral_jax.data.field_names import is_filled
from mixtral_jax.data.marks import MARKS, METADATA
from mixtral_jax.data.readers import describe_invalid_utf8, name_type

# Which format a field is a sign of. The first of these fields that is not null decides.
_FORMAT_BY_FIELD: dict[str, ChatFormat] = {
    "messages": "messages",
    "interactions": "interactions",
    "conversations": "conversations",
    "instruction": "alpaca",
    "completion": "prompt_completion",
    "text": "text",
    "content": "text",
}
_LIST_FORMATS: tuple[ChatFormat, ...] = ("messages", "interactions", "conversations")
_SYSTEM_FIELDS = ("system_prompt", "system")
_COMMON_FIELDS = ("only_last", "split_group", *MARKS)
# Format -> the fields that it reads.
READ_FIELDS: dict[ChatFormat, tuple[str, ...]] = {
    **{field: (field, *_SYSTEM_FIELDS, *_COMMON_FIELDS) for field in _LIST_FORMATS},
    "alpaca": ("instruction", "input", "output", "history", *_SYSTEM_FIELDS, *_COMMON_FIELDS),
    "prompt_completion": ("prompt", "completion", *_SYSTEM_FIELDS, *_COMMON_FIELDS),
    "text": ("text", "content", *_COMMON_FIELDS),
}
# Formats whose question is a field of the row, so that another field may belong to it.
FORMATS_IN_PARTS: tuple[ChatFormat, ...] = ("alpaca", "prompt_completion")
# All fields whose values matter; other columns of a table are never loaded. A file that is one text
# becomes the first.
FIELDS = tuple(
    dict.fromkeys(
        [
            "text",
            *(name for names in READ_FIELDS.values() for name in names),
            *(*REFUSED, *QUESTION_PARTS, *METADATA),
        ]
    )
)


def require_fields(value: object) -> Row:
    """Makes sure that a row is an object.

    Raises:
        ChatException: it is not.
    """
    if not isinstance(value, Mapping):
        raise InvalidRowException(
            f"a row must be an object with one of the fields {', '.join(_FORMAT_BY_FIELD)}",
            found=f"found {name_type(value)}",
        )
    return value


def find_format(row: Row) -> ChatFormat:
    """Finds the format of a row by the fields that it fills.

    Raises:
        InvalidRowException: no format fits, or several do.
    """
    filled = [field for field in _FORMAT_BY_FIELD if row.get(field) is not None]
    lists = [field for field in filled if field in _LIST_FORMATS]
    if len(lists) > 1:
        raise InvalidRowException(
            f"a row with {' and '.join(lists)} could be read in two ways: set data.chat.format to "
            "one of them"
        )
    if not filled:
        raise InvalidRowException(
            f"a row must have one of the fields {', '.join(_FORMAT_BY_FIELD)}; or say what its own "
            "are with data.chat.fields, such as question:user,answer:assistant",
            found=f"it has {', '.join(map(str, row)) or 'none'}",
        )
    return _FORMAT_BY_FIELD[filled[0]]


def is_text(row: Row) -> bool:
    """Whether the format of a row is `text`, by the fields that it fills."""
    filled = (_FORMAT_BY_FIELD[field] for field in _FORMAT_BY_FIELD if row.get(field) is not None)
    return next(filled, None) == "text"


def read_row(row: Row, format: ChatFormat) -> list[Message]:
    """Reads the messages of a row of any format but `text`.

    Raises:
        ChatException: says what is wrong, and in which message.
    """
    messages = _READERS[format](row)
    return _train_on_last(messages) if _is_only_last(row) else messages


def read_text(row: Row) -> str:
    """Reads the text of a row of the format `text`.

    Raises:
        ChatException: the text is missing, empty or not UTF-8.
    """
    text, content = row.get("text"), row.get("content")
    if text is not None and content is not None:
        raise InvalidRowException(
            "a row must have one of text and content, not both: leave one out"
        )
    if _is_only_last(row):
        raise InvalidRowException("a text has no answers, so only_last must not be true")
    text = _require_text(row, "text" if content is None else "content")
    if not text.strip():
        raise InvalidTextException("empty text: leave the row out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"character {error.start}"
        raise InvalidTextException(describe_invalid_utf8(place)) from error
    return text


def _read_list(field: str) -> Callable[[Row], list[Message]]:
    def read(row: Row) -> list[Message]:
        return read_messages(_transpose(row.get(field)))

    return read


def _read_alpaca(row: Row) -> list[Message]:
    question = _require_text(row, "instruction")
    if is_filled(row.get("input")):
        question += "\n" + _require_text(row, "input")
    history: Any = row.get("history") or []
    messages = []
    for pair in history if _is_list(history) else [history]:
        if not _is_list(pair) or len(pair) != 2:
            rule = "history must be a list of pairs of a question and its answer"
            raise InvalidRowException(rule, found=f"found {name_type(pair)}")
        messages += _make_pair(*pair)
    return read_messages([*messages, *_make_pair(question, _require_text(row, "output"))])


def _read_prompt_completion(row: Row) -> list[Message]:
    prompt, completion = _transpose(row.get("prompt")), _transpose(row.get("completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return read_messages(_make_pair(prompt, completion))
    if not (_is_list(prompt) and _is_list(completion)):
        first, second = (
            "missing" if items is None else name_type(items) for items in (prompt, completion)
        )
        raise InvalidRowException(
            "prompt and completion must both be text, or both lists of messages",
            found=f"prompt is {first}, completion is {second}",
        )
    messages = read_messages([*prompt, *completion])
    # Only the completion is trained on.
    given, completing = messages[: len(prompt)], messages[len(prompt) :]
    return [*map(_without_loss, given), *completing]


_READERS: dict[ChatFormat, Callable[[Row], list[Message]]] = {
    **{field: _read_list(field) for field in _LIST_FORMATS},
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
}


def read_system(row: Row, messages: Sequence[Message]) -> list[Message]:
    """Reads the system prompt that a row has in a field of its own: one message, or none.

    Raises:
        ChatException: it is not text, or the row has another system prompt.
    """
    fields = [field for field in _SYSTEM_FIELDS if row.get(field)]
    if not fields:
        return []
    if len(fields) > 1 or any(message.role == "system" for message in messages):
        raise InvalidSystemPromptException(
            f"a row must have one system prompt: keep either {fields[0]} or the other one"
        )
    if not isinstance(row[fields[0]], str):
        raise InvalidSystemPromptException(
            f"{fields[0]} must be text", found=f"found {name_type(row[fields[0]])}"
        )
    return read_messages([{"role": "system", "content": row[fields[0]]}])


def _require_text(row: Row, field: str) -> str:
    if not isinstance(row.get(field), str):
        found = "it is missing" if row.get(field) is None else f"found {name_type(row[field])}"
        raise InvalidRowException(f"{field} must be text", found=found)
    return row[field]


def _make_pair(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _transpose(items: Any) -> Any:
    """Turns an object of equally long lists into a list of objects.

    `datasets` may return a list of messages as an object with a list for each field.
    """
    is_table = isinstance(items, Mapping) and all(
        isinstance(values, list) for values in items.values()
    )
    if not is_table or len({len(values) for values in items.values()}) != 1:
        return items
    return [dict(zip(items, values, strict=True)) for values in zip(*items.values(), strict=True)]


def _is_only_last(row: Row) -> bool:
    only_last = row.get("only_last")
    if is_filled(only_last) and only_last not in (True, False):
        raise InvalidRowException("only_last must be true or false", found=f"found {only_last!r}")
    return bool(only_last)


def _train_on_last(messages: list[Message]) -> list[Message]:
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    last = answers[-1] if answers else 0
    return [*map(_without_loss, messages[:last]), *messages[last:]]


def _without_loss(message: Message) -> Message:
    return dataclasses.replace(message, weight=0) if message.role == "assistant" else message
