"""Turns counts of routes into figures: balance, experts chosen together, repetition.

Each figure that needs one comes with its value by chance. Everything here is numpy on the host.
"""

import dataclasses
import math

import numpy as np

from mixtral_jax.lab.routing.counts import RouteCounts
from mixtral_jax.model.routing_metrics import load_metrics

# Number of iterations that fit the weights of `find_lift`. It is enough even if one expert is in
# all pairs; its weight then grows without bound.
_NUM_FIT_ITERATIONS = 1000
# Pairs of experts that fewer tokens chose together are left out of `find_lift`.
MIN_TOKENS_PER_PAIR = 5


@dataclasses.dataclass(frozen=True)
class Balance:
    """How evenly the routes of each layer are spread over its experts.

    Attributes:
        load_LE: share of routes to each expert; sums to 1 in each layer.
        coefficient_of_variation_L: standard deviation of the load over its mean.
        load_entropy_L: entropy of the load over log E; 1 if even.
        max_violation_L: largest load over the mean load, minus 1; 0 if even.
    """

    load_LE: np.ndarray
    coefficient_of_variation_L: np.ndarray
    load_entropy_L: np.ndarray
    max_violation_L: np.ndarray


@dataclasses.dataclass(frozen=True)
class Repetition:
    """How often consecutive tokens of a document choose the same experts.

    The figures are those of Mixtral (arXiv 2401.04088), Table 5.

    Attributes:
        first_L: share of pairs of consecutive tokens with the same first choice.
        any_L: share of pairs that have any expert in common.
        chance_first: `first_L` if experts were chosen at random.
        chance_any: `any_L` if experts were chosen at random.
        chance_first_of_load_L: `first_L` if first choices were as frequent as measured, but
            independent of the previous token.
        num_pairs: number of pairs.
    """

    first_L: np.ndarray
    any_L: np.ndarray
    chance_first: float
    chance_any: float
    chance_first_of_load_L: np.ndarray
    num_pairs: int


def measure_balance(routes_LE: np.ndarray) -> Balance:
    """Computes the balance from the number of routes to each expert."""
    metrics = load_metrics(routes_LE.astype(np.int64))
    return Balance(
        load_LE=metrics["load"],
        coefficient_of_variation_L=metrics["coefficient_of_variation"],
        load_entropy_L=metrics["load_entropy"],
        max_violation_L=metrics["max_violation"],
    )


def measure_repetition(counts: RouteCounts, num_experts_per_token: int) -> Repetition:
    """Computes the repetition of consecutive choices from counts."""
    first_LE = divide(counts.first_LE, counts.tokens)
    return Repetition(
        first_L=divide(counts.same_first_L, counts.neighbours),
        any_L=divide(counts.any_shared_L, counts.neighbours),
        chance_first=1 / first_LE.shape[-1],
        chance_any=chance_of_common(first_LE.shape[-1], num_experts_per_token),
        chance_first_of_load_L=np.sum(first_LE**2, axis=-1),
        num_pairs=int(counts.neighbours),
    )


def find_coactivation(together_LEE: np.ndarray) -> np.ndarray:
    """Returns P(j chosen | i chosen), [L, i, j], from the number of tokens that chose both.

    All pairs of a token's experts count, not only those of neighbouring ranks. NaN if i is j, or
    if no token chose i.
    """
    chosen_LE1 = np.diagonal(together_LEE, axis1=1, axis2=2)[..., None]
    probability_LEE = divide(together_LEE, chosen_LE1)
    return np.where(np.eye(together_LEE.shape[-1], dtype=bool), np.nan, probability_LEE)


def find_lift(
    coactivation_LEE: np.ndarray,
    load_LE: np.ndarray,
    num_experts_per_token: int,
    num_tokens: int,
) -> np.ndarray:
    """Returns P(i and j chosen) relative to what their popularity alone predicts, [L, i, j].

    The prediction is w_i w_j, with weights w such that each expert is in the measured number of
    pairs (quasi-independence). NaN where `coactivation_LEE` is, and for pairs of fewer than
    `MIN_TOKENS_PER_PAIR` tokens, both as measured and as predicted.
    """
    k = num_experts_per_token
    chosen_LE = k * load_LE
    weight_LE = chosen_LE
    for _ in range(_NUM_FIT_ITERATIONS):
        others_LE = weight_LE.sum(axis=-1, keepdims=True) - weight_LE
        weight_LE = np.sqrt(weight_LE * (k - 1) * chosen_LE / others_LE)
    predicted_LEE = weight_LE[:, :, None] * weight_LE[:, None]
    both_LEE = coactivation_LEE * chosen_LE[..., None]
    is_rare_LEE = np.maximum(predicted_LEE, both_LEE) * num_tokens < MIN_TOKENS_PER_PAIR
    return divide(both_LEE, np.where(is_rare_LEE, 0, predicted_LEE))


def chance_of_common(num_experts: int, num_experts_per_token: int) -> float:
    """Returns the probability that two tokens share an expert if each chooses k of E at random.

    This is 1 - C(E - k, k) / C(E, k).
    """
    E, k = num_experts, num_experts_per_token
    return 1 - math.comb(E - k, k) / math.comb(E, k)


def pick_layers(num_layers: int, max_layers: int) -> list[int]:
    """Picks at most `max_layers` evenly spaced layers, the first and the last among them."""
    if num_layers <= max_layers:
        return list(range(num_layers))
    return sorted(
        {round(place * (num_layers - 1) / (max_layers - 1)) for place in range(max_layers)}
    )


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divides in float64; NaN where `whole` is 0."""
    return part / np.where(whole > 0, whole, np.nan)
