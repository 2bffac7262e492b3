"""Analyses what the routers of a model do with a text.

The analysis covers balance, experts chosen together, repetition, specialization, how early routes
settled in training, and which routes change with the precision of the computation.
docs/routing_analysis.md says what each figure means.
"""

import dataclasses
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
from mixtral_jax.lab.routing.figures import (
    Balance,
    Repetition,
    find_coactivation,
    find_lift,
    measure_balance,
    measure_repetition,
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


@dataclasses.dataclass(frozen=True)
class RoutedText:
    """The text that is routed: batches, and labels of their tokens. Both may be made when read.

    Attributes:
        batches: returns an iterator over the batches, the same ones at every call. Each is
            [1, B, T], and all have the same shape.
        labels: for each batch, the label numbers of its tokens, int32 [len(label_names), B, T];
            0 is a token without a label.
        label_names: title of each labelling -> the names of its labels, which are numbered from 1.
        pieces: the text of each token id.
    """

    batches: Callable[[], Iterable[Batch]]
    labels: Iterable[jax.Array]
    label_names: Mapping[str, Sequence[str]]
    pieces: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Flips:
    """How many routes change if the same weights compute in another dtype.

    Attributes:
        dtype: the dtype that the model computes in.
        other_dtype: the dtype that it is compared with.
        any_L: share of tokens whose set of experts changes.
        first_L: share of tokens whose first choice changes.
    """

    dtype: str
    other_dtype: str
    any_L: np.ndarray
    first_L: np.ndarray


@dataclasses.dataclass(frozen=True)
class Saturation:
    """How early routes settled in training (OLMoE, arXiv 2409.02060, section 5.1).

    Attributes:
        steps: the steps of the earlier checkpoints.
        share_SL: share of a token's experts that the last checkpoint chooses too,
            |E(step) & E(last)| / k, averaged over tokens.
        chance: `share_SL` if experts were chosen at random, k / E.
    """

    steps: tuple[int, ...]
    share_SL: np.ndarray
    chance: float


@dataclasses.dataclass(frozen=True)
class RoutingAnalysis:
    """All figures of an analysis.

    Attributes:
        coactivation_LEE: P(j chosen | i chosen) at [l, i, j]; NaN if i is j or no token chose i.
            It is (k - 1) / (E - 1) by chance.
        by_label: specialization by each labelling of the text, such as source or file type.
        vocabulary: specialization by token id.
        flips: None if dtypes were not compared.
        saturation: None if there were no earlier checkpoints.
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
        """The number of layers, L."""
        return len(self.coactivation_LEE)

    def to_json(self) -> dict[str, Any]:
        """Returns all figures as JSON values: names without their dimensions, null for NaN."""
        return to_json(self)

    def lift(self) -> np.ndarray:
        """Returns how often two experts are chosen together relative to chance, as `find_lift`."""
        return find_lift(
            self.coactivation_LEE,
            self.balance.load_LE,
            self.num_experts_per_token,
            self.num_tokens,
        )


def analyze(
    loaded: Pretrained,
    text: RoutedText,
    *,
    earlier: Mapping[int, Callable[[], Pretrained]] | None = None,
    compares_dtypes: bool = True,
) -> RoutingAnalysis:
    """Routes a text and analyses the routes.

    All processes of a run must call this with the same arguments; all get the same result. Memory
    does not grow with the text: routes are counted batch by batch. To compare two models, both
    route every batch again.

    Args:
        earlier: step -> function that loads the same model at that earlier step onto the same
            mesh. Only one of them is held at a time.
        compares_dtypes: whether to route the text in another dtype too: float32, or bfloat16 if
            the model computes in float32.
    """
    E, dtype = loaded.config.model.num_experts, loaded.config.model.dtype
    with jax.set_mesh(loaded.mesh):
        num_labels = [1 + len(names) for names in text.label_names.values()]
        labelled = zip(text.batches(), text.labels, strict=True)
        routed = ((batch, labels, route(loaded.model, batch, dtype)) for batch, labels in labelled)
        counts = count_routes(
            routed,
            num_experts=E,
            vocab_size=loaded.config.model.vocab_size,
            num_labels=num_labels,
            rules=loaded.model.rules,
        )

        def compare(other: Transformer, other_dtype: str) -> OverlapCounts:
            return count_overlap(
                (batch, route(other, batch, other_dtype), route(loaded.model, batch, dtype))
                for batch in text.batches()
            )

        flips = _find_flips(loaded, compare) if compares_dtypes else None
        overlaps = {
            step: compare(load().model, dtype) for step, load in sorted((earlier or {}).items())
        }
    # Every token chooses the same number of experts.
    k = int(np.trace(counts.together_LEE[0])) // int(counts.tokens)
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
    """Computes all figures from counts; `label_names` and `pieces` are those of `RoutedText`."""
    k, E = num_experts_per_token, counts.first_LE.shape[-1]
    chosen_LE = np.diagonal(counts.together_LEE, axis1=1, axis2=2)
    return RoutingAnalysis(
        num_tokens=int(counts.tokens),
        num_experts=E,
        num_experts_per_token=k,
        balance=measure_balance(chosen_LE),
        coactivation_LEE=find_coactivation(counts.together_LEE),
        repetition=measure_repetition(counts, k),
        by_label=find_label_shares(counts, label_names, k),
        vocabulary=find_vocabulary_shares(counts, pieces),
        flips=flips,
        saturation=saturation,
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
    """Returns a model with the same weights that computes in `dtype`.

    The dtype of the weights stays. The mesh of the model must be set.
    """
    config = dataclasses.replace(
        loaded.config, model=dataclasses.replace(loaded.config.model, dtype=dtype)
    )
    shapes = jax.eval_shape(model_maker(config, loaded.kernels, loaded.model.rules))
    return jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(loaded.model))
