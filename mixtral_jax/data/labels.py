"""Labels for the tokens of a corpus: where a token comes from, and what part of a document it is.

Each labelling gives every token one of a few names, or none.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from mixtral_jax.config import DataConfig
from mixtral_jax.data.domains import UNKNOWN, Category
from mixtral_jax.data.python_parts import PARTS, find_parts
from mixtral_jax.data.sources import all_sources
from mixtral_jax.data.splits import TRAIN
from mixtral_jax.data.store import TokenStore
from mixtral_jax.data.tokenizer import Tokenizer

OTHER = "other"
_MAX_NAMES = 8


@dataclasses.dataclass(frozen=True)
class Labelling:
    """One way to group tokens.

    Attributes:
        title: what the names name, such as "part of the conversation".
        names: the names of the groups; the same for all stores of a corpus.
        label: labels the tokens of a document of a store, int [num_tokens]: 1 + an index into
            `names`, or 0 for none.
    """

    title: str
    names: tuple[str, ...]
    label: Callable[[TokenStore, int], np.ndarray]


def find_labellings(
    stores: Sequence[TokenStore], data: DataConfig, tokenizer: Tokenizer
) -> list[Labelling]:
    """Finds the labellings that have at least two names in a corpus.

    Args:
        data: what names the corpus.
    """
    # The splits of one data set are sources of one path.
    sources = [
        source.path if source.split in (TRAIN, None) else f"{source.path} {source.split}"
        for source in all_sources(data)
    ]
    by_category = [
        _by_category(stores, "domain", "domain"),
        _by_category(stores, "file_type", "file type"),
    ]
    found = [
        _by_source(stores, sources),
        *by_category,
        _by_python(stores, tokenizer),
        _by_turn(stores),
    ]
    return [labelling for labelling in found if len(labelling.names) > 1]


def _by_source(stores: Sequence[TokenStore], sources: list[str]) -> Labelling:
    def label(store: TokenStore, document: int) -> np.ndarray:
        return np.full(_length(store, document), 1 + _source_of(store, document))

    present = {
        source
        for store in stores
        for source, count in enumerate(store.documents_by_source or (store.num_documents,))
        if count
    }
    return Labelling("source", tuple(sources) if len(present) > 1 else (), label)


def _by_category(
    stores: Sequence[TokenStore], field: Literal["domain", "file_type"], title: str
) -> Labelling:
    """Names the categories with the most tokens; the others share one name."""
    tokens: collections.Counter[str] = collections.Counter()
    for store in stores:
        if store.categories is not None:
            sizes = np.bincount(
                store.categories, np.diff(store.offsets), minlength=len(store.category_names)
            )
            for category, size in zip(
                store.category_names, sizes.astype(int).tolist(), strict=True
            ):
                tokens[getattr(category, field)] += size
    found = [name for name, size in tokens.most_common() if name and size]
    is_all = len(found) <= _MAX_NAMES and not tokens[""]
    names = tuple(found) if is_all or not found else (*found[: _MAX_NAMES - 1], OTHER)
    number = {name: index for index, name in enumerate(names, start=1)}

    def label(store: TokenStore, document: int) -> np.ndarray:
        name = getattr(_category_of(store, document), field)
        return np.full(_length(store, document), number.get(name, len(names)))

    # File names may not be UTF-8, but pictures and reports need UTF-8.
    printable = (name.encode(errors="backslashreplace").decode() for name in names)
    return Labelling(title, tuple(printable), label)


def _by_python(stores: Sequence[TokenStore], tokenizer: Tokenizer) -> Labelling:
    """Labels code and text in documents that are Python source files."""

    def label(store: TokenStore, document: int) -> np.ndarray:
        ids = store.read(document).tokens
        sizes = tokenizer.bytes_per_token[ids]
        labels = np.zeros(len(ids), np.int64)
        if _category_of(store, document).file_type != ".py":
            return labels
        parts = find_parts(tokenizer.decode(ids))
        if parts is None or sizes.sum() != len(parts) + tokenizer.prefix_bytes:
            return labels
        # The last byte of a piece decides: the spaces before a word belong to the word.
        last = np.cumsum(sizes) - tokenizer.prefix_bytes - 1
        has_text = (sizes > 0) & (last >= 0)
        labels[has_text] = 1 + parts[last[has_text]]
        return labels

    has_python = any(
        category.file_type == ".py" for store in stores for category in store.category_names
    )
    return Labelling("part of the Python source", PARTS if has_python else (), label)


def _by_turn(stores: Sequence[TokenStore]) -> Labelling:
    """Labels tokens that are trained on, and those that they answer."""

    def label(store: TokenStore, document: int) -> np.ndarray:
        mask = store.read(document).loss_mask
        if mask is None:
            return np.zeros(_length(store, document), np.int64)
        return 1 + mask.astype(np.int64)

    has_masks = any(store.loss_mask is not None for store in stores)
    return Labelling("part of the conversation", ("prompt", "answer") if has_masks else (), label)


def _source_of(store: TokenStore, document: int) -> int:
    return int(np.searchsorted(np.cumsum(store.documents_by_source), document, side="right"))


def _category_of(store: TokenStore, document: int) -> Category:
    return UNKNOWN if store.categories is None else store.category_names[store.categories[document]]


def _length(store: TokenStore, document: int) -> int:
    return int(store.offsets[document + 1] - store.offsets[document])
