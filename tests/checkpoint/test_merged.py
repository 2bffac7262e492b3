"""Adapters that are merged as a weight is read give W + scaling * A B, rounded once."""

import numpy as np
import pytest

from mixtral_jax.checkpoint.files.stored import DTYPES, blocks_of
from mixtral_jax.checkpoint.merged import merge
from tests.checkpoint.folders import store_array

# Shapes of W, A and B, and the equation of A B.
PROJECTIONS = {
    "query": ((2, 8, 3, 4), (2, 8, 5), (2, 5, 3, 4), "LDr,LrNH->LDNH"),
    "out": ((2, 3, 4, 8), (2, 3, 4, 5), (2, 5, 8), "LNHr,LrD->LNHD"),
    "experts": ((2, 3, 6, 7), (2, 3, 6, 5), (2, 3, 5, 7), "LEDr,LErF->LEDF"),
}


@pytest.mark.parametrize(("w", "a", "b", "equation"), PROJECTIONS.values(), ids=PROJECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_is_the_sum_in_float32_rounded_once(w, a, b, equation, dtype):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=w).astype(DTYPES[dtype])
    # Eighths, so that products and sums of the adapter are exact.
    low, high = (rng.integers(-8, 9, size=shape).astype(np.float32) / 8 for shape in (a, b))
    delta = np.float32(1.5) * np.einsum(equation, low, high)
    expected = (weight.astype(np.float32) + delta).astype(DTYPES[dtype])
    merged = merge(*map(store_array, (weight, low, high)), 1.5)
    assert merged.dtype == DTYPES[dtype]
    for block in (merged.whole, *blocks_of(w, (1, 2, 3, 2))):
        np.testing.assert_array_equal(merged.read(block), expected[block])
    if dtype == "bfloat16":
        rounded_twice = weight + delta.astype(DTYPES[dtype])
        assert not np.array_equal(rounded_twice, expected)
