"""Rows as documents: whole texts to be trained on."""

import dataclasses
from collections.abc import Iterator, Mapping

from mixtral_jax.data.domains import UNSAID, Category
from mixtral_jax.data.readers import INVALID_UTF8, BadRow, RawRow
from mixtral_jax.data.sources import read_rows


@dataclasses.dataclass(frozen=True)
class Document:
    """One text to train on;

    `origin` is where it was read, such as `file.jsonl:17`; `category`: what it is.
    """

    text: str
    origin: str
    category: Category = UNSAID

    @property
    def key(self) -> str:
        """Documents of one key are on one side of the held-out split."""
        return self.text

    @property
    def num_characters(self) -> int:
        """How much there is to encode."""
        return len(self.text)


def read_documents(
    path: str, text_field: str, domain_field: str | None = None, suffixes: str | None = None
) -> Iterator[Document | BadRow]:
    """The documents of one source, always in the same order.

    Args:
        path: of a `Source`.
        text_field: the field, or column, that holds the text of a row.
        domain_field: the one that says what kind of text it is; None: the place of its file does
            (`domains`).
        suffixes: those of the files that are read, as in `DataConfig`.

    Raises:
        ConfigError: at once, when there is nothing to read; at a file that cannot be read.
    """
    rows = read_rows(path, [text_field, domain_field] if domain_field else [text_field], suffixes)
    return (
        row if isinstance(row, BadRow) else _judge(row, text_field, domain_field) for row in rows
    )


def _judge(row: RawRow, text_field: str, domain_field: str | None) -> Document | BadRow:
    """The document in a row, or what is wrong with it."""
    value, origin = row.value, row.origin
    if not isinstance(value, Mapping):
        reason = (
            f"a row must be an object with the field {text_field!r}, not {type(value).__name__}"
        )
        return BadRow(origin, reason, "no object")
    if text_field not in value:
        names = ", ".join(map(str, value)) or "none"
        reason = f"no field {text_field!r}; it has {names} (data.text_field names the field)"
        return BadRow(origin, reason, "no text field")
    text = value[text_field]
    if not isinstance(text, str):
        return BadRow(
            origin, f"field {text_field!r} must be text, not {type(text).__name__}", "no text"
        )
    if not text.strip():
        return BadRow(origin, "empty text", "empty text")
    try:
        text.encode()
    except (
        UnicodeEncodeError
    ) as error:  # Lone surrogates: \ud800 in JSON, or bytes a reader could not decode.
        return BadRow(origin, f"{INVALID_UTF8} at character {error.start}", INVALID_UTF8)
    if domain_field:
        return Document(
            text, origin, row.category._replace(domain=str(value.get(domain_field, "")))
        )
    return Document(text, origin, row.category)
