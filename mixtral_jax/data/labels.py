"""What can be told of each token of a corpus besides its id: where it comes from, and what part of its document it is.

Every labelling gives a token one of a few names, or none.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mixtral_jax.data.python_parts import PARTS, find_parts
from mixtral_jax.data.sources import STDLIB, split_sources
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
        label: of each token of a document of a store, int [num_tokens]: 1 + a place in `names`, or 0 for none.
    """

    title: str
    names: tuple[str, ...]
    label: Callable[[TokenStore, int], np.ndarray]


def find_labellings(stores: Sequence[TokenStore], path: str, tokenizer: Tokenizer) -> list[Labelling]:
    """All that say something of the corpus that `path`, a value of `data.path`, names: at least two names each."""
    sources = [source.path for source in split_sources(path)]
    found = [_by_source(sources), _by_domain(stores), _by_python(sources, tokenizer), _by_turn(stores)]
    return [labelling for labelling in found if len(labelling.names) > 1]


def _by_source(sources: list[str]) -> Labelling:
    def label(store: TokenStore, document: int) -> np.ndarray:
        return np.full(_length(store, document), 1 + _source_of(store, document))

    return Labelling("source", tuple(sources), label)


def _by_domain(stores: Sequence[TokenStore]) -> Labelling:
    """The largest domains by their tokens, and the others in one."""
    tokens: collections.Counter[str] = collections.Counter()
    for store in stores:
        if store.domains is not None:
            sizes = np.bincount(store.domains, np.diff(store.offsets), minlength=len(store.domain_names))
            tokens.update(dict(zip(store.domain_names, sizes.astype(int).tolist(), strict=True)))
    there = [name for name, size in tokens.most_common() if name and size]
    is_all = len(there) <= _MOST_NAMES and not tokens[""]
    names = tuple(there) if is_all or not there else (*there[: _MOST_NAMES - 1], OTHER)
    number = {name: place for place, name in enumerate(names, start=1)}

    def label(store: TokenStore, document: int) -> np.ndarray:
        name = "" if store.domains is None else store.domain_names[store.domains[document]]
        return np.full(_length(store, document), number.get(name, len(names)))

    # Names of files need be no UTF-8, and what shows them may take nothing else.
    return Labelling("domain", tuple(name.encode(errors="backslashreplace").decode() for name in names), label)


def _by_python(sources: list[str], tokenizer: Tokenizer) -> Labelling:
    """Code and text, in the documents that are Python."""

    def label(store: TokenStore, document: int) -> np.ndarray:
        ids = store.read(document).tokens
        sizes = tokenizer.bytes_per_token[ids]
        labels = np.zeros(len(ids), np.int64)
        if sources[_source_of(store, document)] != STDLIB:
            return labels
        parts = find_parts(tokenizer.decode(ids))
        if parts is None or sizes.sum() != len(parts) + tokenizer.prefix_bytes:
            return labels
        # A piece is what its last byte is: the spaces before a word belong to what comes after them.
        last = np.cumsum(sizes) - tokenizer.prefix_bytes - 1
        has_text = (sizes > 0) & (last >= 0)
        labels[has_text] = 1 + parts[last[has_text]]
        return labels

    return Labelling("part of the Python source", PARTS if STDLIB in sources else (), label)


def _by_turn(stores: Sequence[TokenStore]) -> Labelling:
    """What is to be learnt, and what it answers."""

    def label(store: TokenStore, document: int) -> np.ndarray:
        mask = store.read(document).loss_mask
        return np.zeros(_length(store, document), np.int64) if mask is None else 1 + mask.astype(np.int64)

    has_masks = any(store.loss_mask is not None for store in stores)
    return Labelling("part of the conversation", ("prompt", "answer") if has_masks else (), label)


def _source_of(store: TokenStore, document: int) -> int:
    return int(np.searchsorted(np.cumsum(store.documents_by_source), document, side="right"))


def _length(store: TokenStore, document: int) -> int:
    return int(store.offsets[document + 1] - store.offsets[document])
