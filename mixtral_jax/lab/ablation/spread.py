"""Means over seeds with their uncertainty, and how these are written."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# Shown in place of a value that does not exist.
NOTHING = "-"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of `count` values.

    `sd` is the sample standard deviation (with n - 1); None for a single value.
    """

    mean: float
    sd: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95% confidence interval.

    `low` and `high` are None for a single pair.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def is_clear(self) -> bool:
        """True if 0 lies outside the interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def measure_spread(values: Sequence[float]) -> Spread | None:
    """Returns the spread of some values, or None if there are none."""
    if not values:
        return None
    return Spread(
        float(np.mean(values)),
        float(np.std(values, ddof=1)) if len(values) > 1 else None,
        len(values),
    )


def compare(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Returns the difference `values - reference` over the seeds that both have, or None.

    Both map seeds to values. Pairing by seed cancels what a seed changes in both. The interval is
    that of Student's t-test for paired samples, which assumes normally distributed differences.
    """
    differences = [value - reference[seed] for seed, value in values.items() if seed in reference]
    spread = measure_spread(differences)
    if spread is None:
        return None
    if spread.sd is None:
        return Difference(spread.mean, None, None, spread.count)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, spread.count - 1))
    margin = quantile * spread.sd / spread.count**0.5
    return Difference(spread.mean, spread.mean - margin, spread.mean + margin, spread.count)


def show_spread(spread: Spread | None, digits: int) -> str:
    """Writes mean ± standard deviation."""
    if spread is None:
        return NOTHING
    return f"{spread.mean:.{digits}f}" + ("" if spread.sd is None else f" ± {spread.sd:.{digits}f}")


def show_difference(difference: Difference | None, digits: int) -> str:
    """Writes the mean with its sign, then the interval in brackets."""
    if difference is None:
        return NOTHING
    mean = f"{difference.mean:+.{digits}f}"
    if difference.low is None or difference.high is None:
        return mean
    return f"{mean} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
