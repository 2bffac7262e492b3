"""How much of each collective computation hides, by the schedule of the compiled program.

An asynchronous collective is two instructions, a start and a done. The text of a program lists
instructions in the order in which a device runs them, so what stands between the two hides the
collective, for as long as it would take at the published rates of the chip. Each instruction hides
one collective at a time. A collective that is one instruction is exposed.
"""

import dataclasses

from mixtral_jax.plan.chips import Chip
from mixtral_jax.plan.collectives import OPCODES, Collective, Place
from mixtral_jax.plan.flops import instruction_flops
from mixtral_jax.plan.hlo import Computation, Instruction, Program
from mixtral_jax.plan.traffic import instruction_traffic

_STARTS = ("async-start", "call-start")
# XLA:TPU also writes fusions with these names.
_FUSED_START, _FUSED_DONE = "async-collective-start", "async-collective-done"


def hidden_shares(
    program: Program,
    collectives: list[Collective],
    collective_seconds: list[float],
    chip: Chip,
    routed_rows: int,
) -> list[float]:
    """The share of each collective's time that computation hides, from 0 to 1.

    Args:
        collective_seconds: the time of each of `collectives` on the links.
        routed_rows: as for `count_traffic`.
    """
    clock = _Clock(program, chip, routed_rows)
    # What is left of the time of each instruction that has hidden something.
    left: dict[tuple[str, str], float] = {}
    shares = []
    for collective, seconds in zip(collectives, collective_seconds, strict=True):
        hidden = 0.0
        for place in collective.places:
            # Every byte of a kind takes as long as any other.
            sent_by_all = place.count * collective.bytes_per_device
            missing = once = seconds * place.bytes_per_device / max(1, sent_by_all)
            for computation, instruction in _between(program, place):
                key = (computation.name, instruction.name)
                room = left.setdefault(key, clock.seconds(computation, instruction))
                taken = min(room, missing)
                left[key] -= taken
                missing -= taken
            hidden += (once - missing) * place.count
        shares.append(min(1.0, hidden / seconds) if seconds else 0.0)
    return shares


def _between(program: Program, place: Place) -> list[tuple[Computation, Instruction]]:
    """The instructions that run while a collective is under way; none if it is synchronous."""
    computation = program.computations[place.computation]
    start = computation.instructions[place.instruction]
    if not start.opcode.endswith("-start"):
        # The collective may be inside an asynchronous call.
        caller = program.callers.get(computation.name)
        if caller is None:
            return []
        computation, start = caller
        if start.opcode not in _STARTS and not start.name.startswith(_FUSED_START):
            return []
    is_fused = start.opcode == "fusion"
    fused_done = start.name.replace(_FUSED_START, _FUSED_DONE)
    chain, is_after, between = {start.name}, False, []
    for instruction in computation.instructions.values():
        if instruction.name == start.name:
            is_after = True
        elif is_fused and instruction.name == fused_done:
            return between
        elif is_after and not is_fused and chain & set(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return between
            chain.add(instruction.name)
        elif is_after:
            between.append((computation, instruction))
    return []  # Without its end, nothing is known to hide it.


@dataclasses.dataclass(frozen=True)
class _Clock:
    """The time that instructions would take if they computed and read at the published rates."""

    program: Program
    chip: Chip
    routed_rows: int

    def seconds(self, computation: Computation, instruction: Instruction) -> float:
        """The time of one run, with that of the computations that it runs. Collectives take 0."""
        if instruction.opcode.removesuffix("-start").removesuffix("-done") in OPCODES:
            return 0.0
        if instruction.opcode == "fusion":
            called = self.program.computations[instruction.computation("calls") or ""]
            flops = sum(self._flops(called, inner) for inner in called.instructions.values())
        else:
            flops = self._flops(computation, instruction)
        bytes_moved = instruction_traffic(self.program, computation, instruction, self.routed_rows)
        own = max(flops / self.chip.flops_per_second, bytes_moved / self.chip.hbm_bytes_per_second)
        if instruction.opcode == "fusion":
            return own
        return own + sum(
            (1 if trips is None else trips) * self._all_seconds(self.program.computations[called])
            for called, trips in self.program.calls(computation, instruction)
        )

    def _all_seconds(self, computation: Computation) -> float:
        return sum(self.seconds(computation, inner) for inner in computation.instructions.values())

    def _flops(self, computation: Computation, instruction: Instruction) -> int:
        return instruction_flops(computation, instruction, self.routed_rows)
