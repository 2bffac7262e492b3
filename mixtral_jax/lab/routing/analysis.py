"""What routing does with a text: balance, pairs of experts, repetition, specialisation, and how it
settles.

`route_counts` counts; here counts become figures, each with what it would be by chance.
`routing_pictures` draws them, and docs/routing_analysis.md says what each means.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mixtral_jax.lab.routing.analysis_json import to_json
from mixtral_jax.lab.routing.counts import (
    OverlapCounts,
    RouteCounts,
    count_overlap,
    count_routes,
    route,
)
from mixtral_jax.lab.routing.specialization import (
    LabelShares,
    VocabularyShares,
    find_label_shares,
    find_vocabulary_shares,
)
from mixtral_jax.model.transformer import Transformer, model_maker
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.pretrained import Pretrained

# Enough even where an expert is in all pairs, whose weight has no bound.
_NUM_FITS = 1000
# Of fewer tokens with two experts, nothing is said of these.
FEWEST_PAIRS = 5


@dataclasses.dataclass(frozen=True)
class RoutedText:
    """What is routed: batches, and what is known of their tokens. None of it need be held in
    memory.

    Attributes:
        batches: gives the same ones at every call, each [1, B, T]; all have one shape.
        labels: of each batch, a number for each token by each labelling, int32 [len(label_names),
            B, T].
        label_names: the title of each labelling, and its names, which are numbered from 1.
        pieces: the text of each token id.
    """

    batches: Callable[[], Iterable[Batch]]
    labels: Iterable[jax.Array]
    label_names: Mapping[str, Sequence[str]]
    pieces: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Balance:
    """Of each layer: the share of routes to each expert; their spread over their mean; entropy over
    log E; the largest over their mean, less 1.
    """

    load_LE: np.ndarray
    coefficient_of_variation_L: np.ndarray
    load_entropy_L: np.ndarray
    max_violation_L: np.ndarray


@dataclasses.dataclass(frozen=True)
class Repetition:
    """How often consecutive tokens of a document share their first choice, or any expert (Mixtral,
    arXiv 2401.04088, Table 5); what it would be for experts chosen at random; and for first choices
    that are as frequent as here, but independent.
    """

    first_L: np.ndarray
    any_L: np.ndarray
    chance_first: float
    chance_any: float
    chance_first_of_load_L: np.ndarray
    num_pairs: int


@dataclasses.dataclass(frozen=True)
class Flips:
    """Shares of tokens whose experts, or first choice, change with the dtype that the model
    computes in.
    """

    dtype: str
    other_dtype: str
    any_L: np.ndarray
    first_L: np.ndarray


@dataclasses.dataclass(frozen=True)
class Saturation:
    """Of each earlier checkpoint, the share of a token's experts that the last one chooses too (OLMoE, arXiv
    2409.02060, section 5.1): |E(t) & E(last)| / k, over tokens and by layer.
    """

    steps: tuple[int, ...]
    share_SL: np.ndarray
    chance: float


@dataclasses.dataclass(frozen=True)
class RoutingAnalysis:
    """All figures. `coactivation_LEE[l, i, j]` is P(j chosen | i chosen), NaN where i is j or was never chosen; it is
    (k - 1) / (E - 1) by chance. `flips` and `saturation` are None where nothing was compared.
    """

    num_tokens: int
    num_experts: int
    num_experts_per_token: int
    balance: Balance
    coactivation_LEE: np.ndarray
    repetition: Repetition
    by_label: tuple[LabelShares, ...]
    vocabulary: VocabularyShares
    flips: Flips | None
    saturation: Saturation | None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.coactivation_LEE)

    def to_json(self) -> dict[str, Any]:
        """All of it, as what JSON can hold: names without their dimensions, null for NaN."""
        return to_json(self)


def analyze(
    loaded: Pretrained,
    text: RoutedText,
    *,
    earlier: Mapping[int, Callable[[], Pretrained]] | None = None,
    compares_dtypes: bool = True,
) -> RoutingAnalysis:
    """Routes a text, and says what was seen. All processes of a run call it alike, and get the
    same.

    Memory does not grow with the text: routes are counted batch by batch, and where two models are
    compared, each routes every batch anew.

    Args:
        earlier: of the same model at earlier steps, how to load it onto the same mesh; one at a
            time is held.
        compares_dtypes: whether to route once more in another dtype: float32, or bfloat16 for a
            model in float32.
    """
    E, dtype = loaded.config.model.num_experts, loaded.config.model.dtype
    with jax.set_mesh(loaded.mesh):
        num_labels = [1 + len(names) for names in text.label_names.values()]
        labelled = zip(text.batches(), text.labels, strict=True)
        routed = ((batch, labels, route(loaded.model, batch, dtype)) for batch, labels in labelled)
        sizes = {
            "num_experts": E,
            "vocab_size": loaded.config.model.vocab_size,
            "num_labels": num_labels,
        }
        counts = count_routes(routed, **sizes, rules=loaded.model.rules)

        def compare(other: Transformer, other_dtype: str) -> OverlapCounts:
            return count_overlap(
                (batch, route(other, batch, other_dtype), route(loaded.model, batch, dtype))
                for batch in text.batches()
            )

        flips = _find_flips(loaded, compare) if compares_dtypes else None
        overlaps = {
            step: compare(load().model, dtype) for step, load in sorted((earlier or {}).items())
        }
    k = int(np.trace(counts.together_LEE[0])) // int(counts.tokens)  # Each token chooses as many.
    saturation = _find_saturation(overlaps, E, k) if overlaps else None
    return summarize(counts, k, text.label_names, text.pieces, flips=flips, saturation=saturation)


def summarize(
    counts: RouteCounts,
    num_experts_per_token: int,
    label_names: Mapping[str, Sequence[str]],
    pieces: Sequence[str],
    *,
    flips: Flips | None = None,
    saturation: Saturation | None = None,
) -> RoutingAnalysis:
    """The figures of counts; arguments as those of `RoutedText`."""
    k, E = num_experts_per_token, counts.first_LE.shape[-1]
    chosen_LE = np.diagonal(counts.together_LEE, axis1=1, axis2=2)
    return RoutingAnalysis(
        num_tokens=int(counts.tokens),
        num_experts=E,
        num_experts_per_token=k,
        balance=measure_balance(chosen_LE),
        coactivation_LEE=find_coactivation(counts.together_LEE),
        repetition=_find_repetition(counts, k),
        by_label=find_label_shares(counts, label_names, k),
        vocabulary=find_vocabulary_shares(counts, pieces),
        flips=flips,
        saturation=saturation,
    )


def measure_balance(chosen_LE: np.ndarray) -> Balance:
    """From routes to each expert."""
    load_LE = divide(chosen_LE, chosen_LE.sum(axis=-1, keepdims=True))
    E = load_LE.shape[-1]
    nats_LE = load_LE * np.log(np.where(load_LE > 0, load_LE, 1))
    return Balance(
        load_LE=load_LE,
        coefficient_of_variation_L=load_LE.std(axis=-1) * E,
        load_entropy_L=-nats_LE.sum(axis=-1) / math.log(max(E, 2)),
        max_violation_L=load_LE.max(axis=-1) * E - 1,
    )


def find_coactivation(together_LEE: np.ndarray) -> np.ndarray:
    """P(j chosen | i chosen), [L, i, j], over all pairs of a token's experts: not those of
    neighbouring ranks alone.
    """
    chosen_LE1 = np.diagonal(together_LEE, axis1=1, axis2=2)[..., None]
    probability_LEE = divide(together_LEE, chosen_LE1)
    return np.where(np.eye(together_LEE.shape[-1], dtype=bool), np.nan, probability_LEE)


def find_lift(analysis: RoutingAnalysis) -> np.ndarray:
    """P(i and j chosen) over what the popularity of both alone gives, [L, i, j]; NaN as in
    `coactivation_LEE`, and where too few tokens have both, or would by that.

    Alone, w_i w_j of all tokens have i and j, with the weights w by which each expert is in as many
    pairs as it is (quasi-independence).
    """
    k = analysis.num_experts_per_token
    chosen_LE = k * analysis.balance.load_LE
    weight_LE = chosen_LE
    for _ in range(_NUM_FITS):
        others_LE = weight_LE.sum(axis=-1, keepdims=True) - weight_LE
        weight_LE = np.sqrt(weight_LE * (k - 1) * chosen_LE / others_LE)
    alone_LEE = weight_LE[:, :, None] * weight_LE[:, None]
    both_LEE = analysis.coactivation_LEE * chosen_LE[..., None]
    is_rare_LEE = np.maximum(alone_LEE, both_LEE) * analysis.num_tokens < FEWEST_PAIRS
    return divide(both_LEE, np.where(is_rare_LEE, 0, alone_LEE))


def pick_layers(num_layers: int, most: int) -> list[int]:
    """At most so many layers, the first and the last among them, as evenly spread as can be."""
    if num_layers <= most:
        return list(range(num_layers))
    return sorted({round(place * (num_layers - 1) / (most - 1)) for place in range(most)})


def chance_of_common(num_experts: int, num_experts_per_token: int) -> float:
    """That two tokens that choose k of E experts at random have one in common: 1 - C(E - k, k) /
    C(E, k).
    """
    E, k = num_experts, num_experts_per_token
    return 1 - math.comb(E - k, k) / math.comb(E, k)


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """float64; NaN for nothing of nothing."""
    return part / np.where(whole > 0, whole, np.nan)


def _find_repetition(counts: RouteCounts, k: int) -> Repetition:
    first_LE = divide(counts.first_LE, counts.tokens)
    return Repetition(
        first_L=divide(counts.same_first_L, counts.neighbours),
        any_L=divide(counts.any_shared_L, counts.neighbours),
        chance_first=1 / first_LE.shape[-1],
        chance_any=chance_of_common(first_LE.shape[-1], k),
        chance_first_of_load_L=np.sum(first_LE**2, axis=-1),
        num_pairs=int(counts.neighbours),
    )


def _find_flips(loaded: Pretrained, compare: Callable[[Transformer, str], OverlapCounts]) -> Flips:
    dtype = loaded.config.model.dtype
    other = "bfloat16" if dtype == "float32" else "float32"
    overlap = compare(computing_in(loaded, other), other)
    return Flips(
        dtype,
        other,
        any_L=1 - overlap.same_set_L / overlap.tokens,
        first_L=1 - overlap.same_first_L / overlap.tokens,
    )


def _find_saturation(overlaps: Mapping[int, OverlapCounts], num_experts: int, k: int) -> Saturation:
    share_SL = np.stack(
        [overlap.common_L / (overlap.tokens * float(k)) for overlap in overlaps.values()]
    )
    return Saturation(tuple(overlaps), share_SL, chance=k / num_experts)


def computing_in(loaded: Pretrained, dtype: str) -> Transformer:
    """The same model, with the same weights in the dtype they are held in, computing in another;
    under its mesh.
    """
    config = dataclasses.replace(
        loaded.config, model=dataclasses.replace(loaded.config.model, dtype=dtype)
    )
    shapes = jax.eval_shape(model_maker(config, loaded.kernels, loaded.model.rules))
    return jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(loaded.model))
