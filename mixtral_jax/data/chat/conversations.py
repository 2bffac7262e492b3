"""Conversations: the rows of a source, read, checked and laid out as turns of a template.

`formats` reads messages from a row, `template` lays them out, and `sources` reads the rows.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from mixtral_jax.config import ChatFormat, FieldMeaning
from mixtral_jax.data.chat.errors import (
    ChatException,
    InvalidRowException,
    NoSupervisedTokenException,
)
from mixtral_jax.data.chat.fields import (
    NamedRow,
    Row,
    list_unread_fields,
    name_fields,
    refuse_fields,
)
from mixtral_jax.data.chat.formats import (
    FIELDS,
    FORMATS_IN_PARTS,
    READ_FIELDS,
    find_format,
    is_text,
    read_row,
    read_system,
    read_text,
    require_fields,
)
from mixtral_jax.data.chat.messages import Message, Mode
from mixtral_jax.data.chat.template import ChatTemplate, Turn
from mixtral_jax.data.domains import UNKNOWN, Category
from mixtral_jax.data.field_names import is_filled
from mixtral_jax.data.readers import BadRow, RawRow, name_type
from mixtral_jax.data.sources import Source, read_rows


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that fits its template, or a plain text.

    Attributes:
        turns: the conversation laid out by its template, before its texts are tokenized.
        messages: the messages of the row, with its system prompt first; empty for a plain text.
        key: conversations with equal keys are on the same side of the held-out split. It is the
            row's `split_group`, or else what the user says.
        origin: where it was read, such as `file.jsonl:17`.
        category: the kind of text, judged by its file (`domains`).
        unread: what the row fills and nothing reads, such as `id` or `name of a message`.
    """

    turns: Sequence[Turn]
    messages: Sequence[Message]
    key: str
    origin: str
    category: Category = UNKNOWN
    unread: Sequence[str] = ()

    @property
    def num_characters(self) -> int:
        """Number of characters to encode."""
        return sum(len(turn.text) for turn in self.turns)


def read_chats(
    source: Source | str,
    template: ChatTemplate,
    *,
    format: ChatFormat = "auto",
    fields: Mapping[str, FieldMeaning] | None = None,
    mode: Mode = "training",
    suffixes: str | None = None,
) -> Iterator[Chat | BadRow]:
    """Reads the conversations of one source, always in the same order.

    Args:
        source: or the path of one.
        fields: what fields of rows mean, if the user says so.
        suffixes: which files to read, as in `DataConfig`.

    Raises:
        ConfigError: there is nothing to read (raised at once, or at the end), or a file cannot be
            read (raised when its turn comes).
    """

    def read(row: RawRow | BadRow) -> Chat | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            return read_chat(row, template, format=format, fields=fields, mode=mode)
        except ChatException as error:
            return _as_bad_row(error)

    return map(read, read_rows(source, (*FIELDS, *(fields or ())), suffixes))


def read_chat(
    row: RawRow,
    template: ChatTemplate,
    *,
    format: ChatFormat = "auto",
    fields: Mapping[str, FieldMeaning] | None = None,
    mode: Mode = "training",
) -> Chat:
    """Reads the conversation in a row.

    Raises:
        ChatException: says what is wrong, in which row and in which message.
    """
    system: list[Message] = []
    try:
        named = name_fields(require_fields(row.value), fields or {})
        may_be_text = format == "text" or (format == "auto" and is_text(named.row))
        refuse_fields(named.row, is_text=may_be_text and not named.has_messages)
        name = _choose_format(named, format)
        if name == "text":
            text = read_text(named.row)
            turns = template.lay_out_text(text, mode=mode)
            messages, everything = [], []
        else:
            text = ""
            messages = read_row(named.row, name)
            system = read_system(named.row, messages)
            everything = [*system, *messages]
            turns = template.lay_out(everything, mode=mode)
        key = _read_group(named.row) or text or _make_key(messages)
        unread = _list_unread(named, name, messages)
        return Chat(turns, everything, key, row.origin, row.category, unread)
    except ChatException as error:
        _number_as_in_row(error, num_system=len(system))
        error.origin = row.origin
        raise


def drop_unsupervised(rows: Iterator[Chat | BadRow]) -> Iterator[Chat | BadRow]:
    """Gives the same rows, but turns each conversation whose answers all have weight 0 into a bad
    row.
    """
    for row in rows:
        if isinstance(row, Chat) and not any(turn.is_supervised for turn in row.turns):
            rule = "a conversation must have an answer to train on: give one a weight of 1"
            error = NoSupervisedTokenException(rule, found="every weight is 0")
            error.origin = row.origin
            row = _as_bad_row(error)
        yield row


def _as_bad_row(error: ChatException) -> BadRow:
    return BadRow(error.origin, error.describe(), type(error).__name__)


def _choose_format(named: NamedRow, format: ChatFormat) -> ChatFormat:
    if named.has_messages:
        return "messages"
    return find_format(named.row) if format == "auto" else format


def _list_unread(named: NamedRow, format: ChatFormat, messages: Sequence[Message]) -> list[str]:
    is_in_parts = named.is_in_parts or format in FORMATS_IN_PARTS
    unread = list_unread_fields(named.row, READ_FIELDS[format], is_in_parts=is_in_parts)
    of_messages = (name for message in messages for name in message.unread)
    return list(dict.fromkeys([*named.unread, *unread, *of_messages]))


def _read_group(row: Row) -> str:
    """The group of the held-out split that a row names; empty if it names none."""
    group = row.get("split_group")
    if not is_filled(group):
        return ""
    if not isinstance(group, str | int):
        raise InvalidRowException(
            "split_group must be text or a whole number", found=f"found {name_type(group)}"
        )
    return str(group)


def _make_key(messages: Sequence[Message]) -> str:
    questions = [message.content for message in messages if message.role == "user"]
    return "\0".join(questions) or "\0".join(message.content for message in messages)


def _number_as_in_row(error: ChatException, *, num_system: int) -> None:
    """Numbers the message at fault as in its row, where the system prompt is another field."""
    if error.message is not None and num_system:
        error.message -= num_system
        if error.message < 0:
            error.message, error.found = None, "the system prompt"
