"""Documents as two token stores, train and held-out, tokenised once and cached on disk.

How rows are cut from the stores is for `packing`; how the documents are read, for `sources`.
"""

import array
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mixtral_jax.config import DataConfig, require
from mixtral_jax.data.sources import Document, fingerprint_source, read_documents
from mixtral_jax.data.store import StoreWriter, TokenStore, flush_to_disk, open_store
from mixtral_jax.data.tokenizer import Tokenizer, check_planned_vocabulary, check_vocabulary, load_tokenizer

log = logging.getLogger(__name__)

_CACHE_FORMAT = 2  # Raise it when the same files and config would give other stores.
_NAMED_BAD_ROWS = 20
_CHARACTERS_AT_ONCE = 4_000_000


@dataclasses.dataclass(frozen=True)
class PreparedText:
    """What a run reads: two stores without a common document, their tokenizer, the number of bad rows."""

    train: TokenStore
    held_out: TokenStore
    tokenizer: Tokenizer
    num_bad: int


def prepare_text(
    config: DataConfig, vocab_size: int, tokenizer_path: Path, cache_dir: Path | None = None, *, is_writer: bool = True
) -> PreparedText:
    """Reads, splits and tokenises the text of a run, or opens the cache of an earlier one.

    The side of a document follows from its text alone, so that new files move no old document and
    copies lie on one side. Two exceptions: a side left empty gets the document nearest to it, with
    its copies, and the tail of a single document is held out, from the start of a line. Documents
    that are all copies of one are that single document.

    Args:
        vocab_size: of the model; the tokenizer must fit in it.
        tokenizer_path: where the run keeps its tokenizer.
        cache_dir: by default `default_cache_dir()`.
        is_writer: whether to write `tokenizer_path`; one process of a run does, each may write its cache.

    Raises:
        ConfigError: nothing to read, too many bad rows, or no fitting tokenizer.
    """
    cache_dir = cache_dir or default_cache_dir()
    check_planned_vocabulary(config.tokenizer, vocab_size)
    cache_dir.mkdir(parents=True, exist_ok=True)
    key = _fingerprint_data(config)
    corpus = _Corpus(config)
    saved = tokenizer_path
    if config.tokenizer.startswith("train:") and not saved.exists():
        saved = cache_dir / f"{key}.model"  # Runs on the same text share the training.
    may_save = is_writer or saved != tokenizer_path
    tokenizer = load_tokenizer(config.tokenizer, corpus.train_texts, saved, may_save=may_save)
    check_vocabulary(tokenizer, vocab_size)
    folder = cache_dir / f"{key}-{tokenizer.fingerprint[:16]}"
    train, held_out, count = _open_or_write_cache(folder, corpus, tokenizer)
    count.check(config)
    if is_writer and saved != tokenizer_path:
        tokenizer.save(tokenizer_path)
    if count.num_bad:
        log.warning("data.path=%s: %d bad rows are left out", config.path, count.num_bad)
    return PreparedText(train, held_out, tokenizer, count.num_bad)


def default_cache_dir() -> Path:
    """`mixtral_jax` under $XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mixtral_jax"


@dataclasses.dataclass(frozen=True)
class _Count:
    """What reading gave; kept in the cache, whose readers may allow fewer bad rows than its writer did."""

    num_rows: int
    num_bad: int
    first_bad: str

    def check(self, config: DataConfig) -> None:
        num_rows, num_bad = self.num_rows, self.num_bad
        require(
            num_bad <= config.max_bad_fraction * num_rows,
            f"data.path={config.path}: {num_bad} of {num_rows} rows are bad ({num_bad / max(num_rows, 1):.1%}), over "
            f"data.max_bad_fraction={config.max_bad_fraction}; first: {self.first_bad}",
        )
        require(
            num_rows > num_bad,
            f"data.path={config.path} holds no document ({num_rows} rows): name files that hold text",
        )


class _Corpus:
    """The documents of a config and the side of each; every pass streams the files anew."""

    def __init__(self, config: DataConfig):
        self._config = config

    def documents(self) -> Iterator[tuple[str, bool]]:
        """Texts, and whether each is held out."""
        held_out, _ = self._survey
        rows = read_documents(self._config.path, self._config.text_field)
        texts = (row.text for row in rows if isinstance(row, Document))
        if len(held_out) == 1:
            return self._cut_tail(next(texts))
        return zip(texts, held_out.tolist(), strict=True)

    def train_texts(self) -> Iterator[str]:
        return (text for text, held_out in self.documents() if not held_out)

    @property
    def count(self) -> _Count:
        return self._survey[1]

    @functools.cached_property
    def _survey(self) -> tuple[np.ndarray, _Count]:
        """Which documents are held out, as `_choose_held_out` says, and what there is."""
        places = array.array("d")
        first_bad, num_bad = "", 0
        for row in read_documents(self._config.path, self._config.text_field):
            if isinstance(row, Document):
                places.append(_place(row.text))
                continue
            first_bad = first_bad or f"{row.origin}: {row.reason}"
            num_bad += 1
            if num_bad <= _NAMED_BAD_ROWS:
                log.warning("bad row %s: %s", row.origin, row.reason)
        if num_bad > _NAMED_BAD_ROWS:
            log.warning("... and %d more bad rows", num_bad - _NAMED_BAD_ROWS)
        count = _Count(len(places) + num_bad, num_bad, first_bad)
        count.check(self._config)
        return _choose_held_out(np.array(places), self._config.held_out_fraction), count

    def _cut_tail(self, text: str) -> Iterator[tuple[str, bool]]:
        require(len(text) > 1, f"data.path={self._config.path} holds a single character: give more text")
        wanted = round(len(text) * (1 - self._config.held_out_fraction))
        wanted = min(max(wanted, 1), len(text) - 1)
        cut = text.rfind("\n", 0, wanted) + 1 or wanted
        yield text[:cut], False
        yield text[cut:], True


def _place(text: str) -> float:
    """Where in [0, 1) a text lies: even over texts, and the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _choose_held_out(places: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each document is held out; of length 1 if all have one text. Equal texts have equal places."""
    if places.min() == places.max():
        return np.array([True])
    held_out = places < fraction
    if not held_out.any():
        return places == places.min()
    return held_out if not held_out.all() else places != places.max()


def _fingerprint_data(config: DataConfig) -> str:
    """Of what changes the tokens, and nothing else: the limit on bad rows does not."""
    chosen = [config.path, config.text_field, config.held_out_fraction, config.tokenizer]
    described = [_CACHE_FORMAT, *chosen, fingerprint_source(config.path)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _open_or_write_cache(folder: Path, corpus: _Corpus, tokenizer: Tokenizer) -> tuple[TokenStore, TokenStore, _Count]:
    if folder.exists():
        try:
            return _open_cache(folder)
        except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
            log.warning("%s is damaged (%s): the text is tokenised again", folder, error)
            shutil.rmtree(folder)
    _write_cache(folder, corpus, tokenizer)
    return _open_cache(folder)


def _open_cache(folder: Path) -> tuple[TokenStore, TokenStore, _Count]:
    count = _Count(**json.loads((folder / "summary.json").read_text()))
    return open_store(folder / "train"), open_store(folder / "held_out"), count


def _write_cache(folder: Path, corpus: _Corpus, tokenizer: Tokenizer) -> None:
    """Writes elsewhere and renames, so that `folder` is whole whenever it exists."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _write_stores(temporary, corpus, tokenizer)
        (temporary / "summary.json").write_text(json.dumps(dataclasses.asdict(corpus.count)))
        flush_to_disk(temporary)
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # If it does, another process wrote the same first.
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_stores(folder: Path, corpus: _Corpus, tokenizer: Tokenizer) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with StoreWriter(folder / "train", dtype) as train, StoreWriter(folder / "held_out", dtype) as held_out:
        for group in _group(corpus.documents()):
            encoded = tokenizer.encode_all([text for text, _ in group])
            for ids, (_, is_held_out) in zip(encoded, group, strict=True):
                writer = held_out if is_held_out else train
                writer.add(np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]))


def _group(documents: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Enough documents at once to keep every core at work, few enough to hold in memory."""
    group, characters = [], 0
    for document in documents:
        group.append(document)
        characters += len(document[0])
        if characters >= _CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    yield group
