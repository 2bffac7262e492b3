"""Which experts are for what: for kinds of text, and for single tokens (OLMoE, arXiv 2409.02060,
sections 5.3, 5.4).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mixtral_jax.lab.routing.counts import RouteCounts

# Ids with fewer tokens are left out: their largest share would be large by chance.
FEWEST_TOKENS = 24
_NUM_TOP = 8


@dataclasses.dataclass(frozen=True)
class LabelShares:
    """Of the tokens of each of X names, the share that chose each expert; `uniform`, k / E, if the
    name did not matter and loads were even. `of_all_LE`: the share of all tokens that have a name.
    """

    title: str
    names: tuple[str, ...]
    tokens_X: np.ndarray
    share_LXE: np.ndarray
    of_all_LE: np.ndarray
    uniform: float


@dataclasses.dataclass(frozen=True)
class TopToken:
    """A token that an expert sees much of: its text, how many there were, and the share of which it
    is first choice.
    """

    piece: str
    tokens: int
    share: float


@dataclasses.dataclass(frozen=True)
class VocabularyShares:
    """How far a token's id decides its first choice, over ids of at least `fewest_tokens` tokens.

    Attributes:
        share_L: of the tokens of an id, the share with that id's most frequent first choice; the
            mean over ids.
        chance_L: the same, if first choices were as frequent as here and drawn without a look at
            the id.
        top_tokens: of each layer and expert, the ids of which it takes the largest shares.
    """

    num_ids: int
    fewest_tokens: int
    share_L: np.ndarray
    chance_L: np.ndarray
    top_tokens: tuple[tuple[tuple[TopToken, ...], ...], ...]


def find_label_shares(
    counts: RouteCounts, names: Mapping[str, Sequence[str]], k: int
) -> tuple[LabelShares, ...]:
    """Of each labelling whose names at least two have tokens; those without any are left out."""
    found = []
    for (title, all_names), tokens_X, chosen_LXE in zip(
        names.items(), counts.tokens_by_label, counts.chosen_by_label, strict=True
    ):
        (there,) = np.nonzero(tokens_X[1:])
        if len(there) > 1:
            tokens_X, chosen_LXE = (
                tokens_X[1 + there].astype(np.int64),
                chosen_LXE[:, 1 + there].astype(np.int64),
            )
            found.append(
                LabelShares(
                    title=title,
                    names=tuple(all_names[number] for number in there.tolist()),
                    tokens_X=tokens_X,
                    share_LXE=chosen_LXE / tokens_X[None, :, None],
                    of_all_LE=chosen_LXE.sum(axis=1) / tokens_X.sum(),
                    uniform=k / chosen_LXE.shape[-1],
                )
            )
    return tuple(found)


def find_vocabulary_shares(counts: RouteCounts, pieces: Sequence[str]) -> VocabularyShares:
    """Of all ids that there are enough of; `pieces` are their texts."""
    (ids,) = np.nonzero(counts.tokens_V >= FEWEST_TOKENS)
    tokens_I = counts.tokens_V[ids].astype(np.int64)
    share_LIE = counts.first_LVE[:, ids] / tokens_I[None, :, None]
    first_LE = counts.first_LE / np.maximum(counts.tokens, 1)
    # Of few draws the largest share is more than its mean: drawn rather than computed, always with
    # the same seed.
    draws_LIE = np.stack(
        [
            np.random.default_rng(0).multinomial(tokens_I, first_E)
            for first_E in _normalize(first_LE)
        ]
    )
    return VocabularyShares(
        num_ids=len(ids),
        fewest_tokens=FEWEST_TOKENS,
        share_L=_mean_of_largest(share_LIE),
        chance_L=_mean_of_largest(draws_LIE / tokens_I[None, :, None]),
        top_tokens=tuple(
            _find_top(share_IE, tokens_I, [pieces[i] for i in ids.tolist()])
            for share_IE in share_LIE
        ),
    )


def _normalize(share_LE: np.ndarray) -> np.ndarray:
    return share_LE / np.maximum(share_LE.sum(axis=-1, keepdims=True), 1e-300)


def _mean_of_largest(share_LIE: np.ndarray) -> np.ndarray:
    L, num_ids, _ = share_LIE.shape
    return share_LIE.max(axis=-1).mean(axis=-1) if num_ids else np.full(L, np.nan)


def _find_top(
    share_IE: np.ndarray, tokens_I: np.ndarray, pieces: list[str]
) -> tuple[tuple[TopToken, ...], ...]:
    """For each expert; among equal shares, the more frequent first."""

    def find(share_I: np.ndarray) -> tuple[TopToken, ...]:
        order: list[int] = np.lexsort((-tokens_I, -share_I))[:_NUM_TOP].tolist()
        return tuple(
            TopToken(pieces[i], int(tokens_I[i]), float(share_I[i]))
            for i in order
            if share_I[i] > 0
        )

    return tuple(map(find, share_IE.T))
