"""Capacity, against the rule written as a loop."""

import math
from fractions import Fraction

import numpy as np
import pytest

from mixtral_jax.model.capacity import fits_capacity
from tests.model.routed_layer import E, T, config_of, inputs, run, taken_by


def test_an_expert_keeps_its_heaviest_routes_of_each_sequence():
    rng = np.random.default_rng(0)
    B, T, A, E, factor = 4, 30, 2, 6, 1.1
    experts = np.stack([[rng.permutation(E)[:A] for _ in range(T)] for _ in range(B)]).astype(
        np.int32
    )
    weights = rng.integers(1, 5, (B, T, A)).astype(np.float32) / 5  # Many ties.
    is_real = np.arange(T)[None] < np.array([[30], [17], [1], [0]])
    got = np.asarray(fits_capacity(experts, weights, is_real, E, factor))
    for b in range(B):
        limit = math.ceil(Fraction(str(factor)) * A * int(is_real[b].sum()) / E)
        for e in range(E):
            routes = [
                (-weights[b, t, a], t, a)
                for t in range(T)
                for a in range(A)
                if experts[b, t, a] == e and is_real[b, t]
            ]
            kept = {(t, a) for _, t, a in sorted(routes)[:limit]}
            assert {(t, a) for _, t, a in routes if got[b, t, a]} == kept


def test_capacity_of_a_sequence_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(1)
    experts = rng.integers(0, 2, (3, 16, 1)).astype(np.int32)
    weights = rng.random((3, 16, 1)).astype(np.float32)
    real = np.ones((3, 16), bool)
    together = fits_capacity(experts, weights, real, 2, 0.5)
    alone = fits_capacity(experts[1:2], weights[1:2], real[1:2], 2, 0.5)
    np.testing.assert_array_equal(together[1:2], alone)


def test_rounding_does_not_decide_between_routes_of_equal_weight():
    weights = np.full((1, 8, 1), 0.42817664, np.float32)
    weights[0, 5:] += 2.0**-24
    kept = fits_capacity(np.zeros((1, 8, 1), np.int32), weights, np.ones((1, 8), bool), 2, 1.0)
    np.testing.assert_array_equal(np.asarray(kept)[0, :, 0], np.arange(8) < 4)


FACTORS = {"dispatch__capacity_factor": 0.5, "dispatch__eval_capacity_factor": 1.0}


@pytest.mark.parametrize(("is_training", "factor"), [(True, 0.5), (False, 1.0)])
def test_training_and_evaluation_have_capacities_of_their_own(
    is_training: bool, factor: float
) -> None:
    routing = run(config_of({}, **FACTORS), is_training=is_training).routing
    num_tokens = np.asarray(inputs()[1].is_real_BT).sum(axis=1)
    kept = taken_by(routing).sum(axis=1)
    limit = np.ceil(factor * 2 * num_tokens / E)
    assert (kept <= limit[:, None]).all() and (kept == limit[:, None]).any()


def test_the_last_routes_are_dropped_by_position() -> None:
    routing = run(config_of({}, **FACTORS, dispatch__drop="position")).routing
    # The first sequence has no padding.
    chosen = (np.asarray(routing.experts_BTA)[0][..., None] == np.arange(E)).any(axis=1)
    expected = chosen & (np.cumsum(chosen, axis=0) <= np.ceil(0.5 * 2 * T / E))
    np.testing.assert_array_equal(taken_by(routing)[0], expected)
