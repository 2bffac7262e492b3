"""The fields of a row: named by the user, refused by name, or listed because no format reads them.

`formats` knows which fields each format reads, `refused` those that nothing here can express.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from mixtral_jax.config import FieldMeaning
from mixtral_jax.data.chat.errors import InvalidRowException, TokenizerException
from mixtral_jax.data.chat.refused import (
    QUESTION_RULES,
    ROW_RULES,
    find_refused,
)
from mixtral_jax.data.field_names import is_filled, list_unread
from mixtral_jax.data.marks import find_hidden_mark, read_marks

Row = Mapping[Any, Any]

_NOT_LEARNT = "a row is marked as not to be learnt"


@dataclasses.dataclass(frozen=True)
class NamedRow:
    """A row whose fields bear the names of a format.

    Attributes:
        has_messages: whether the user has named the fields that its messages are in.
        is_in_parts: whether each of these fields is one message.
        unread: filled fields that the user ignores, or that the named ones take the place of.
    """

    row: Row
    has_messages: bool = False
    is_in_parts: bool = False
    unread: tuple[str, ...] = ()


def name_fields(row: Row, meanings: Mapping[str, FieldMeaning]) -> NamedRow:
    """Gives the fields of a row the meanings that the user says they have.

    Fields that are messages become the field `messages`, in the order of `meanings`; a null is no
    message.

    Raises:
        ChatException: no field for the messages, or for one of their roles, is there.
    """
    rest = {name: value for name, value in row.items() if name not in meanings}
    unread = [name for name in meanings if meanings[name] == "ignore" and is_filled(row.get(name))]
    wanted = {name: meaning for name, meaning in meanings.items() if meaning != "ignore"}
    if not wanted:
        return NamedRow(rest, unread=tuple(unread))
    found = {name: row[name] for name in wanted if row.get(name) is not None}
    for meaning in wanted.values():
        if meaning != "system" and meaning not in map(wanted.get, found):
            raise InvalidRowException(
                f"no field that data.chat.fields names as {meaning} is filled",
                found=f"it has {', '.join(map(str, row)) or 'none'}",
            )
    if is_filled(rest.get("messages")):
        unread.append("messages")
    is_in_parts = "messages" not in wanted.values()
    messages = [{"role": wanted[name], "content": value} for name, value in found.items()]
    if not is_in_parts:
        (messages,) = found.values()
    return NamedRow(rest | {"messages": messages}, True, is_in_parts, tuple(unread))


def refuse_fields(row: Row, *, is_text: bool) -> None:
    """Makes sure that no field changes the meaning of a row in a way that no format can express.

    Args:
        is_text: whether the row is a plain text, which a label may belong to.

    Raises:
        ChatException: names the first such field.
    """
    if refused := find_refused(row, ROW_RULES, allows_classes=is_text):
        kind = TokenizerException if refused.is_of_tools else InvalidRowException
        raise kind(_leave_out(refused.rule, refused.name), found=f"found {refused.name}")
    for name, said in read_marks(row).items():
        if said is not True:
            rule = _NOT_LEARNT
            if said is None:
                rule = "a row is learnt whole or not at all, by a mark that is true or 1"
            raise InvalidRowException(_leave_out(rule, name), found=f"{name}={row[name]!r}")
    if mark := find_hidden_mark(row):
        name = mark.partition(".")[0]
        raise InvalidRowException(_leave_out(_NOT_LEARNT, name), found=mark)


def list_unread_fields(row: Row, read: Collection[str], *, is_in_parts: bool) -> list[str]:
    """Lists the filled fields that are not in `read`.

    Args:
        is_in_parts: whether the question is a field of the row, so that others may belong to it.

    Raises:
        ChatException: one of them may.
    """
    if is_in_parts and (refused := find_refused(row, QUESTION_RULES, read)):
        name = refused.name
        rule = (
            f"{refused.rule}: name all parts with data.chat.fields, such as "
            f"question:user,{name}:user,answer:assistant, or set it to {name}:ignore"
        )
        raise InvalidRowException(rule, found=f"found {name}")
    return list_unread(row, {*read, *read_marks(row)})


def _leave_out(rule: str, name: str) -> str:
    return f"{rule}: leave such rows out, or set data.chat.fields={name}:ignore"
