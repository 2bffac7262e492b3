"""What can be told of each token of a corpus besides its id: where it comes from, and what part of
its document it is.

Every labelling gives a token one of a few names, or none.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from mixtral_jax.data.domains import UNSAID, Category
from mixtral_jax.data.python_parts import PARTS, find_parts
from mixtral_jax.data.sources import split_sources
from mixtral_jax.data.store import TokenStore
from mixtral_jax.data.tokenizer import Tokenizer

OTHER = "other"
_MOST_NAMES = 8


@dataclasses.dataclass(frozen=True)
class Labelling:
    """One way of telling tokens apart.

    Attributes:
        title: what the names are names of, such as "part of the source".
        names: the same for all stores of a corpus.
        label: of each token of a document of a store, int [num_tokens]: 1 + a place in `names`, or
            0 for none.
    """

    title: str
    names: tuple[str, ...]
    label: Callable[[TokenStore, int], np.ndarray]


def find_labellings(
    stores: Sequence[TokenStore], path: str, tokenizer: Tokenizer
) -> list[Labelling]:
    """All that say something of the corpus that `path`, a value of `data.path`, names: at least two
    names each.
    """
    sources = [source.path for source in split_sources(path)]
    by_category = [
        _by_category(stores, "domain", "domain"),
        _by_category(stores, "file_type", "file type"),
    ]
    found = [_by_source(sources), *by_category, _by_python(stores, tokenizer), _by_turn(stores)]
    return [labelling for labelling in found if len(labelling.names) > 1]


def _by_source(sources: list[str]) -> Labelling:
    def label(store: TokenStore, document: int) -> np.ndarray:
        return np.full(_length(store, document), 1 + _source_of(store, document))

    return Labelling("source", tuple(sources), label)


def _by_category(
    stores: Sequence[TokenStore], field: Literal["domain", "file_type"], title: str
) -> Labelling:
    """The largest by their tokens, and the others in one."""
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
    there = [name for name, size in tokens.most_common() if name and size]
    is_all = len(there) <= _MOST_NAMES and not tokens[""]
    names = tuple(there) if is_all or not there else (*there[: _MOST_NAMES - 1], OTHER)
    number = {name: place for place, name in enumerate(names, start=1)}

    def label(store: TokenStore, document: int) -> np.ndarray:
        name = getattr(_category_of(store, document), field)
        return np.full(_length(store, document), number.get(name, len(names)))

    # Names of files need be no UTF-8, and what shows them may take nothing else.
    return Labelling(
        title, tuple(name.encode(errors="backslashreplace").decode() for name in names), label
    )


def _by_python(stores: Sequence[TokenStore], tokenizer: Tokenizer) -> Labelling:
    """Code and text, in the documents that are Python."""

    def label(store: TokenStore, document: int) -> np.ndarray:
        ids = store.read(document).tokens
        sizes = tokenizer.bytes_per_token[ids]
        labels = np.zeros(len(ids), np.int64)
        if _category_of(store, document).file_type != ".py":
            return labels
        parts = find_parts(tokenizer.decode(ids))
        if parts is None or sizes.sum() != len(parts) + tokenizer.prefix_bytes:
            return labels
        # A piece is what its last byte is: the spaces before a word belong to what comes after
        # them.
        last = np.cumsum(sizes) - tokenizer.prefix_bytes - 1
        has_text = (sizes > 0) & (last >= 0)
        labels[has_text] = 1 + parts[last[has_text]]
        return labels

    has_python = any(
        category.file_type == ".py" for store in stores for category in store.category_names
    )
    return Labelling("part of the Python source", PARTS if has_python else (), label)


def _by_turn(stores: Sequence[TokenStore]) -> Labelling:
    """What is to be learnt, and what it answers."""

    def label(store: TokenStore, document: int) -> np.ndarray:
        mask = store.read(document).loss_mask
        return (
            np.zeros(_length(store, document), np.int64)
            if mask is None
            else 1 + mask.astype(np.int64)
        )

    has_masks = any(store.loss_mask is not None for store in stores)
    return Labelling("part of the conversation", ("prompt", "answer") if has_masks else (), label)


def _source_of(store: TokenStore, document: int) -> int:
    return int(np.searchsorted(np.cumsum(store.documents_by_source), document, side="right"))


def _category_of(store: TokenStore, document: int) -> Category:
    return UNSAID if store.categories is None else store.category_names[store.categories[document]]


def _length(store: TokenStore, document: int) -> int:
    return int(store.offsets[document + 1] - store.offsets[document])
