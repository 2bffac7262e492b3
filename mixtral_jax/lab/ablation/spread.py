"""Means over seeds, and how sure one can be of them."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Spread:
    """The mean and the standard deviation (n - 1; None for a single value) of `count` values."""

    mean: float
    sd: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and the interval that holds the true mean with 95%
    confidence.

    The interval is None where there are fewer than two pairs.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def measure_spread(values: Sequence[float]) -> Spread | None:
    """Of no values, None."""
    if not values:
        return None
    return Spread(
        float(np.mean(values)),
        float(np.std(values, ddof=1)) if len(values) > 1 else None,
        len(values),
    )


def compare(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """`values` less `reference`, both by seed: what a seed does to both cancels. Without a common
    seed, None.

    The interval is that of Student's t for paired samples; it takes differences to be normally
    distributed.
    """
    differences = [value - reference[seed] for seed, value in values.items() if seed in reference]
    spread = measure_spread(differences)
    if spread is None:
        return None
    if spread.sd is None:
        return Difference(spread.mean, None, None, spread.count)
    reach = (
        float(stats.t.ppf((1 + CONFIDENCE) / 2, spread.count - 1)) * spread.sd / spread.count**0.5
    )
    return Difference(spread.mean, spread.mean - reach, spread.mean + reach, spread.count)
