"""Conversations as two token stores with masks, train and held-out, tokenised once and cached on
disk.

How rows are cut from the stores is for `packing`; how conversations are read, for `conversations`;
what they become, for `chat`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mixtral_jax.config import DataConfig, require
from mixtral_jax.data.cache import Tokenizing, default_cache_dir, open_or_write
from mixtral_jax.data.chat.conversations import Chat, drop_unsupervised, read_chats
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.corpus import Corpus, Placed
from mixtral_jax.data.readers import BadRow
from mixtral_jax.data.sources import Source, fingerprint_source
from mixtral_jax.data.store import Tokenized, TokenStore
from mixtral_jax.data.tokenizer import Tokenizer

_CACHE_FORMAT = 3  # Raise it when the same files and config would give other stores.


@dataclasses.dataclass(frozen=True)
class PreparedChats:
    """What a run reads: two stores of which no conversations share a key, their template, the
    number of bad rows.
    """

    train: TokenStore
    held_out: TokenStore
    template: ChatTemplate
    num_bad: int


@dataclasses.dataclass(frozen=True)
class Question:
    """A held-out conversation up to its first answer to be learnt, and that answer, as ids:
    [num_tokens] each.
    """

    prompt: np.ndarray
    answer: np.ndarray


def prepare_chats(
    config: DataConfig, tokenizer: Tokenizer, cache_dir: Path | None = None
) -> PreparedChats:
    """Reads, checks, splits and tokenises the conversations of a run, or opens the cache of an
    earlier one.

    The side of a conversation follows from its key, as `Corpus` says.

    Raises:
        ConfigError: nothing to read, too many bad rows, or a template that does not fit the
            tokenizer.
    """
    cache_dir = cache_dir or default_cache_dir()
    template = ChatTemplate(tokenizer, config.chat.template, literal_inst=config.chat.literal_inst)

    def read(source: Source) -> Iterator[Chat | BadRow]:
        return drop_unsupervised(
            read_chats(source.path, template, format=config.chat.format, suffixes=config.suffixes)
        )

    def encode(chats: list[Chat]) -> list[Tokenized]:
        encoded = template.encode_turns([chat.turns for chat in chats])
        return [Tokenized(chat.tokens, chat.loss_mask) for chat in encoded]

    def items() -> Iterator[Placed[Chat]]:
        only = f"data.path={config.path}: all conversations ask the same, so none can be held out: add others"
        require(not corpus.is_single, only)
        return corpus.items()

    corpus = Corpus(config, read)
    key = _fingerprint_chats(config, template, tokenizer)
    tokenizing = Tokenizing(items, lambda: corpus.count, encode, tokenizer.vocab_size)
    cached = open_or_write(cache_dir / f"{key}-chats", tokenizing, config)
    return PreparedChats(cached.train, cached.held_out, template, cached.count.num_bad)


def pick_questions(store: TokenStore, count: int) -> list[Question]:
    """At most `count` questions, spread evenly over the conversations of a store."""
    num_picked = min(count, store.num_documents)
    documents = (
        store.read(number * store.num_documents // num_picked) for number in range(num_picked)
    )
    return [_cut_question(document) for document in documents]


def _cut_question(document: Tokenized) -> Question:
    assert document.loss_mask is not None
    first = int(np.argmax(document.loss_mask))
    last = first + int(np.argmin(np.append(document.loss_mask[first:], 0)))
    return Question(np.array(document.tokens[:first]), np.array(document.tokens[first:last]))


def _fingerprint_chats(config: DataConfig, template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """Of what changes the tokens, and nothing else: neither the limit on bad rows nor what long
    rows become does.
    """
    chosen = [
        config.path,
        config.held_out_fraction,
        config.chat.format,
        config.chat.literal_inst,
        template.version,
    ]
    described = [
        _CACHE_FORMAT,
        *chosen,
        tokenizer.fingerprint,
        fingerprint_source(config.path, config.suffixes),
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]
