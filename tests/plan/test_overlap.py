"""What of each collective computation hides, counted by hand in a program with a schedule."""

import dataclasses
from pathlib import Path

import pytest

from mixtral_jax.plan.chips import CHIPS
from mixtral_jax.plan.collectives import list_collectives
from mixtral_jax.plan.hlo import parse_program
from mixtral_jax.plan.overlap import hidden_shares
from tests.plan.programs import fused_gather, overlapped

# One multiply-add of two 64 x 64 matrices takes a second, and memory takes no time.
CHIP = dataclasses.replace(
    CHIPS["v5p"], flops_per_second=2.0 * 64**3, hbm_bytes_per_second=float("inf")
)


def shares_if_each_takes(seconds: float) -> dict[str, float]:
    """The hidden share of each collective, if each takes this time on the links."""
    program = overlapped()
    found = list_collectives(program, {"expert": 4})
    shares = hidden_shares(program, found, [seconds] * len(found), CHIP, routed_rows=0)
    return {collective.op: share for collective, share in zip(found, shares, strict=True)}


@pytest.mark.parametrize(
    ("seconds", "gathered", "exchanged"),
    [
        # One matmul is between start and done of the all-gather. It and two more are between those
        # of the all-to-all. No matmul hides two collectives at a time.
        (0.5, 1.0, 1.0),
        (1.0, 1.0, 1.0),
        (2.0, 0.5, 1.0),
        (4.0, 0.25, 0.5),
    ],
)
def test_the_computation_between_start_and_done_hides_a_collective_once(
    seconds: float, gathered: float, exchanged: float
) -> None:
    shares = shares_if_each_takes(seconds)
    assert shares["all-gather"] == pytest.approx(gathered)
    assert shares["all-to-all"] == pytest.approx(exchanged)


def test_what_is_synchronous_or_waits_at_once_is_exposed() -> None:
    shares = shares_if_each_takes(0.5)
    assert shares["collective-permute"] == shares["all-reduce"] == 0


def test_a_collective_that_is_fused_with_a_matmul_counts_once_and_is_hidden_by_it() -> None:
    program = fused_gather()
    (gather,) = list_collectives(program, {"expert": 4})
    assert (gather.count, gather.bytes_per_device) == (1, 3 * 64 * 64 * 4)
    assert hidden_shares(program, [gather], [2.0], CHIP, routed_rows=0) == [pytest.approx(0.5)]


def test_a_collective_without_an_end_is_exposed() -> None:
    text = (Path(__file__).parent / "hlo/fused_gather.txt").read_text()
    program = parse_program(text.replace("async-collective-done.7", "fusion.7"))
    (gather,) = list_collectives(program, {"expert": 4})
    assert hidden_shares(program, [gather], [2.0], CHIP, routed_rows=0) == [0.0]


def test_a_collective_that_never_runs_has_nothing_to_hide() -> None:
    program = fused_gather()
    (gather,) = list_collectives(program, {"expert": 4})
    never = dataclasses.replace(
        gather,
        count=0,
        bytes_per_device=0,
        places=tuple(
            dataclasses.replace(place, count=0, bytes_per_device=0) for place in gather.places
        ),
    )
    assert hidden_shares(program, [never], [0.0], CHIP, routed_rows=0) == [0]
