"""Programs that are compared run in turn, warm, and only if they do the same work."""

import itertools
import types

import pytest

from mixtral_jax.bench import alternate as module
from mixtral_jax.bench.alternate import alternate


def test_two_programs_run_in_turn_and_the_first_run_of_each_is_not_counted(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def make(name, seconds):
        taken, numbers = iter(seconds), itertools.count()

        def run():
            order.append(name)
            clock[0] += next(taken)
            return next(numbers)

        return run

    programs = {"a": make("a", [100, 1, 5, 2]), "b": make("b", [200, 30, 10, 20])}
    runs = alternate(programs, 3, lambda a, b: order.append((a, b)))
    assert order == ["a", "b", (0, 0), "a", "b", "a", "b", "a", "b"]
    assert {name: program.seconds for name, program in runs.items()} == {
        "a": [1, 5, 2],
        "b": [30, 10, 20],
    }
    assert [program.median_seconds for program in runs.values()] == [2, 20]
    assert runs["a"].median(lambda number: 10 * number) == 20


def test_programs_that_do_not_do_the_same_work_are_not_timed():
    def require_same(mine, other):
        assert mine == other, "they do not do the same work"

    runs = itertools.count()
    with pytest.raises(AssertionError, match="not do the same work"):
        alternate({"a": lambda: next(runs), "b": lambda: next(runs)}, 3, require_same)
    assert next(runs) == 2
