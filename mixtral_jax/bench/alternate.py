"""Runs programs in turn, so that what changes on the machine changes for all of them."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Runs(Generic[Result]):
    """What the runs of one program returned, and how many seconds each took."""

    results: list[Result] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    def median(self, figure: Callable[[Result], float]) -> float:
        """The median of a figure of the results."""
        return statistics.median(map(figure, self.results))


def alternate(
    programs: Mapping[str, Callable[[], Result]],
    rounds: int,
    require_same: Callable[[Result, Result], None],
) -> dict[str, Runs[Result]]:
    """Runs two programs once to warm up, and then in turn, `rounds` times each.

    Args:
        require_same: gets the two results of the first run, and raises an error if the programs do
            not do the same work.
    """
    ours, theirs = (run() for run in programs.values())
    require_same(ours, theirs)
    runs: dict[str, Runs[Result]] = {name: Runs() for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            runs[name].results.append(run())
            runs[name].seconds.append(time.perf_counter() - start)
    return runs
