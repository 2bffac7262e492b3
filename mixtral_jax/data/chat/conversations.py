"""Rows as conversations, in every format that data sets write them in.

docs/chat_data.md describes the formats. What messages must be, and what they become, is for
`messages` and `chat`; how rows are read, for `sources`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mixtral_jax.config import ChatFormat
from mixtral_jax.data.chat.errors import (
    ChatException,
    InvalidRowException,
    InvalidSystemPromptException,
    InvalidTextException,
    NoSupervisedTokenException,
    TokenizerException,
)
from mixtral_jax.data.chat.messages import Message, Mode, read_messages
from mixtral_jax.data.chat.template import ChatTemplate, Turn
from mixtral_jax.data.domains import UNSAID, Category
from mixtral_jax.data.readers import BadRow, RawRow
from mixtral_jax.data.sources import read_rows

_Row = Mapping[Any, Any]

# Field -> the format that it shows, where none is set; the first that a row has filled decides.
_SIGNS = {
    "messages": "messages",
    "interactions": "interactions",
    "conversations": "conversations",
    "instruction": "alpaca",
    "completion": "prompt_completion",
    "text": "text",
    "content": "text",
}
_LISTS = ("messages", "interactions", "conversations")
_SYSTEM_FIELDS = ("system_prompt", "system")
_TOOL_FIELDS = ("tools", "available_tools")
# Every field that is read: of wide tables, the others are left alone.
FIELDS = (
    "text",
    "content",
    "messages",
    "interactions",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    *_SYSTEM_FIELDS,
    *_TOOL_FIELDS,
    "only_last",
    "split_group",
)
_SHAREGPT_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant"),
}


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that is fit for its template, or a plain text.

    Attributes:
        turns: what it becomes, but for the ids of its texts.
        messages: as they were read, a system prompt of the row first; none for a text.
        key: chats of one key are on one side of the held-out split: what the user says, or the
            row's `split_group`.
        origin: where it was read, such as `file.jsonl:17`.
        category: what its file says of it (`domains`).
    """

    turns: Sequence[Turn]
    messages: Sequence[Message]
    key: str
    origin: str
    category: Category = UNSAID

    @property
    def num_characters(self) -> int:
        """How much there is to encode."""
        return sum(len(turn.text) for turn in self.turns)


def read_chats(
    path: str,
    template: ChatTemplate,
    *,
    format: ChatFormat = "auto",
    mode: Mode = "training",
    suffixes: str | None = None,
) -> Iterator[Chat | BadRow]:
    """The conversations of one source, always in the same order.

    Args:
        path: of a `Source`.
        suffixes: those of the files that are read, as in `DataConfig`.

    Raises:
        ConfigError: at once, when there is nothing to read; at a file that cannot be read.
    """

    def judge(row: RawRow | BadRow) -> Chat | BadRow:
        try:
            return (
                row
                if isinstance(row, BadRow)
                else read_chat(row, template, format=format, mode=mode)
            )
        except ChatException as error:
            return _as_bad_row(error)

    return map(judge, read_rows(path, FIELDS, suffixes))


def read_chat(
    row: RawRow, template: ChatTemplate, *, format: ChatFormat = "auto", mode: Mode = "training"
) -> Chat:
    """The conversation in a row.

    Raises:
        ChatException: what is wrong with it, in which row and message.
    """
    system: list[Message] = []
    try:
        fields = _require_fields(row.value)
        name = _find_format(fields) if format == "auto" else format
        if name == "text":
            text = _read_text(fields)
            return Chat(template.lay_out_text(text, mode=mode), (), text, row.origin, row.category)
        messages = _READERS[name](fields)
        system = _read_system(fields, messages)
        turns = template.lay_out([*system, *messages], mode=mode)
        return Chat(
            turns, [*system, *messages], _make_key(fields, messages), row.origin, row.category
        )
    except ChatException as error:
        _count_without(len(system), error)
        error.origin = row.origin
        raise


def drop_unsupervised(rows: Iterator[Chat | BadRow]) -> Iterator[Chat | BadRow]:
    """The same rows; a conversation whose every answer has weight 0 is a bad one."""
    for row in rows:
        if isinstance(row, Chat) and not any(turn.is_supervised for turn in row.turns):
            rule = "a conversation must have an answer to train on"
            error = NoSupervisedTokenException(rule, found="every weight is 0")
            error.origin = row.origin
            row = _as_bad_row(error)
        yield row


def _as_bad_row(error: ChatException) -> BadRow:
    return BadRow(error.origin, error.describe(), type(error).__name__)


def _require_fields(value: object) -> _Row:
    if not isinstance(value, Mapping):
        raise InvalidRowException("a row must be an object", found=type(value).__name__)
    for field in _TOOL_FIELDS:
        if value.get(field) not in (None, "", [], "[]"):
            raise TokenizerException(
                "Tools have no template here: leave such rows out", found=field
            )
    return value


def _find_format(row: _Row) -> str:
    filled = [field for field in _SIGNS if row.get(field) is not None]
    lists = [field for field in filled if field in _LISTS]
    if len(lists) > 1:
        raise InvalidRowException(
            f"a row with {' and '.join(lists)} needs data.chat.format to say which is meant"
        )
    if not filled:
        found = f"it has {', '.join(map(str, row)) or 'none'}"
        raise InvalidRowException(
            f"a row must have one of the fields {', '.join(_SIGNS)}", found=found
        )
    return _SIGNS[filled[0]]


def _read_text(row: _Row) -> str:
    text, content = row.get("text"), row.get("content")
    if text is not None and content is not None:
        raise InvalidRowException("a row must have text or content, not both")
    text = _require_text(row, "text" if content is None else "content")
    if not text.strip():
        raise InvalidTextException("empty text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidTextException(f"invalid UTF-8 at character {error.start}") from error
    return text


def _read_list(field: str) -> Callable[[_Row], list[Message]]:
    def read(row: _Row) -> list[Message]:
        items = _transpose(row.get(field))
        if _is_list(items):
            items = [_rename(item) for item in items]
        messages = read_messages(items)
        return _train_last(messages) if row.get("only_last") else messages

    return read


def _read_alpaca(row: _Row) -> list[Message]:
    asked = _require_text(row, "instruction")
    if row.get("input"):
        asked += "\n" + _require_text(row, "input")
    history: Any = row.get("history") or []
    messages = []
    for pair in history if _is_list(history) else [history]:
        if not _is_list(pair) or len(pair) != 2:
            raise InvalidRowException(
                "history must be a list of pairs of a question and its answer"
            )
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    return read_messages([*messages, *_ask(asked, _require_text(row, "output"))])


def _read_prompt_completion(row: _Row) -> list[Message]:
    prompt, completion = _transpose(row.get("prompt")), _transpose(row.get("completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return read_messages(_ask(prompt, completion))
    for field, items in (("prompt", prompt), ("completion", completion)):
        if not _is_list(items):
            raise InvalidRowException(
                "prompt and completion must both be text, or both lists of messages",
                found=f"{field} is {'absent' if items is None else type(items).__name__}",
            )
    shown = len(prompt)
    messages = read_messages([*prompt, *completion])
    # Only what completes the prompt is learnt.
    return [
        _untrained(message) if index < shown else message for index, message in enumerate(messages)
    ]


_READERS: dict[str, Callable[[_Row], list[Message]]] = {
    **{field: _read_list(field) for field in _LISTS},
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
}


def _read_system(row: _Row, messages: Sequence[Message]) -> list[Message]:
    """The system prompt that the row has beside its messages."""
    fields = [field for field in _SYSTEM_FIELDS if row.get(field)]
    if not fields:
        return []
    if len(fields) > 1 or any(message.role == "system" for message in messages):
        raise InvalidSystemPromptException(
            "a row must have one system prompt: a field of that name, or messages"
        )
    if not isinstance(row[fields[0]], str):
        raise InvalidSystemPromptException(
            f"{fields[0]} must be text", found=type(row[fields[0]]).__name__
        )
    return read_messages([{"role": "system", "content": row[fields[0]]}])


def _make_key(row: _Row, messages: Sequence[Message]) -> str:
    group = row.get("split_group")
    if isinstance(group, str) and group:
        return group
    said = [message.content for message in messages if message.role == "user"]
    return "\0".join(said) or "\0".join(message.content for message in messages)


def _count_without(num_system: int, error: ChatException) -> None:
    """Makes the error count messages as the row does, which has its system prompt elsewhere."""
    if error.message is not None and num_system:
        error.message -= num_system
        if error.message < 0:
            error.message, error.found = None, "the system prompt"


def _require_text(row: _Row, field: str) -> str:
    if not isinstance(row.get(field), str):
        found = "it is absent" if row.get(field) is None else type(row[field]).__name__
        raise InvalidRowException(f"{field} must be text", found=found)
    return row[field]


def _ask(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _transpose(items: Any) -> Any:
    """Items one by one, where a table has their fields one by one, as `datasets` may return them."""
    if not isinstance(items, Mapping) or not all(
        isinstance(values, list) for values in items.values()
    ):
        return items
    if len({len(values) for values in items.values()}) != 1:
        return items
    return [dict(zip(items, values, strict=True)) for values in zip(*items.values(), strict=True)]


def _rename(item: Any) -> Any:
    """A ShareGPT message, `{"from": "human", "value": ...}`, as others write it."""
    if not isinstance(item, Mapping) or item.get("from") is None or item.get("role") is not None:
        return item
    role = item["from"]
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": item.get("value"), "weight": item.get("weight")}


def _train_last(messages: list[Message]) -> list[Message]:
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    return [
        _untrained(message) if index in answers[:-1] else message
        for index, message in enumerate(messages)
    ]


def _untrained(message: Message) -> Message:
    return dataclasses.replace(message, weight=0) if message.role == "assistant" else message
