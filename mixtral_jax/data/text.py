"""Documents as two token stores, train and held-out, tokenized once and cached on disk.

`documents` reads the documents; `packing` cuts rows from the stores.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mixtral_jax.config import DataConfig, require
from mixtral_jax.data.cache import Tokenizing, default_cache_dir, open_or_write
from mixtral_jax.data.corpus import Corpus, Placed
from mixtral_jax.data.documents import Document, read_documents
from mixtral_jax.data.fingerprint import fingerprint_data
from mixtral_jax.data.store import TokenStore
from mixtral_jax.data.tokenized import Tokenized
from mixtral_jax.data.tokenizer import (
    Tokenizer,
    check_planned_vocabulary,
    check_vocabulary,
    load_tokenizer,
)

# Increase this when the same files and config would give different stores.
_CACHE_FORMAT = 8


@dataclasses.dataclass(frozen=True)
class PreparedText:
    """The text of a run: two stores, and their tokenizer.

    Attributes:
        num_shared: how many documents of `data.held_out` are in both; of those drawn from
            `data.path`, none is.
        unread: fields that are filled and not read, and the number of rows that fill them.
    """

    train: TokenStore
    held_out: TokenStore
    tokenizer: Tokenizer
    num_shared: int
    unread: Mapping[str, int]


def prepare_text(
    config: DataConfig,
    vocab_size: int,
    tokenizer_path: Path,
    *,
    is_writer: bool = True,
) -> PreparedText:
    """Reads, splits and tokenizes the text of a run, or opens the cache of an earlier run.

    The side of a document depends on its text (see `Corpus`), so copies are on the same side. If
    all documents are copies of one, that one is split: its tail, from the start of a line, is held
    out.

    Args:
        vocab_size: the model's; the tokenizer may not have more pieces.
        tokenizer_path: where the run keeps its tokenizer.
        is_writer: whether to write `tokenizer_path`, as one process of a run does. Every process
            may write its cache.

    Raises:
        ConfigError: nothing to read, too many bad rows, or no suitable tokenizer.
    """
    cache_dir = default_cache_dir()
    check_planned_vocabulary(config.tokenizer, vocab_size)
    key = _fingerprint_data(config)
    corpus = _open_corpus(config)
    saved = tokenizer_path
    if config.tokenizer.startswith("train:") and not saved.exists():
        saved = cache_dir / f"{key}.model"  # Runs on the same text share the trained tokenizer.
    may_save = is_writer or saved != tokenizer_path
    tokenizer = load_tokenizer(
        config.tokenizer, lambda: _train_texts(config, corpus), saved, may_save=may_save
    )
    check_vocabulary(tokenizer, vocab_size, is_planned=True)
    prepared = _tokenize(
        config, corpus, tokenizer, cache_dir / f"{key}-{tokenizer.fingerprint[:16]}"
    )
    if is_writer and saved != tokenizer_path:
        tokenizer.save(tokenizer_path)
    return prepared


def tokenize_text(config: DataConfig, tokenizer: Tokenizer) -> PreparedText:
    """Does what `prepare_text` does, with a given tokenizer instead of `config.tokenizer`.

    Raises:
        ConfigError: nothing to read, or too many bad rows.
    """
    name = f"{_fingerprint_data(config)}-{tokenizer.fingerprint[:16]}"
    return _tokenize(config, _open_corpus(config), tokenizer, default_cache_dir() / name)


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
    count = cached.count
    return PreparedText(cached.train, cached.held_out, tokenizer, count.num_shared, count.unread)


def _open_corpus(config: DataConfig) -> Corpus[Document]:
    fields = (config.text_field, config.domain_field)
    return Corpus(config, lambda source: read_documents(source, *fields, config.suffixes))


def _split(config: DataConfig, corpus: Corpus[Document]) -> Iterator[Placed[Document]]:
    if not corpus.is_single:
        yield from corpus.items()
        return
    document = next(corpus.items()).item
    require(
        document.ids is None,
        f"data.path={config.path} holds one document of token ids: add others, to hold one out",
    )
    text = document.text
    require(len(text) > 1, f"data.path={config.path} holds a single character: add more text")
    wanted = round(len(text) * (1 - config.held_out_fraction))
    wanted = min(max(wanted, 1), len(text) - 1)
    cut = text.rfind("\n", 0, wanted) + 1 or wanted
    yield Placed(dataclasses.replace(document, text=text[:cut]), 0, is_held_out=False)
    yield Placed(dataclasses.replace(document, text=text[cut:]), 0, is_held_out=True)


def _train_texts(config: DataConfig, corpus: Corpus[Document]) -> Iterator[str]:
    for placed in _split(config, corpus):
        require(
            placed.item.ids is None,
            f"{placed.item.origin} holds token ids: set data.tokenizer to the tokenizer that made "
            "them",
        )
        if not placed.is_held_out:
            yield placed.item.text


def _encode(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[Tokenized]:
    encoded = iter(
        tokenizer.encode_all([document.text for document in documents if document.ids is None])
    )
    for document in documents:
        if document.ids is not None:
            tokens = _mark_ends(tokenizer, document)
            of_pieces = None if tokenizer.spells_text else tokenizer.bytes_per_token[tokens]
            yield Tokenized(tokens, text_bytes=of_pieces)
        else:
            ids = next(encoded)
            tokens = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]])
            text_bytes = None
            if not tokenizer.spells_text:
                text_bytes = np.pad(tokenizer.count_text_bytes(document.text, ids), 1)
            yield Tokenized(tokens, text_bytes=text_bytes)


def _mark_ends(tokenizer: Tokenizer, document: Document) -> np.ndarray:
    """The token ids of a row, with BOS and EOS where they lack them."""
    ids = list(document.ids or ())
    require(
        max(ids) < tokenizer.vocab_size,
        f"{document.origin}: token id {max(ids)} is not below the {tokenizer.vocab_size} pieces of "
        "the tokenizer: set data.tokenizer to the tokenizer that made it",
    )
    bos = [tokenizer.bos_id] if ids[0] != tokenizer.bos_id else []
    eos = [tokenizer.eos_id] if ids[-1] != tokenizer.eos_id else []
    return np.array([*bos, *ids, *eos])


def _fingerprint_data(config: DataConfig) -> str:
    """Hashes all settings and files that change the tokens; the limit on bad rows does not."""
    settings = [
        config.text_field,
        config.domain_field,
        config.held_out_fraction if config.held_out is None else None,
        config.tokenizer,
    ]
    described = [_CACHE_FORMAT, *settings, fingerprint_data(config)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
