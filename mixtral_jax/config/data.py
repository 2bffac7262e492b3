"""The section `data` of a config: what a run reads."""

import dataclasses
import re
from typing import Literal, get_args

from mixtral_jax.config.errors import ConfigError, require

TemplateName = Literal["auto", "v1", "v3"]
LiteralInst = Literal["reject", "keep", "strip"]
ChatFormat = Literal[
    "auto", "messages", "interactions", "conversations", "alpaca", "prompt_completion", "text"
]
# What a field of a row can be named as: the message of a role, all messages, or nothing.
FieldMeaning = Literal["system", "user", "assistant", "messages", "ignore"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How instruct tuning reads conversations and tokenizes them (docs/chat_data.md).

    Attributes:
        template: `auto` is v3 if the tokenizer has its control tokens, else v1.
        literal_inst: what v1 does with a text that contains `[INST]` or `[/INST]`: reject the
            conversation, keep the text, or strip these words from it.
        format: the format of all rows; `auto` finds it row by row.
        fields: what fields of a row mean that bear other names than those of a format, such as
            `question:user,answer:assistant`, and which to ignore, as in `label:ignore`.
        long_rows: what happens to a conversation longer than `train.sequence_length`: `cut` keeps
            its beginning, `drop` leaves it out, `error` ends the run.
    """

    template: TemplateName = "auto"
    literal_inst: LiteralInst = "reject"
    format: ChatFormat = "auto"
    fields: str | None = None
    long_rows: Literal["cut", "drop", "error"] = "cut"

    def __post_init__(self):
        parse_fields(self.fields, self.format)


def parse_fields(
    fields: str | None, format: ChatFormat, key: str = "data.chat.fields"
) -> dict[str, FieldMeaning]:
    """Splits a value of `ChatConfig.fields` into the meaning of each field, in order.

    Args:
        key: the key or flag that holds the value, for the message of an error.

    Raises:
        ConfigError: a part is no NAME:MEANING, a name appears twice, or the meanings do not fit
            each other or the format.
    """
    meanings: dict[str, FieldMeaning] = {}
    for part in fields.split(",") if fields else ():
        name, _, meaning = (piece.strip() for piece in part.rpartition(":"))
        known = next((known for known in get_args(FieldMeaning) if meaning == known), None)
        if not name or known is None:
            raise ConfigError(
                f"{key}: {part!r} must be NAME:MEANING, such as question:user; MEANING is one of "
                f"{', '.join(get_args(FieldMeaning))}"
            )
        require(name not in meanings, f"{key}={fields} names {name} twice: name it once")
        meanings[name] = known
    read = [meaning for meaning in meanings.values() if meaning != "ignore"]
    require(
        "messages" not in read or len(read) == 1,
        f"{key}={fields}: a field that holds all messages cannot stand beside another that is read",
    )
    require(
        not read or format in ("auto", "messages"),
        f"{key}={fields} makes messages of fields, so the format must be auto or messages, not "
        f"{format}",
    )
    return meanings


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on.

    Attributes:
        path: files, datasets or several weighted sources, in the forms listed in docs/data.md.
        tokenizer: a `.model` file, `mixtral`, `mixtral-v3`, or `train:N` (docs/data.md).
        text_field: the field or column of a row that holds its text.
        suffixes: which files of a folder or glob to read, such as `.py,.md`. A file whose suffix
            names no format of rows is one document. None: `.txt` and all formats of rows.
        domain_field: the field of a row that names its domain, for `analyze`; None: the folder of
            its file does.
        held_out: data to evaluate on, in the forms of `path`, or the name of a split that the data
            sets of `path` have, such as `validation`. None: documents drawn from `path`, which are
            then never trained on.
        held_out_fraction: the fraction of documents that is drawn, without `held_out`.
        max_bad_fraction: the run ends if more than this fraction of the rows is bad.
    """

    path: str = "python-stdlib"
    tokenizer: str = "train:4096"
    text_field: str = "text"
    suffixes: str | None = None
    domain_field: str | None = None
    held_out: str | None = None
    held_out_fraction: float = 0.02
    max_bad_fraction: float = 0.01
    chat: ChatConfig = ChatConfig()

    def __post_init__(self):
        require(
            self.path,
            "data.path is empty: name a file, a folder, a glob, hub:NAME, or python-stdlib",
        )
        require(
            self.held_out != "",
            "data.held_out is empty: name a path or a split, or leave it out",
        )
        require(
            self.suffixes is None
            or all(re.fullmatch(r"\.\w+", suffix) for suffix in self.suffixes.split(",")),
            f"data.suffixes={self.suffixes} must be suffixes with their dots, such as .py,.md",
        )
        require(
            0 < self.held_out_fraction < 1,
            f"data.held_out_fraction={self.held_out_fraction} must be between 0 and 1",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            f"data.max_bad_fraction={self.max_bad_fraction} must be between 0 and 1",
        )
