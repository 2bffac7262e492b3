"""Token stores: tokenized documents in files, written once in order and read at any place.

`cache` and its callers decide which documents go into which store, and where stores are kept.
"""

import array
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from mixtral_jax.data.domains import UNKNOWN, Category
from mixtral_jax.data.tokenized import Tokenized

# Documents of further categories are stored without one: a field that differs in every row does not
# group texts.
_MAX_CATEGORIES = 1000
_TEXT_BYTES_DTYPE = np.dtype(np.uint32)


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Tokenized documents, one after the other: each begins with BOS, and most end with EOS.

    Attributes:
        tokens: uint16 or uint32 [num_tokens], read from disk as needed.
        offsets: int64 [num_documents + 1]; document d is `tokens[offsets[d]:offsets[d + 1]]`.
        fingerprint: sha256, in hex, of the tokens, the lengths and the mask.
        loss_mask: uint8 [num_tokens], 1 on the tokens that are trained on; None: all of them.
        documents_by_source: number of documents from each source, in order; empty: one source.
        categories: uint16 [num_documents], the category of each document as an index into
            `category_names`; None: unknown.
        category_names: all categories; the first is that of documents without one.
        text_bytes: uint32 [num_tokens], as in `Tokenized`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    fingerprint: str
    loss_mask: np.ndarray | None = None
    documents_by_source: tuple[int, ...] = ()
    categories: np.ndarray | None = None
    category_names: tuple[Category, ...] = ()
    text_bytes: np.ndarray | None = None

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def read(self, document: int, start: int = 0, length: int | None = None) -> Tokenized:
        """Reads `length` tokens of a document from its token `start`; None reads to its end."""
        first, end = self.offsets[document] + start, self.offsets[document + 1]
        span = slice(first, end if length is None else min(end, first + length))

        def cut(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[span]

        return Tokenized(self.tokens[span], cut(self.loss_mask), cut(self.text_bytes))


class StoreWriter:
    """Writes a token store, document by document; leaving the context completes it.

    Either all documents have a mask, or none has; the same holds for their bytes of text.
    """

    def __init__(self, folder: Path, dtype: np.dtype):
        folder.mkdir()
        self._folder = folder
        self._dtype = dtype
        self._tokens = (folder / "tokens").open("wb")
        self._masks = (folder / "loss_mask").open("wb")
        self._text_bytes = (folder / "text_bytes").open("wb")
        self._has_masks = self._has_text_bytes = False
        self._lengths = array.array("q")
        self._by_source: list[int] = []
        self._categories = array.array("H")
        self._category_names = {UNKNOWN: 0}
        self._digest = hashlib.sha256()

    def __enter__(self) -> "StoreWriter":
        return self

    def add(self, document: Tokenized, source: int = 0, category: Category = UNKNOWN) -> None:
        """Appends a document; sources must come in order."""
        tokens = document.tokens.astype(self._dtype).tobytes()
        self._tokens.write(tokens)
        self._digest.update(tokens)
        if document.loss_mask is not None:
            self._has_masks = True
            mask = document.loss_mask.astype(np.uint8).tobytes()
            self._masks.write(mask)
            self._digest.update(mask)
        if document.text_bytes is not None:
            self._has_text_bytes = True
            self._text_bytes.write(document.text_bytes.astype(_TEXT_BYTES_DTYPE).tobytes())
        self._lengths.append(len(document.tokens))
        self._by_source += [0] * (source + 1 - len(self._by_source))
        self._by_source[source] += 1
        if len(self._category_names) < _MAX_CATEGORIES:
            self._category_names.setdefault(category, len(self._category_names))
        self._categories.append(self._category_names.get(category, 0))

    def __exit__(self, *error: object) -> None:
        self._tokens.close()
        self._masks.close()
        self._text_bytes.close()
        lengths = np.array(self._lengths, np.int64)
        self._digest.update(lengths.tobytes())
        np.save(self._folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
        np.save(self._folder / "categories.npy", np.array(self._categories, np.uint16))
        summary = {
            "dtype": self._dtype.name,
            "has_masks": self._has_masks,
            "has_text_bytes": self._has_text_bytes,
            "documents_by_source": self._by_source,
            "category_names": list(self._category_names),
            "fingerprint": self._digest.hexdigest(),
        }
        (self._folder / "summary.json").write_text(json.dumps(summary))


def open_store(folder: Path) -> TokenStore:
    """Opens the store in `folder`.

    Raises:
        ValueError, EOFError, OSError: a file is missing or incomplete.
    """
    summary = json.loads((folder / "summary.json").read_text())
    offsets = np.load(folder / "offsets.npy")
    num_tokens = int(offsets[-1])
    loss_mask = text_bytes = None
    if summary["has_masks"]:
        loss_mask = _map(folder / "loss_mask", np.dtype(np.uint8), num_tokens)
    if summary["has_text_bytes"]:
        text_bytes = _map(folder / "text_bytes", _TEXT_BYTES_DTYPE, num_tokens)
    return TokenStore(
        _map(folder / "tokens", np.dtype(summary["dtype"]), num_tokens),
        offsets,
        summary["fingerprint"],
        loss_mask,
        tuple(summary["documents_by_source"]),
        np.load(folder / "categories.npy"),
        tuple(Category(*names) for names in summary["category_names"]),
        text_bytes,
    )


def _map(file: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """Maps the file as an array that is read from disk as needed."""
    size, expected = file.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise ValueError(f"{file} holds {size} bytes instead of {expected}")
    return np.memmap(file, dtype, mode="r")
