"""The collectives of a compiled step: what each sends, over which mesh axes, in which pass.

Bytes are those that leave one device. With P devices in a group and an operand of B bytes on each:

    all-gather          (P - 1) B: every byte goes to P - 1 other devices
    reduce-scatter      (P - 1) / P B: one share for each other device
    all-reduce          2 (P - 1) / P B: a reduce-scatter and an all-gather
    all-to-all          (P - 1) / P B
    ragged-all-to-all   (P - 1) / P of the rows under balanced routing, not of the buffer
    collective-permute  B

These are the bytes of the algorithms that send the least (Chan et al., "Collective communication:
theory, practice, and experience", 2007, table 1).
"""

import dataclasses
from typing import Literal

import numpy as np

from mixtral_jax.plan.hlo import Array, Computation, Instruction, Program
from mixtral_jax.plan.replica_groups import name_axes, name_permuted_axes, read_groups

Pass = Literal["forward", "backward", "rematerialized"]

OPCODES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Place:
    """One instruction of the program, how often a step runs it, and what it sends in a step."""

    computation: str
    instruction: str
    count: int
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a step with the same op, axis, pass and operand.

    Attributes:
        operand: the largest array that one of them sends, and `+N` if it sends N others with it.
        count: how often a step runs them.
        bytes_per_device: bytes that leave a device in a step, over all `count`.
        groups: indices of devices in the order of the mesh, [groups, members].
        places: the instructions of the program.
    """

    op: str
    axis: str | None
    pass_: Pass
    operand: str
    count: int
    bytes_per_device: int
    groups: np.ndarray = dataclasses.field(compare=False, repr=False)
    places: tuple[Place, ...] = dataclasses.field(default=(), compare=False, repr=False)


def list_collectives(program: Program, mesh_shape: dict[str, int]) -> list[Collective]:
    """All collectives of a program over several devices, those that send the most first.

    Raises:
        ValueError: a collective is in a loop whose length is known only at run time.
    """
    num_devices = int(np.prod(list(mesh_shape.values())))
    found: dict[tuple, Collective] = {}
    for computation, instruction, times in program.instructions():
        op = instruction.opcode.removesuffix("-start")
        if op not in OPCODES or _is_continued(program, computation):
            continue
        if op == "all-reduce" and _is_scattered(program, computation, instruction):
            op = "reduce-scatter"
        if times is None:
            raise ValueError(
                f"{instruction.name} is in a loop whose length is known only at run time"
            )
        groups = read_groups(instruction, num_devices)
        if groups.shape[-1] < 2 or not groups.size:
            continue
        name = name_permuted_axes if op == "collective-permute" else name_axes
        axis, pass_ = name(groups, mesh_shape), pass_of(program, computation, instruction)
        sends = _bytes_sent(op, computation, instruction, groups.shape[1]) * times
        operand = _describe(_operands(op, computation, instruction))
        key = (op, axis, pass_, operand)
        place = Place(computation.name, instruction.name, times, round(sends))
        places = (*(found[key].places if key in found else ()), place)
        count = sum(place.count for place in places)
        total = sum(place.bytes_per_device for place in places)
        found[key] = Collective(op, axis, pass_, operand, count, total, groups, places)
    return sorted(found.values(), key=lambda collective: -collective.bytes_per_device)


def pass_of(program: Program, computation: Computation, instruction: Instruction) -> Pass:
    """The pass of an instruction, from the path of transformations in its metadata.

    `jax.checkpoint` and `jax.grad` write that path. If XLA joined several operations, the largest
    operand decides; if it dropped the path, the path of the enclosing loop decides. An operation
    that was not differentiated, such as a sum over the batch, counts as forward. If XLA itself
    decides to recompute, it marks that in the instruction's name.
    """
    path = _path(program, computation, instruction)
    if "rematted_computation" in path or ".remat" in instruction.name:
        return "rematerialized"
    return "backward" if "transpose(" in path else "forward"


def _path(program: Program, computation: Computation, instruction: Instruction) -> str:
    if len(instruction.operands) > 1 and instruction.opcode.startswith("all-reduce"):
        heaviest = max(computation.operands(instruction), key=lambda operand: operand.result_bytes)
        while not heaviest.op_name and heaviest.opcode in (
            "copy-done",
            "copy-start",
            "copy",
            "bitcast",
        ):
            (heaviest,) = computation.operands(heaviest)
        if heaviest.op_name:
            return heaviest.op_name
    while not instruction.op_name and computation.name in program.callers:
        computation, instruction = program.callers[computation.name]
    return instruction.op_name


def _operands(op: str, computation: Computation, instruction: Instruction) -> list[Array]:
    """The types of the arrays that a collective sends.

    A ragged-all-to-all has more operands: the rows, the buffer to fill, and offsets and sizes. It
    only sends the rows.
    """
    arrays = [
        array for operand in computation.operands(instruction) for array in operand.results[:1]
    ]
    return arrays[:1] if op == "ragged-all-to-all" else arrays


def _describe(operands: list[Array]) -> str:
    """The largest operand, and how many others are sent with it."""
    largest = max(operands, key=lambda array: array.num_bytes)
    return f"{largest} +{len(operands) - 1}" if len(operands) > 1 else str(largest)


def _bytes_sent(op: str, computation: Computation, instruction: Instruction, members: int) -> float:
    operand = sum(array.num_bytes for array in _operands(op, computation, instruction))
    if op == "all-gather":
        return (members - 1) * operand
    if op == "all-reduce":
        return 2 * (members - 1) / members * operand
    if op == "ragged-all-to-all":
        # On the way to the experts, the operand has the rows, and the buffer to fill is larger. On
        # the way back, the operand is that buffer, and the array to fill has the rows. So the
        # smaller of the two is what moves.
        buffer = computation.operands(instruction)[1].results[0]
        return (members - 1) / members * min(operand, buffer.num_bytes)
    if op in ("reduce-scatter", "all-to-all"):
        return (members - 1) / members * operand
    return operand


def _is_continued(program: Program, computation: Computation) -> bool:
    """True for a part of a collective that an earlier fusion has started.

    XLA:TPU writes such a collective into each of its fusions: `async-collective-start`, fusions
    with computation, and `async-collective-done`.
    """
    caller = program.callers.get(computation.name)
    if caller is None or caller[1].opcode != "fusion":
        return False
    is_in_matmul = computation.name.startswith("async_collective_fusion")
    return is_in_matmul or caller[1].name.startswith("async-collective-done")


def _is_scattered(program: Program, computation: Computation, instruction: Instruction) -> bool:
    """True for a reduce-scatter that XLA:TPU writes as a fusion of an all-reduce and a slice."""
    caller = program.callers.get(computation.name)
    is_fused = caller is not None and caller[1].opcode == "fusion"
    return is_fused and computation.root.result_bytes < instruction.result_bytes
