"""Data that a program gives in place of `data.path`: texts, token ids or conversations in memory.

Texts and conversations become a file in the workdir that the config then names, so that they go
the way of all other data, and resume, evaluation and analysis find them again. Files are named
after their content.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.config import Config, ConfigError, DataConfig, require
from mixtral_jax.data.cache import Tokenizing, open_or_write
from mixtral_jax.data.corpus import Corpus
from mixtral_jax.data.domains import UNKNOWN, Category
from mixtral_jax.data.text import PreparedText
from mixtral_jax.data.tokenized import Tokenized
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.text_data import TrainingData, find_tokenizer, open_text, pack_text
from mixtral_jax.whole_files import write_whole

Text = str
TokenIds = Sequence[int] | np.ndarray
Message = Mapping[str, Any]
Conversation = Sequence[Message] | Mapping[str, Any]
OpenData = Callable[..., TrainingData]


@dataclasses.dataclass(frozen=True)
class OwnData:
    """A config whose `data.path` names the data that were given, and what reads them."""

    config: Config
    open_data: OpenData


def keep_texts(data: Iterable[Text] | Iterable[TokenIds], config: Config, workdir: Path) -> OwnData:
    """Keeps texts or token ids in the workdir, one document each, for a run of pretraining.

    Token ids need the tokenizer that made them as `data.tokenizer`. BOS and EOS are added to a
    document that lacks them.

    Raises:
        ConfigError: there is no document, or one is neither text nor ids within the vocabulary.
    """
    documents = iter(data)
    first = next(documents, None)
    require(first is not None, "data holds no document: give texts, or arrays of token ids")
    documents = itertools.chain([first], documents)
    if isinstance(first, str):
        rows = ({config.data.text_field: _check_text(text)} for text in documents)
        path = _write_rows(rows, workdir, "texts")
        return OwnData(_name_data(config, path), open_text)
    arrays = [_check_ids(ids, config.model.vocab_size) for ids in documents]
    digest = hashlib.sha256()
    for ids in arrays:
        digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
    path = workdir / "data" / f"tokens-{digest.hexdigest()[:16]}"
    return OwnData(_name_data(config, path), functools.partial(_open_tokens, arrays))


def keep_conversations(data: Iterable[Conversation], config: Config, workdir: Path) -> Config:
    """Keeps conversations in the workdir; the config then names them.

    A conversation is a list of messages, or a row of any chat format that data.path takes.

    Raises:
        ConfigError: there is no conversation.
    """
    rows = (
        dict(each) if isinstance(each, Mapping) else {"messages": [dict(turn) for turn in each]}
        for each in data
    )
    return _name_data(config, _write_rows(rows, workdir, "conversations"))


def _name_data(config: Config, path: Path) -> Config:
    data = dataclasses.replace(config.data, path=str(path), suffixes=None)
    return dataclasses.replace(config, data=data)


def _write_rows(rows: Iterable[dict[str, Any]], workdir: Path, name: str) -> Path:
    """Writes rows as JSON lines; a file of the same rows stays, since caches go by its time."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    require(content, f"data holds no {name}: give at least two, to train on one and hold one out")
    encoded = content.encode("utf-8", errors="surrogatepass")
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    path = workdir / "data" / f"{name}-{digest}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, encoded)
    return path


def _check_text(text: Any) -> str:
    require(
        isinstance(text, str), f"data must be all texts, or all token ids: {text!r:.80} is no text"
    )
    return text


def _check_ids(ids: Any, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids)
    is_valid = array.ndim == 1 and array.size and np.issubdtype(array.dtype, np.integer)
    if not is_valid or array.min() < 0 or array.max() >= vocab_size:
        raise ConfigError(
            f"data: {ids!r:.80} must be a text, or a list of token ids within "
            f"model.vocab_size={vocab_size}"
        )
    return array.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class _IdDocument:
    """A document as the ids that a program gave, for a `Corpus`."""

    ids: np.ndarray

    @property
    def key(self) -> str:
        return hashlib.sha256(self.ids.tobytes()).hexdigest()

    @property
    def num_characters(self) -> int:
        return len(self.ids)

    @property
    def category(self) -> Category:
        return UNKNOWN


def _open_tokens(
    arrays: list[np.ndarray], run: Run, tokenizer: Tokenizer | None = None
) -> TrainingData:
    start = time.monotonic()
    config, kept = run.config, run.workdir / "tokenizer.model"
    tokenizer = find_tokenizer(tokenizer, config.data, config.model.vocab_size)
    if run.is_writer:
        tokenizer.save(kept)
    text = _prepare_tokens(arrays, config.data, tokenizer)
    return pack_text(run, text, start)


def _prepare_tokens(
    arrays: list[np.ndarray], config: DataConfig, tokenizer: Tokenizer
) -> PreparedText:
    corpus = Corpus(config, lambda _: map(_IdDocument, arrays))
    require(not corpus.is_single, "data holds one document: give at least two, to hold one out")
    encode = functools.partial(_mark_ends, tokenizer)
    tokenizing = Tokenizing(corpus.items, lambda: corpus.count, encode, tokenizer.vocab_size)
    cached = open_or_write(Path(config.path), tokenizing, config)
    return PreparedText(cached.train, cached.held_out, tokenizer)


def _mark_ends(tokenizer: Tokenizer, documents: list[_IdDocument]) -> Iterator[Tokenized]:
    for document in documents:
        ids = document.ids
        if ids[0] != tokenizer.bos_id:
            ids = np.concatenate([[tokenizer.bos_id], ids])
        if ids[-1] != tokenizer.eos_id:
            ids = np.concatenate([ids, [tokenizer.eos_id]])
        yield Tokenized(ids)
