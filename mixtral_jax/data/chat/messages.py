"""Messages of a conversation: read from mappings, and checked as mistral-common checks them.

`formats` turns rows into such mappings; `template` turns messages into tokens.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from mixtral_jax.data.chat.errors import (
    INVALID_CONTENT,
    InvalidAssistantMessageException,
    InvalidMessageStructureException,
    InvalidTextException,
    TokenizerException,
)
from mixtral_jax.data.chat.refused import (
    QUESTION_RULES,
    ROW_RULES,
    find_refused,
)
from mixtral_jax.data.field_names import list_unread
from mixtral_jax.data.marks import find_hidden_mark, read_marks
from mixtral_jax.data.readers import describe_invalid_utf8, name_type

Role = Literal["system", "user", "assistant"]
Mode = Literal["training", "serving"]

TEXT_SEPARATOR = "\n\n"  # Between texts that are joined into one.
_TOOL_ROLES = ("tool", "function", "observation", "function_call")
# ShareGPT's names of roles, in `from`.
_SHAREGPT_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant"),
}
_CONTENT_FIELDS = ("content", "text", "value")
_MESSAGE_FIELDS = {"role", "from", *_CONTENT_FIELDS, "prefix"}
_CHUNK_FIELDS = {"type", "text"}
_RULES = ROW_RULES | QUESTION_RULES
_FOLLOWERS: dict[Role, set[Role]] = {
    "system": {"system", "user", "assistant"},
    "user": {"system", "user", "assistant"},
    "assistant": {"user", "assistant"},
}


@dataclasses.dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        weight: for an assistant message: 0 leaves it out of the loss; 1 and None do not.
        prefix: whether generation continues this message, which must be the last.
        unread: fields of the message that are filled but not read, such as `name of a message`.
    """

    role: Role
    content: str
    weight: int | None = None
    prefix: bool = False
    unread: tuple[str, ...] = ()


def read_messages(items: object) -> list[Message]:
    """Reads messages from mappings with `role` and `content`, or ShareGPT's `from` and `value`.

    A field that is None counts as missing, because tables have every field in every row. `content`
    may be a list of text chunks, or be named `text`. A message that is marked in another tool's
    words (`marks`) as not to be learnt gets the weight 0.

    Raises:
        ChatException: names the index of the first item that is not a message, or that fills a
            field that no template can express.
    """
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise InvalidMessageStructureException(
            "messages must be a list", found=f"found {name_type(items)}"
        )
    return [_read_message(item, index) for index, item in enumerate(items)]


def check_structure(messages: Sequence[Message], mode: Mode) -> None:
    """Makes sure that the messages are a conversation that can be trained on or answered.

    The rules, their order and their wording are those of mistral-common's MistralRequestValidator.

    Raises:
        ChatException: names the first rule that is broken, and the message that breaks it.
    """
    if not messages:
        raise InvalidMessageStructureException("Conversation must have at least one message")
    last = len(messages) - 1
    if last == 0 and messages[0].role == "assistant":
        rule = "Conversation must start with a user message or system message"
        raise InvalidMessageStructureException(rule, message=0)
    _check_last(messages[last], last, mode)
    for index, (before, after) in enumerate(itertools.pairwise(messages), start=1):
        if after.role not in _FOLLOWERS[before.role]:
            rule = f"Unexpected role '{after.role}' after role '{before.role}'"
            raise InvalidMessageStructureException(rule, message=index)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            _check_assistant(message, index, mode, is_last=index == last)


def _check_last(message: Message, index: int, mode: Mode) -> None:
    is_answer = message.role == "assistant"
    if mode == "training":
        if not is_answer:
            rule = f"Expected last role Assistant for finetuning but got {message.role}"
            raise InvalidMessageStructureException(rule, message=index)
        if message.prefix:
            raise InvalidMessageStructureException(
                "Cannot continue final message in finetuning mode", message=index
            )
    elif is_answer and not message.prefix:
        rule = (
            "Expected last role User or Tool (or Assistant with prefix) for serving but got "
            "assistant"
        )
        raise InvalidMessageStructureException(rule, message=index)


def _check_assistant(message: Message, index: int, mode: Mode, *, is_last: bool) -> None:
    if not message.content:
        rule = "Assistant message must have either content or tool_calls, but not both."
        raise InvalidAssistantMessageException(rule, message=index, found="it is empty")
    if mode == "training" and message.weight not in (None, 0, 1):
        rule = "Assistant message weight must be either 0 or 1"
        raise InvalidAssistantMessageException(
            rule, message=index, found=f"weight={message.weight!r}"
        )
    if message.prefix and not is_last:
        raise InvalidAssistantMessageException(
            "Assistant message with prefix True must be last message", message=index
        )


def _read_message(item: object, index: int) -> Message:
    if not isinstance(item, Mapping):
        raise InvalidMessageStructureException(
            "a message must be an object with role and content",
            message=index,
            found=f"found {name_type(item)}",
        )
    role = _read_role(item, index)
    _refuse_fields(item, _MESSAGE_FIELDS, role, index)
    weight = _read_weight(item, role, index)
    content = _find_content(item, role, index)
    read = _MESSAGE_FIELDS if item.get("role") is not None else {*_MESSAGE_FIELDS, "from"}
    unread = [f"{name} of a message" for name in list_unread(item, {*read, *read_marks(item)})]
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        learns = role == "assistant" and weight != 0
        texts = [
            _read_chunk(chunk, place, role, index, learns=learns)
            for place, chunk in enumerate(content)
        ]
        unread += [
            f"{name} of a chunk"
            for chunk in content
            for name in list_unread(chunk, {*_CHUNK_FIELDS, *read_marks(chunk)})
        ]
        content = TEXT_SEPARATOR.join(filter(None, texts))
    text = _require_text(content, role, index)
    return Message(role, text, weight, _read_prefix(item, role, index), tuple(unread))


def _refuse_fields(fields: Mapping[Any, Any], read: set[str], role: Role, index: int) -> None:
    """Refuses a message, or a chunk of one, that fills a field which changes what it means."""
    if refused := find_refused(fields, _RULES, read):
        kind = TokenizerException if refused.is_of_tools else INVALID_CONTENT[role]
        rule = f"{refused.rule}: leave such rows out"
        raise kind(rule, message=index, found=f"found {refused.name}")
    if role == "assistant" and (mark := find_hidden_mark(fields)):
        rule = "a mark must stand beside the content, not in the metadata"
        raise INVALID_CONTENT[role](rule, message=index, found=mark)


def _read_role(item: Mapping[Any, Any], index: int) -> Role:
    role, sender = item.get("role"), item.get("from")
    sender = _SHAREGPT_ROLES.get(sender, sender) if isinstance(sender, str) else sender
    role = sender if role is None else role
    if sender in get_args(Role) and sender != role:
        found = f"role={role!r}, from={item['from']!r}"
        rule = "role and from of a message must agree: leave one out"
        raise InvalidMessageStructureException(rule, message=index, found=found)
    if role in _TOOL_ROLES:
        rule = "tools are not supported by any template: leave such rows out"
        raise TokenizerException(rule, message=index, found=f"role={role!r}")
    if role == "developer":  # The name of the system role for newer OpenAI models.
        return "system"
    for known in get_args(Role):
        if role == known:
            return known
    rule = f"role must be one of {', '.join(get_args(Role))} (or developer, which means system)"
    found = "it has no role" if role is None else f"role={role!r}"
    raise InvalidMessageStructureException(rule, message=index, found=found)


def _read_weight(item: Mapping[Any, Any], role: Role, index: int) -> Any:
    """What the marks of a message say: 0, 1 or None; a wrong `weight` is given as it is."""
    said = read_marks(item)
    found = ", ".join(f"{name}={item[name]!r}" for name in said)
    if role != "assistant":
        if set(said.values()) <= {False}:  # It is not learnt anyway.
            return None
        rule = f"only assistant messages can be learnt, not a {role} message: leave the mark out"
        raise INVALID_CONTENT[role](rule, message=index, found=found)
    if not said:
        return None
    mark, *others = set(said.values())
    if others:
        rule = "the marks of a message must agree on whether it is learnt"
        raise InvalidAssistantMessageException(rule, message=index, found=found)
    if mark is not None:
        return int(mark)
    for name in said:
        if name != "weight":  # `check_structure` looks at that one.
            rule = f"{name} must be true or false, or 1 or 0"
            raise InvalidAssistantMessageException(rule, message=index, found=found)
    return item["weight"]


def _read_prefix(item: Mapping[Any, Any], role: Role, index: int) -> bool:
    prefix = item.get("prefix")
    if role != "assistant" and prefix:
        rule = f"only assistant messages may have a prefix, not a {role} message"
        raise INVALID_CONTENT[role](rule, message=index)
    if prefix not in (None, True, False):
        rule = "prefix must be true or false"
        raise InvalidAssistantMessageException(rule, message=index, found=f"prefix={prefix!r}")
    return bool(prefix)


def _find_content(item: Mapping[Any, Any], role: Role, index: int) -> Any:
    given = [name for name in _CONTENT_FIELDS if item.get(name) is not None]
    if len(given) > 1:
        rule = f"a message must have one of {' and '.join(given)}, not both: leave one out"
        raise INVALID_CONTENT[role](rule, message=index)
    if not given:  # `check_structure` rejects an answer that is missing or empty in one way.
        return "" if role == "assistant" else None
    return item[given[0]]


def _require_text(content: object, role: Role, index: int) -> str:
    if not isinstance(content, str):
        found = "it is missing" if content is None else f"found {name_type(content)}"
        rule = f"content of a {role} message must be text"
        raise INVALID_CONTENT[role](rule, message=index, found=found)
    try:
        content.encode()
    except UnicodeEncodeError as error:
        # A lone surrogate: \ud800 in JSON, or a byte that a reader could not decode.
        rule = describe_invalid_utf8(f"character {error.start}")
        raise InvalidTextException(rule, message=index) from error
    return content


def _read_chunk(chunk: object, place: int, role: Role, index: int, *, learns: bool) -> str:
    """Reads a chunk of a message, `{"type": "text", "text": ...}`.

    Args:
        place: its index among the chunks of the message.
        learns: whether the message is learnt, which a mark of the chunk must not contradict.
    """
    kind, name = INVALID_CONTENT[role], f"content[{place}]"
    if not isinstance(chunk, Mapping) or chunk.get("type") is None:
        rule = "a chunk of content must be an object with type and text"
        raise kind(rule, message=index, found=f"{name} {_describe_chunk(chunk)}")
    if chunk["type"] != "text":
        rule = f"Unexpected content chunk types in {role} message: only text chunks are supported"
        raise kind(rule, message=index, found=f"{name}, type={chunk['type']!r}")
    _refuse_fields(chunk, _CHUNK_FIELDS, role, index)
    if not isinstance(chunk.get("text"), str):
        rule = "a text chunk must have its text in the field text"
        raise kind(rule, message=index, found=f"{name} {_describe_chunk(chunk)}")
    if any(said is not learns for said in read_marks(chunk).values()):
        rule = "a message is learnt whole: a mark of a chunk must say the same as its message"
        marks = ", ".join(f"{mark}={chunk[mark]!r}" for mark in read_marks(chunk))
        raise kind(rule, message=index, found=f"{name} has {marks}")
    return chunk["text"]


def _describe_chunk(chunk: object) -> str:
    if not isinstance(chunk, Mapping):
        return f"is {name_type(chunk)}"
    if chunk.get("text") is None or isinstance(chunk["text"], str):
        return f"has {', '.join(map(str, chunk)) or 'no field'}"
    return f"has {name_type(chunk['text'])} as text"
