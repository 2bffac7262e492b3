"""The flags of the `data` verbs, and the conversations that they name, tokenized."""

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np

from mixtral_jax.cli.flags import FlagParser
from mixtral_jax.config import (
    ChatFormat,
    ConfigError,
    DataConfig,
    LiteralInst,
    local_path,
    parse_fields,
    require,
)
from mixtral_jax.data.chat.conversations import Chat, drop_unsupervised, read_chats
from mixtral_jax.data.chat.messages import Mode
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.readers import BadRow
from mixtral_jax.data.sources import describe_files, split_sources
from mixtral_jax.data.tokenized import Tokenized
from mixtral_jax.data.tokenizer import Tokenizer, read_tokenizer
from mixtral_jax.runs.console import note

_ROWS_AT_ONCE = 256
_NO_TOKENS = Tokenized(np.zeros(0, np.int32), np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class EncodedRow:
    """A conversation as ids, and where it was read.

    Attributes:
        chat: empty if there is no tokenizer.
        unread: what the row fills and nothing reads.
    """

    chat: Tokenized
    origin: str
    unread: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the flags name, row after row.

    `no_tokens`: why there is no tokenizer; empty if there is one.
    """

    rows: Iterator[EncodedRow | BadRow]
    tokenizer: Tokenizer | None
    no_tokens: str = ""


def make_rows_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of the flags that both verbs take."""
    parser = FlagParser(prog=f"mixtral-jax data {verb}", description=description)
    parser.add_argument(
        "file",
        metavar="CHATS",
        help="a file, folder, glob, hub:NAME: anything that data.path takes",
    )
    parser.add_argument(
        "--tokenizer", help="mixtral, mixtral-v3, a .model file, or a workdir that holds one"
    )
    parser.add_argument("--template", choices=["v1", "v3"], help="by default that of the tokenizer")
    parser.add_argument(
        "--mode", choices=get_args(Mode), default="training", help="who is to see the rows"
    )
    parser.add_argument(
        "--literal_inst",
        choices=get_args(LiteralInst),
        default="reject",
        help="what v1 does with [INST] in a text",
    )
    parser.add_argument(
        "--format", choices=get_args(ChatFormat), default="auto", help="by default that of each row"
    )
    parser.add_argument(
        "--fields", help="what fields of other names mean: question:user,answer:assistant"
    )
    return parser


def open_rows(
    flags: argparse.Namespace, *, only_supervised: bool, needs_tokens: bool = True, hint: str = ""
) -> Rows:
    """Opens the rows that the flags name.

    Args:
        only_supervised: whether a row without a token that is learned counts as bad.
        needs_tokens: False if rows may stay text where the default tokenizer is not installed.
        hint: what else the user may do where it is needed and not installed.

    Raises:
        ConfigError: no tokenizer, no such file, or a template that does not fit.
    """
    tokenizer, no_tokens = None, ""
    try:
        tokenizer = read_tokenizer(
            _name_tokenizer(flags),
            key="--tokenizer",
            alternative=f"give --tokenizer=DIR (a workdir or a .model file){hint}",
        )
    except ConfigError as error:
        if needs_tokens or flags.tokenizer:
            raise
        no_tokens = str(error)
    template = ChatTemplate(tokenizer, flags.template or "auto", literal_inst=flags.literal_inst)
    fields = parse_fields(flags.fields, flags.format, "--fields")
    for line in describe_files(DataConfig(path=flags.file)):
        note(in_flags(line))

    def read() -> Iterator[Chat | BadRow]:
        for source in split_sources(flags.file):
            rows = read_chats(source, template, format=flags.format, fields=fields, mode=flags.mode)
            yield from drop_unsupervised(rows) if only_supervised else rows

    return Rows(_encode(read(), template if tokenizer else None), tokenizer, no_tokens)


def leave_the_pipe() -> None:
    """What is still to be printed goes nowhere: whoever read it has ended, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _name_tokenizer(flags: argparse.Namespace) -> str:
    name = flags.tokenizer or ("mixtral-v3" if flags.template == "v3" else "mixtral")
    require(
        not name.startswith("train:"),
        f"--tokenizer={name}: a run trains it, and keeps it: name the run's workdir",
    )
    kept = local_path(name, "--tokenizer") / "tokenizer.model"
    return str(kept) if kept.is_file() else name


def in_flags(message: str) -> str:
    """A message with the arguments of these verbs in place of the settings of a run."""
    for setting in ("fields", "format", "literal_inst", "template"):
        message = message.replace(f"data.chat.{setting}", f"--{setting}")
    message = message.replace("data.suffixes", "the suffixes of a run's data")
    return message.replace("data.path", "CHATS")


def _encode(
    rows: Iterator[Chat | BadRow], template: ChatTemplate | None
) -> Iterator[EncodedRow | BadRow]:
    while group := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        chats = [row for row in group if isinstance(row, Chat)]
        encoded = itertools.repeat(_NO_TOKENS)
        if template is not None:
            encoded = iter(template.encode_turns([chat.turns for chat in chats]))
        for row in group:
            if isinstance(row, BadRow):
                yield dataclasses.replace(row, reason=in_flags(row.reason))
            else:
                yield EncodedRow(next(encoded), row.origin, row.unread)
