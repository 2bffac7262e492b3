"""Documents: rows that hold one text each, or its token ids, to be trained on whole."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixtral_jax.data.domains import UNKNOWN, Category
from mixtral_jax.data.field_names import is_filled, list_unread
from mixtral_jax.data.marks import (
    MARKS,
    METADATA,
    TOKEN_MARKS,
    any_not_learnt,
    forbids_learning,
    read_marks,
    read_token_marks,
    show_mark,
)
from mixtral_jax.data.readers import (
    INVALID_UTF8,
    BadRow,
    RawRow,
    describe_invalid_utf8,
    name_type,
)
from mixtral_jax.data.sources import Source, read_rows

# Further fields that say which tokens are learnt, beside token ids.
_MASK_OF_IDS, _LABELS = "attention_mask", "labels"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text to train on.

    Attributes:
        text: empty if the row holds token ids.
        origin: where it was read, such as `file.jsonl:17`.
        category: the kind of text, judged by its row or its file (`domains`).
        ids: token ids in place of a text; None if there is a text.
        unread: what the row fills and nothing reads, such as `id`.
    """

    text: str
    origin: str
    category: Category = UNKNOWN
    ids: tuple[int, ...] | None = None
    unread: Sequence[str] = ()

    @property
    def key(self) -> str:
        """Documents with equal keys are on the same side of the held-out split."""
        return self.text if self.ids is None else str(self.ids)

    @property
    def num_characters(self) -> int:
        """Number of characters to encode."""
        return len(self.text if self.ids is None else self.ids)


def read_documents(
    source: Source | str,
    text_field: str,
    domain_field: str | None = None,
    suffixes: str | None = None,
) -> Iterator[Document | BadRow]:
    """Reads the documents of one source, always in the same order.

    Args:
        source: or the path of one.
        text_field: the field or column that holds the text of a row, or a list of token ids.
        domain_field: the field that names the domain of a text; None: the folder of its file does
            (`domains`).
        suffixes: which files to read, as in `DataConfig`.

    Raises:
        ConfigError: there is nothing to read (raised at once), or a file cannot be read (raised
            when its turn comes).
    """
    named = [text_field, domain_field] if domain_field else [text_field]
    marks = (*MARKS, *TOKEN_MARKS, *METADATA, _MASK_OF_IDS, _LABELS)
    rows = read_rows(source, list(dict.fromkeys([*named, *marks])), suffixes)
    return (
        row if isinstance(row, BadRow) else _read_row(row, text_field, domain_field) for row in rows
    )


def _read_row(row: RawRow, text_field: str, domain_field: str | None) -> Document | BadRow:
    value, origin = row.value, row.origin
    if not isinstance(value, Mapping):
        reason = f"a row must be an object with the field {text_field!r}, not {name_type(value)}"
        return BadRow(origin, reason, "no object")
    if text_field not in value:
        names = ", ".join(map(str, value)) or "none"
        reason = f"no field {text_field!r}: set data.text_field to a field of the row ({names})"
        return BadRow(origin, reason, "no text field")
    category = row.category
    if domain_field:
        domain = value.get(domain_field)
        category = category._replace(domain="" if domain is None else str(domain))
    text = value[text_field]
    others = {name: value[name] for name in value if name not in (text_field, domain_field)}
    if mark := forbids_learning(others) or _find_mask_of_ids(others, text):
        reason = f"{mark} says that not all of the text is to be learnt"
        return BadRow(origin, f"{reason}: leave the row out, or that field", "not to be learnt")
    if isinstance(text, list):
        return _read_ids(text, origin, category, _list_unread(others, of_ids=True))
    if not isinstance(text, str):
        reason = f"field {text_field!r} must be text, not {name_type(text)}"
        return BadRow(origin, f"{reason}: mend the row, or leave it out", "no text")
    if not text.strip():
        return BadRow(origin, "empty text: leave the row out", "empty text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # A lone surrogate: \ud800 in JSON, or a byte that a reader could not decode.
        reason = describe_invalid_utf8(f"character {error.start}")
        return BadRow(origin, reason, INVALID_UTF8)
    return Document(text, origin, category, unread=_list_unread(others, of_ids=False))


def _list_unread(others: Mapping[Any, Any], *, of_ids: bool) -> tuple[str, ...]:
    """The filled fields beside a text, or beside token ids, that say nothing of what is learnt."""
    marks = [name for name, said in read_marks(others).items() if said is not None]
    read = {*marks, *read_token_marks(others), *((_MASK_OF_IDS, _LABELS) if of_ids else ())}
    return tuple(list_unread(others, read))


def _find_mask_of_ids(row: Mapping[Any, Any], ids: Any) -> str | None:
    """What says that some token ids are padding, or not to be learnt; None if nothing does."""
    if not isinstance(ids, list):
        return None
    if any_not_learnt(row.get(_MASK_OF_IDS)):
        return show_mark(_MASK_OF_IDS, row[_MASK_OF_IDS])
    labels = row.get(_LABELS)
    return show_mark(_LABELS, labels) if is_filled(labels) and labels != ids else None


def _read_ids(
    ids: list[Any], origin: str, category: Category, unread: tuple[str, ...]
) -> Document | BadRow:
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            reason = f"a list must hold token ids, whole numbers from 0: found {token!r:.40}"
            return BadRow(origin, f"{reason}: mend the row, or leave it out", "no token id")
    if not ids:
        return BadRow(origin, "no token ids: leave the row out", "empty text")
    return Document("", origin, category, tuple(ids), unread)
