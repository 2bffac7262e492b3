"""Capacity, against the rule written as a loop."""

import math
from fractions import Fraction

import numpy as np

from mixtral_jax.model.capacity import fits_capacity


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
