"""What a run reads: the section `data` of a config."""

import dataclasses
import re
from typing import Literal

from mixtral_jax.config.errors import require

TemplateName = Literal["auto", "v1", "v3"]
LiteralInst = Literal["reject", "keep", "strip"]
ChatFormat = Literal[
    "auto", "messages", "interactions", "conversations", "alpaca", "prompt_completion", "text"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How rows become conversations, and those become ids (docs/chat_data.md); instruct tuning
    reads it.

    `template="auto"` is v3 where the tokenizer has its control tokens, else v1. `literal_inst`:
    what v1 does with a text that contains its own `[INST]`. `format="auto"` looks at each row.
    `long_rows`: what becomes of a conversation longer than `train.sequence_length`: its end is cut
    off, it is left out, or the run ends.
    """

    template: TemplateName = "auto"
    literal_inst: LiteralInst = "reject"
    format: ChatFormat = "auto"
    long_rows: Literal["cut", "drop", "error"] = "cut"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on. `path` and `tokenizer` take the forms listed in docs/data.md.

    `suffixes`, as `.py,.md`, are those of the files that are read of a folder or glob; files whose
    suffix is that of no form of rows are one text each. None: `.txt` and all forms of rows.

    `domain_field` of a row says what kind of text it is, for `analyze`; None: the place of its file
    does.

    `held_out_fraction` of the documents is never trained on; a run ends when more than
    `max_bad_fraction` of the rows cannot be read.
    """

    path: str = "python-stdlib"
    tokenizer: str = "train:4096"
    text_field: str = "text"
    suffixes: str | None = None
    domain_field: str | None = None
    held_out_fraction: float = 0.02
    max_bad_fraction: float = 0.01
    chat: ChatConfig = ChatConfig()

    def __post_init__(self):
        require(
            self.path, "data.path must name a file, a folder, a glob, hub:NAME, or python-stdlib"
        )
        require(
            self.suffixes is None
            or all(re.fullmatch(r"\.\w+", suffix) for suffix in self.suffixes.split(",")),
            f"data.suffixes={self.suffixes} must be suffixes with their dots, as .py,.md",
        )
        require(
            0 < self.held_out_fraction < 1,
            f"data.held_out_fraction={self.held_out_fraction} must lie between 0 and 1",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            f"data.max_bad_fraction={self.max_bad_fraction} must lie between 0 and 1",
        )
