"""Conversations as two token stores with masks, train and held-out, tokenized once and cached.

`conversations` reads them, `template` tokenizes them, and `packing` cuts rows from the stores.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping

import numpy as np

from mixtral_jax.config import DataConfig, parse_fields, require
from mixtral_jax.data.cache import Tokenizing, default_cache_dir, open_or_write
from mixtral_jax.data.chat.conversations import Chat, drop_unsupervised, read_chats
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.corpus import Corpus, Placed
from mixtral_jax.data.fingerprint import fingerprint_data
from mixtral_jax.data.readers import BadRow
from mixtral_jax.data.sources import Source
from mixtral_jax.data.store import TokenStore
from mixtral_jax.data.tokenized import Tokenized
from mixtral_jax.data.tokenizer import Tokenizer

# Increase this when the same files and config would give different stores.
_CACHE_FORMAT = 6


@dataclasses.dataclass(frozen=True)
class PreparedChats:
    """The conversations of a run: two stores, and their template.

    Attributes:
        num_bad: the number of bad rows.
        num_shared: how many conversations of `data.held_out` have the key of one in `train`; of
            those that are drawn, none has.
        unread: fields that are filled and not read, and the number of rows that fill them.
    """

    train: TokenStore
    held_out: TokenStore
    template: ChatTemplate
    num_bad: int
    num_shared: int
    unread: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Question:
    """The start of a held-out conversation, and the answer to it, as ids [num_tokens].

    The answer is the first one with a weight; `prompt` is everything before it.
    """

    prompt: np.ndarray
    answer: np.ndarray


def prepare_chats(config: DataConfig, tokenizer: Tokenizer) -> PreparedChats:
    """Reads, checks, splits and tokenizes the conversations of a run, or opens the cache of an
    earlier run.

    The side of a conversation depends on its key (see `Corpus`).

    Raises:
        ConfigError: nothing to read, too many bad rows, or a template that does not fit the
            tokenizer.
    """
    chat = config.chat
    template = ChatTemplate(tokenizer, chat.template, literal_inst=chat.literal_inst)
    fields = parse_fields(chat.fields, chat.format)

    def read(source: Source) -> Iterator[Chat | BadRow]:
        return drop_unsupervised(
            read_chats(
                source, template, format=chat.format, fields=fields, suffixes=config.suffixes
            )
        )

    def encode(chats: list[Chat]) -> list[Tokenized]:
        return template.encode_turns([chat.turns for chat in chats])

    def items() -> Iterator[Placed[Chat]]:
        require(
            not corpus.is_single,
            f"data.path={config.path}: all conversations ask the same, so none can be held out: "
            "add conversations with other questions",
        )
        return corpus.items()

    corpus = Corpus(config, read)
    key = _fingerprint_chats(config, template, tokenizer)
    tokenizing = Tokenizing(items, lambda: corpus.count, encode, tokenizer.vocab_size)
    cached = open_or_write(default_cache_dir() / f"{key}-chats", tokenizing, config)
    count = cached.count
    return PreparedChats(
        cached.train, cached.held_out, template, count.num_bad, count.num_shared, count.unread
    )


def pick_questions(store: TokenStore, count: int) -> list[Question]:
    """Picks at most `count` questions, spread evenly over the conversations of a store."""
    num_picked = min(count, store.num_documents)
    documents = (
        store.read(number * store.num_documents // num_picked) for number in range(num_picked)
    )
    return [_cut_question(document) for document in documents]


def _cut_question(document: Tokenized) -> Question:
    loss_mask = document.require_mask()
    first = int(np.argmax(loss_mask))
    last = first + int(np.argmin(np.append(loss_mask[first:], 0)))
    return Question(np.array(document.tokens[:first]), np.array(document.tokens[first:last]))


def _fingerprint_chats(config: DataConfig, template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """Hashes all settings and files that change the tokens.

    The limit on bad rows and the treatment of long rows do not.
    """
    settings = [
        config.held_out_fraction if config.held_out is None else None,
        config.chat.format,
        config.chat.fields,
        config.chat.literal_inst,
        template.version,
    ]
    described = [
        _CACHE_FORMAT,
        *settings,
        tokenizer.fingerprint,
        fingerprint_data(config),
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]
