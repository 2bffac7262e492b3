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
from mixtral_jax.data.readers import describe_invalid_utf8, name_type

Role = Literal["system", "user", "assistant"]
Mode = Literal["training", "serving"]

TEXT_SEPARATOR = "\n\n"  # Between texts that are joined into one.
_TOOL_ROLES = ("tool", "function", "observation", "function_call")
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
    """

    role: Role
    content: str
    weight: int | None = None
    prefix: bool = False


def read_messages(items: object) -> list[Message]:
    """Reads messages from mappings with `role` and `content`.

    A field that is None counts as missing, because tables have every field in every row. `content`
    may be a list of text chunks, or be named `text`. Fields that `Message` lacks are ignored.

    Raises:
        ChatException: names the index of the first item that is not a message.
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
    content = _read_content(item, role, index)
    weight, prefix = item.get("weight"), item.get("prefix")
    if role != "assistant" and (weight or prefix):
        rule = f"only assistant messages may have weight or prefix, not a {role} message"
        raise INVALID_CONTENT[role](rule, message=index)
    if prefix not in (None, True, False):
        found = f"prefix={prefix!r}"
        raise InvalidAssistantMessageException(
            "prefix must be true or false", message=index, found=found
        )
    return Message(role, content, weight if role == "assistant" else None, bool(prefix))


def _read_role(item: Mapping[Any, Any], index: int) -> Role:
    role = item.get("role")
    if role in _TOOL_ROLES or item.get("tool_calls"):
        raise TokenizerException(
            "tools are not supported by any template: leave such messages out",
            message=index,
            found="found tool_calls" if item.get("tool_calls") else f"role={role!r}",
        )
    if role == "developer":  # The name of the system role for newer OpenAI models.
        return "system"
    for known in get_args(Role):
        if role == known:
            return known
    rule = f"role must be one of {', '.join(get_args(Role))}"
    found = "it has no role" if role is None else f"role={role!r}"
    raise InvalidMessageStructureException(rule, message=index, found=found)


def _read_content(item: Mapping[Any, Any], role: Role, index: int) -> str:
    content, text = item.get("content"), item.get("text")
    invalid = INVALID_CONTENT[role]
    if content is not None and text is not None:
        rule = "a message must have one of content and text, not both: leave one out"
        raise invalid(rule, message=index)
    content = text if content is None else content
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        texts = [_read_chunk(chunk, role, index) for chunk in content]
        content = TEXT_SEPARATOR.join(filter(None, texts))
    if content is None and role == "assistant":
        content = ""  # `check_structure` rejects both with the same words.
    if not isinstance(content, str):
        found = "it is missing" if content is None else f"found {name_type(content)}"
        raise invalid(f"content of a {role} message must be text", message=index, found=found)
    try:
        content.encode()
    except UnicodeEncodeError as error:
        # A lone surrogate: \ud800 in JSON, or a byte that a reader could not decode.
        rule = describe_invalid_utf8(f"character {error.start}")
        raise InvalidTextException(rule, message=index) from error
    return content


def _read_chunk(chunk: object, role: Role, index: int) -> str:
    """Reads a chunk of a message, `{"type": "text", "text": ...}`."""
    text = chunk.get("text") if isinstance(chunk, Mapping) and chunk.get("type") == "text" else None
    if not isinstance(text, str):
        is_object = isinstance(chunk, Mapping)
        raise INVALID_CONTENT[role](
            f"Unexpected content chunk types in {role} message: only text chunks are supported",
            message=index,
            found=f"type={chunk.get('type')!r}" if is_object else f"found {name_type(chunk)}",
        )
    return text
