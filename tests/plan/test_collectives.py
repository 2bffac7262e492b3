"""Collectives of a program: groups in all forms, axes, passes, bytes and counts."""

import numpy as np
import pytest

from mixtral_jax.plan.collectives import list_collectives
from mixtral_jax.plan.hlo import Instruction, parse_program
from mixtral_jax.plan.replica_groups import name_axes, name_permuted_axes, read_groups
from tests.plan.programs import RAGGED, asynchronous, ragged

MESH = {"data": 1, "fsdp": 2, "expert": 4, "context": 1, "tensor": 1}


def groups_of(attributes: str, num_devices: int = 8) -> list[list[int]]:
    return read_groups(
        Instruction("x", "all-reduce", (), (), attributes, False), num_devices
    ).tolist()


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (", replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (", replica_groups={}, x={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (", replica_groups=[2,4]<=[8], x={1}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (", replica_groups=[4,2]<=[2,4]T(1,0), x={1}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            ", replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x={1}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        (
            ", replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_1','axis_2'}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        (
            ", replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        (", replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (", replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (", replica_groups=mesh['a'=4,'b'=2] {'a':(2)2,'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (", source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_are_read_in_every_form(attributes: str, expected: list[list[int]]) -> None:
    assert groups_of(attributes) == expected


def test_groups_that_cannot_be_read_are_an_error() -> None:
    with pytest.raises(ValueError, match="replica groups of x"):
        groups_of(", replica_groups=something")


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ([[0, 1, 2, 3], [4, 5, 6, 7]], "expert"),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], "fsdp"),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], "fsdp,expert"),
        ([[0, 1], [2, 3], [4, 5], [6, 7]], None),
    ],
)
def test_groups_are_named_by_the_mesh_axes_they_span(
    groups: list[list[int]], axis: str | None
) -> None:
    assert name_axes(np.array(groups), MESH) == axis


def test_a_permutation_is_named_by_the_axes_it_moves_along() -> None:
    assert name_permuted_axes(np.array([[0, 1], [1, 2], [2, 3], [3, 0]]), MESH) == "expert"
    assert name_permuted_axes(np.array([[0, 4], [4, 0]]), MESH) == "fsdp"
    assert name_permuted_axes(np.array([[0, 0], [4, 4]]), MESH) is None


def test_a_loop_of_ragged_exchanges_is_counted_with_its_balanced_bytes() -> None:
    found = {(c.op, c.operand): c for c in list_collectives(ragged(), MESH)}
    out = found["ragged-all-to-all", "bf16[512,2,128]"]
    home = found["ragged-all-to-all", "bf16[1024,2,128]"]
    gather = found["all-gather", "bf16[1,2,128,512]"]
    # A device has 512 rows of 256 numbers and keeps a quarter. The buffer size does not matter.
    assert out.bytes_per_device == home.bytes_per_device == 3 * 512 * 256 * 2 * 3 // 4
    assert (out.axis, out.pass_, out.count) == ("expert", "forward", 3)
    assert (home.axis, home.pass_, home.count) == ("expert", "rematerialized", 3)
    assert (gather.axis, gather.count, gather.bytes_per_device) == (
        "fsdp",
        3,
        3 * 2 * 128 * 512 * 2,
    )


def test_a_collective_without_metadata_has_the_pass_of_its_loop() -> None:
    (total,) = (c for c in list_collectives(ragged(), MESH) if c.op == "all-reduce")
    assert (total.axis, total.pass_) == ("fsdp,expert", "backward")
    assert total.bytes_per_device == 3 * 2 * 7 * 256 * 256 * 2 // 8


def test_a_start_and_its_done_are_one_and_a_fused_reduce_scatter_is_one() -> None:
    found = {c.op: c for c in list_collectives(asynchronous(), {"data": 2, "expert": 2})}
    assert set(found) == {"all-gather", "reduce-scatter", "collective-permute"}
    assert [c.count for c in found.values()] == [1, 1, 1]
    assert found["all-gather"].bytes_per_device == 3 * 16 * 32 * 4
    assert found["reduce-scatter"].bytes_per_device == 64 * 32 * 4 * 3 // 4
    assert found["reduce-scatter"].pass_ == "backward"
    assert found["collective-permute"].axis == "expert"


def test_a_collective_in_a_loop_of_unknown_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="known only at run time"):
        list_collectives(parse_program(RAGGED.replace("direction=LT", "direction=GT")), MESH)
