"""Times from published figures equal sums by hand."""

import numpy as np
import pytest

from mixtral_jax.plan.chips import CHIPS
from mixtral_jax.plan.collectives import Collective
from mixtral_jax.plan.roofline import make_roofline, transfer_seconds
from mixtral_jax.plan.topology import parse_topology
from mixtral_jax.plan.traffic import count_traffic
from tests.plan.programs import copies, traffic

BYTES = 10**9


def seconds_of(op: str, topology: str, members: list[tuple[int, ...]]) -> float:
    groups = np.arange(len(members))[None]
    collective = Collective(op, "expert", "forward", "f32[1]", 1, BYTES, groups)
    return transfer_seconds(collective, parse_topology(topology), np.array(members))


def test_the_slowest_part_bounds_the_step() -> None:
    roofline = make_roofline(
        CHIPS["v5p"],
        4,
        model_flops=4 * 459 * 10**12,
        hardware_flops=8 * 459 * 10**12,
        hbm_bytes=2765 * 10**8,
        interconnect_seconds=1.0,
        tokens=8000,
    )
    assert (
        roofline.compute_seconds,
        roofline.hbm_seconds,
        roofline.interconnect_seconds,
    ) == pytest.approx((2, 0.1, 1))
    assert roofline.bound_by == "compute"
    assert roofline.mfu_bound == pytest.approx(0.5)
    assert roofline.tokens_per_second_per_device == pytest.approx(1000)


def test_a_ring_sends_both_ways_round() -> None:
    ring = [(0, 0, z) for z in range(4)]
    assert seconds_of("all-gather", "v5p:4x4x4", ring) == pytest.approx(BYTES / 200e9)
    # The four chips of a ring are 4/3 hops from each other on average.
    exchange = seconds_of("ragged-all-to-all", "v5p:4x4x4", ring)
    assert exchange == pytest.approx(BYTES * 4 / 3 / 200e9)


def test_an_all_to_all_waits_for_the_links_of_the_dimension_in_which_it_goes_farthest() -> None:
    # 4 x 16 chips have rings of four, one hop apart on average, and rings of sixteen, four hops.
    plane = [(0, y, z) for y in range(4) for z in range(16)]
    assert seconds_of("all-to-all", "v5p:4x4x16", plane) == pytest.approx(
        BYTES * 4 * 64 / 63 / 200e9
    )
    assert seconds_of("all-gather", "v5p:4x4x16", plane) == pytest.approx(BYTES / 400e9)


def test_two_neighbours_share_one_link_and_strided_ones_pass_others() -> None:
    assert seconds_of("all-gather", "v5p:2x2x1", [(0, 0, 0), (0, 1, 0)]) == pytest.approx(
        BYTES / 100e9
    )
    assert seconds_of("all-gather", "v5p:4x4x8", [(0, 0, 0), (0, 0, 2)]) == pytest.approx(
        2 * BYTES / 100e9
    )


def test_a_cube_uses_six_links() -> None:
    cube = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    assert seconds_of("all-reduce", "v5p:4x4x4", cube) == pytest.approx(BYTES / 600e9)


def test_the_two_devices_of_a_chip_share_its_links() -> None:
    chips = [(0, 0, z) for z in range(4)]
    # The other device of each chip is in a group of its own, which sends as much over these links.
    assert seconds_of("all-gather", "tpu7x:4x4x4", chips) == pytest.approx(2 * BYTES / 200e9)
    both = [chip for chip in chips for _ in range(2)]
    assert seconds_of("all-gather", "tpu7x:4x4x4", both) == pytest.approx(BYTES / 200e9)
    # Each device has seven others. Six of them are on other chips, 4/3 hops away on average.
    assert seconds_of("all-to-all", "tpu7x:4x4x4", both) == pytest.approx(
        2 * BYTES * 6 / 7 * 4 / 3 / 200e9
    )
    assert seconds_of("all-reduce", "tpu7x:4x4x4", both[:2]) == pytest.approx(BYTES / 600e9)


def test_gpus_of_other_nodes_are_reached_over_the_network() -> None:
    assert seconds_of("all-to-all", "h100:8", [(i,) for i in range(8)]) == pytest.approx(
        BYTES / 450e9
    )
    two_nodes = [(i,) for i in range(16)]
    assert seconds_of("all-to-all", "h100:16", two_nodes) == pytest.approx(BYTES * 8 / 15 / 50e9)
    assert seconds_of("all-gather", "h100:16", two_nodes) == pytest.approx(BYTES * 14 / 15 / 450e9)


def test_traffic_counts_slices_and_updates_and_nothing_on_the_chip() -> None:
    row = 64 * 64 * 4
    # The slice reads and writes a row, the matmul writes one, the update reads and writes one, and
    # the index has 4 bytes.
    assert count_traffic(traffic(), routed_rows=0) == 2 * row + row + 2 * row + 4


def test_what_is_asynchronous_is_read_once_and_written_once() -> None:
    matrix = 64 * 64 * 4
    # The copy reads a matrix, which is multiplied on the chip. The gather reads it again, and
    # writes four times as much.
    assert count_traffic(copies(), routed_rows=0) == matrix + (1 + 4) * matrix
