"""Measures which experts specialize in which kinds of text and in which token ids.

The figures follow OLMoE (arXiv 2409.02060), sections 5.3 and 5.4.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mixtral_jax.lab.routing.counts import RouteCounts

# Token ids with fewer tokens are left out, because their largest share would be large by chance.
MIN_TOKENS_PER_ID = 24
_NUM_TOP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class LabelShares:
    """Which experts the tokens of each label chose, for one labelling with X labels.

    Attributes:
        title: what the labels tell apart, such as `file type`.
        names: the names of the labels, [X].
        tokens_X: number of tokens with each label.
        share_LXE: of the tokens with a label, the share that chose each expert.
        of_all_LE: of all tokens with any label, the share that chose each expert.
        uniform: `share_LXE` if labels did not matter and loads were even, k / E.
    """

    title: str
    names: tuple[str, ...]
    tokens_X: np.ndarray
    share_LXE: np.ndarray
    of_all_LE: np.ndarray
    uniform: float


@dataclasses.dataclass(frozen=True)
class TopToken:
    """A token id that often has an expert as its first choice.

    Attributes:
        piece: the text of the id.
        tokens: number of tokens with this id.
        share: the share of them whose first choice is the expert.
    """

    piece: str
    tokens: int
    share: float


@dataclasses.dataclass(frozen=True)
class VocabularyShares:
    """How far the id of a token decides its first choice.

    Attributes:
        num_ids: number of ids that have at least `fewest_tokens` tokens; only these count.
        share_L: of the tokens of an id, the share with that id's most frequent first choice,
            averaged over ids.
        chance_L: `share_L` if first choices were as frequent as measured, but drawn without regard
            to the id.
        top_tokens: for each layer and expert, the ids that have it as first choice most often.
    """

    num_ids: int
    fewest_tokens: int
    share_L: np.ndarray
    chance_L: np.ndarray
    top_tokens: tuple[tuple[tuple[TopToken, ...], ...], ...]


def find_label_shares(
    counts: RouteCounts, names: Mapping[str, Sequence[str]], k: int
) -> tuple[LabelShares, ...]:
    """Computes the shares of each labelling that has tokens with at least two of its labels.

    Labels without tokens are left out. `names` maps the title of each labelling to its labels.
    """
    found = []
    for (title, all_names), tokens_X, chosen_LXE in zip(
        names.items(), counts.tokens_by_label, counts.chosen_by_label, strict=True
    ):
        (present,) = np.nonzero(tokens_X[1:])
        if len(present) > 1:
            tokens_X = tokens_X[1 + present].astype(np.int64)
            chosen_LXE = chosen_LXE[:, 1 + present].astype(np.int64)
            found.append(
                LabelShares(
                    title=title,
                    names=tuple(all_names[number] for number in present.tolist()),
                    tokens_X=tokens_X,
                    share_LXE=chosen_LXE / tokens_X[None, :, None],
                    of_all_LE=chosen_LXE.sum(axis=1) / tokens_X.sum(),
                    uniform=k / chosen_LXE.shape[-1],
                )
            )
    return tuple(found)


def find_vocabulary_shares(counts: RouteCounts, pieces: Sequence[str]) -> VocabularyShares:
    """Computes how far ids decide first choices; `pieces` are the texts of all ids."""
    (ids,) = np.nonzero(counts.tokens_V >= MIN_TOKENS_PER_ID)
    tokens_I = counts.tokens_V[ids].astype(np.int64)
    share_LIE = counts.first_LVE[:, ids] / tokens_I[None, :, None]
    first_LE = counts.first_LE / np.maximum(counts.tokens, 1)
    # The largest share of a few draws is larger than that of many, so the value by chance is found
    # by drawing, always with the same seed.
    draws_LIE = np.stack(
        [
            np.random.default_rng(0).multinomial(tokens_I, first_E)
            for first_E in _normalize(first_LE)
        ]
    )
    return VocabularyShares(
        num_ids=len(ids),
        fewest_tokens=MIN_TOKENS_PER_ID,
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
    """Returns the top ids of each expert; among equal shares, the more frequent id comes first."""

    def find(share_I: np.ndarray) -> tuple[TopToken, ...]:
        order: list[int] = np.lexsort((-tokens_I, -share_I))[:_NUM_TOP_TOKENS].tolist()
        return tuple(
            TopToken(pieces[i], int(tokens_I[i]), float(share_I[i]))
            for i in order
            if share_I[i] > 0
        )

    return tuple(map(find, share_IE.T))
