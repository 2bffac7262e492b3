"""Counts the bytes that a compiled step reads from and writes to a device's memory (HBM).

Each instruction reads its operands and writes its results once each time it runs. Kernels that read
a tile twice, and caches that save a read, are not modelled. If only a slice of an operand is used,
the slice counts; if an array is updated in place, the update counts. Arrays in on-chip memory count
nothing.
"""

from mixtral_jax.plan.flops import is_ragged_dot
from mixtral_jax.plan.hlo import Computation, Instruction, Program

# These instructions move nothing, or the computation that they run is counted by itself.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "call-start",
    "call-done",
    "after-all",
    "add-dependency",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "iota",
    "async-start",
    "async-done",
}
_SLICES = ("slice", "dynamic-slice", "gather")


def count_traffic(program: Program, routed_rows: int) -> int:
    """The bytes that one device reads and writes in a step.

    A loop whose length is known only at run time counts once.

    Args:
        routed_rows: the rows of a grouped matmul under balanced routing, over all experts of a
            device.
    """
    fused = {called for called, (_, caller) in program.callers.items() if caller.opcode == "fusion"}
    total = 0.0
    for computation, instruction, times in program.instructions():
        if computation.name not in fused:
            total += instruction_traffic(program, computation, instruction, routed_rows) * (
                1 if times is None else times
            )
    return round(total)


def instruction_traffic(
    program: Program, computation: Computation, instruction: Instruction, routed_rows: int
) -> float:
    """The bytes of one run of an instruction, without those of computations that it runs."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-update") or "AllocateBuffer" in instruction.rest:
        return 0
    operands = [_in_hbm(operand) for operand in computation.operands(instruction)]
    result = _in_hbm(instruction)
    # The -start of an asynchronous instruction reads, and its -done writes. The type of the -start
    # lists all arrays that take part.
    if opcode.endswith("-start"):
        return sum(operands)
    if opcode.endswith("-done"):
        return result
    if opcode == "fusion":
        called = instruction.computation("calls")
        assert called, instruction.rest[:200]
        return _fusion_traffic(program.computations[called], operands, result)
    if is_ragged_dot(instruction):
        R = instruction.results[0].dimensions[0]
        share = min(1, routed_rows / R)
        return sum(operands[:-2]) + operands[-1] + share * (operands[-2] + result)
    if opcode == "ragged-all-to-all":
        return 2 * min(operands[0], operands[1])
    if opcode in _SLICES:
        return 2 * result
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * operands[-1]
    return sum(operands) + result


def _fusion_traffic(fused: Computation, operands: list[int], result: int) -> int:
    """Bytes in and out of a fusion. Sliced inputs count as slices, updated arrays as updates."""
    users: dict[str, list[Instruction]] = {}
    for instruction in fused.instructions.values():
        if instruction.opcode not in ("parameter", "constant"):
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)

    updated = {
        root.operands[0]: fused.instructions[root.operands[1]].result_bytes
        for root in _updates(fused)
    }
    total = 0
    for number, parameter in fused.parameters().items():
        reads = _reads(parameter.name, users, set(updated))
        total += operands[number] if reads is None else min(operands[number], reads)
    if updated and result:
        return total + min(result, sum(updated.values()))
    return total + result


def _reads(name: str, users: dict[str, list[Instruction]], updated: set[str]) -> int | None:
    """The bytes that a fusion reads of an input.

    They are the slices if only slices are used, 0 if the input is updated in place, otherwise None.
    """
    total = 0
    for user in users.get(name, []):
        if user.opcode == "dynamic-update-slice" and name in updated and user.operands[0] == name:
            continue
        if user.opcode == "bitcast":
            inner = _reads(user.name, users, updated)
            if inner is None:
                return None
            total += inner
        elif user.opcode in _SLICES and user.operands[0] == name:
            total += user.result_bytes
        else:
            return None
    return total


def _updates(fused: Computation) -> list[Instruction]:
    """The in-place updates among the results of a fusion."""
    root = fused.root
    results = fused.operands(root) if root.opcode == "tuple" else [root]
    while any(result.opcode == "bitcast" for result in results):
        results = [
            fused.instructions[r.operands[0]] if r.opcode == "bitcast" else r for r in results
        ]
    return [result for result in results if result.opcode == "dynamic-update-slice"]


def _in_hbm(instruction: Instruction) -> int:
    return sum(array.num_bytes for array in instruction.results if array.is_in_hbm)
