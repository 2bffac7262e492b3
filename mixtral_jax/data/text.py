"""Documents as two token stores, train and held-out, tokenised once and cached on disk.

How rows are cut from the stores is for `packing`; how the documents are read, for `documents`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mixtral_jax.config import DataConfig, require
from mixtral_jax.data.cache import Tokenizing, default_cache_dir, open_or_write
from mixtral_jax.data.corpus import Corpus, Placed
from mixtral_jax.data.documents import Document, read_documents
from mixtral_jax.data.sources import fingerprint_source
from mixtral_jax.data.store import Tokenized, TokenStore
from mixtral_jax.data.tokenizer import (
    Tokenizer,
    check_planned_vocabulary,
    check_vocabulary,
    load_tokenizer,
)

_CACHE_FORMAT = 5  # Raise it when the same files and config would give other stores.


@dataclasses.dataclass(frozen=True)
class PreparedText:
    """What a run reads: two stores without a common document, their tokenizer, the number of bad
    rows.
    """

    train: TokenStore
    held_out: TokenStore
    tokenizer: Tokenizer
    num_bad: int


def prepare_text(
    config: DataConfig,
    vocab_size: int,
    tokenizer_path: Path,
    cache_dir: Path | None = None,
    *,
    is_writer: bool = True,
) -> PreparedText:
    """Reads, splits and tokenises the text of a run, or opens the cache of an earlier one.

    The side of a document follows from its text, as `Corpus` says, so that copies lie on one side.
    Where all documents are copies of one, there is but that one, and its tail is held out, from the
    start of a line.

    Args:
        vocab_size: of the model; the tokenizer must fit in it.
        tokenizer_path: where the run keeps its tokenizer.
        cache_dir: by default `default_cache_dir()`.
        is_writer: whether to write `tokenizer_path`; one process of a run does, each may write its
            cache.

    Raises:
        ConfigError: nothing to read, too many bad rows, or no fitting tokenizer.
    """
    cache_dir = cache_dir or default_cache_dir()
    check_planned_vocabulary(config.tokenizer, vocab_size)
    key = _fingerprint_data(config)
    corpus = _open_corpus(config)
    saved = tokenizer_path
    if config.tokenizer.startswith("train:") and not saved.exists():
        saved = cache_dir / f"{key}.model"  # Runs on the same text share the training.
    may_save = is_writer or saved != tokenizer_path
    tokenizer = load_tokenizer(
        config.tokenizer, lambda: _train_texts(config, corpus), saved, may_save=may_save
    )
    check_vocabulary(tokenizer, vocab_size)
    prepared = _tokenize(
        config, corpus, tokenizer, cache_dir / f"{key}-{tokenizer.fingerprint[:16]}"
    )
    if is_writer and saved != tokenizer_path:
        tokenizer.save(tokenizer_path)
    return prepared


def tokenize_text(
    config: DataConfig, tokenizer: Tokenizer, cache_dir: Path | None = None
) -> PreparedText:
    """`prepare_text` with a tokenizer that there is already; `config.tokenizer` may say anything.

    Raises:
        ConfigError: nothing to read, or too many bad rows.
    """
    cache_dir = cache_dir or default_cache_dir()
    corpus = _open_corpus(config)
    return _tokenize(
        config,
        corpus,
        tokenizer,
        cache_dir / f"{_fingerprint_data(config)}-{tokenizer.fingerprint[:16]}",
    )


def _tokenize(
    config: DataConfig, corpus: Corpus[Document], tokenizer: Tokenizer, folder: Path
) -> PreparedText:
    tokenizing = Tokenizing(
        items=lambda: _split(config, corpus),
        count=lambda: corpus.count,
        encode=lambda documents: _encode(tokenizer, documents),
        vocab_size=tokenizer.vocab_size,
    )
    cached = open_or_write(folder, tokenizing, config)
    return PreparedText(cached.train, cached.held_out, tokenizer, cached.count.num_bad)


def _open_corpus(config: DataConfig) -> Corpus[Document]:
    fields = (config.text_field, config.domain_field)
    return Corpus(config, lambda source: read_documents(source.path, *fields, config.suffixes))


def _split(config: DataConfig, corpus: Corpus[Document]) -> Iterator[Placed[Document]]:
    if not corpus.is_single:
        yield from corpus.items()
        return
    document = next(corpus.items()).item
    text = document.text
    require(len(text) > 1, f"data.path={config.path} holds a single character: give more text")
    wanted = round(len(text) * (1 - config.held_out_fraction))
    wanted = min(max(wanted, 1), len(text) - 1)
    cut = text.rfind("\n", 0, wanted) + 1 or wanted
    yield Placed(dataclasses.replace(document, text=text[:cut]), 0, is_held_out=False)
    yield Placed(dataclasses.replace(document, text=text[cut:]), 0, is_held_out=True)


def _train_texts(config: DataConfig, corpus: Corpus[Document]) -> Iterator[str]:
    return (placed.item.text for placed in _split(config, corpus) if not placed.is_held_out)


def _encode(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[Tokenized]:
    for ids in tokenizer.encode_all([document.text for document in documents]):
        yield Tokenized(np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]))


def _fingerprint_data(config: DataConfig) -> str:
    """Of what changes the tokens, and nothing else: the limit on bad rows does not."""
    chosen = [
        config.path,
        config.text_field,
        config.domain_field,
        config.held_out_fraction,
        config.tokenizer,
    ]
    described = [_CACHE_FORMAT, *chosen, fingerprint_source(config.path, config.suffixes)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
