"""The time of a step by parts of the model, from a profile and the compiled program.

The parts are scopes: `jax.named_scope` in the model and in the step, which a compiled program keeps
in the names of its operations.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mixtral_jax.bench.profile import Profile, Span, profile_steps
from mixtral_jax.plan.hlo import Computation, Instruction, Program, parse_program

NUM_PROFILED_STEPS = 3
# Scope -> the part that it belongs to. Of scopes within each other, the innermost counts.
PART_OF_SCOPE = {
    "attention": "attention",
    "experts": "experts",
    "router": "router and dispatch",
    "dispatch": "router and dispatch",
    "embeddings": "embeddings and loss",
    "loss": "embeddings and loss",
    "optimizer": "optimizer",
}
REST = "copies and rest"
NOT_SEEN = "not seen by the profiler"
HOST = "gap: the devices wait"
PARTS = (*dict.fromkeys(PART_OF_SCOPE.values()), REST, NOT_SEEN)

_SCOPE = re.compile(rf"\b({'|'.join(PART_OF_SCOPE)})\b")
_COPIES = ("copy", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class StepParts:
    """Where the time of a step goes, in seconds, as means over the profiled steps.

    Attributes:
        step: from when the host begins the step to when it has the result.
        device: from the start of the first operation of the step to the end of the last.
        parts: the time on the devices by part. They add up to `device`.
    """

    step: float
    device: float
    parts: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The figures by name, with what the host adds to the time of the devices."""
        gap = self.step - self.device
        return {
            "step_seconds": self.step,
            "device_seconds": self.device,
            "gap_seconds": gap,
            "part_seconds": self.parts,
        }


def measure_parts(compiled: jax.stages.Compiled, run_step: Callable[[], object]) -> StepParts:
    """Profiles steps of a compiled program; `run_step()` runs one and waits for it."""
    text = compiled.as_text() or ""
    module = re.match(r"HloModule ([\w.\-]+)", text)
    assert module, "the text of the program does not begin with its name"
    return split_time(
        profile_steps(run_step, NUM_PROFILED_STEPS, module.group(1)), parse_program(text)
    )


def split_time(profile: Profile, program: Program) -> StepParts:
    """Divides the time of the steps into parts.

    While several operations run, on several devices or threads, each gets an equal share of that
    time. An operation that only runs others, such as a loop, gets none if any of them was seen. The
    profiler misses what XLA:CPU leaves to threads of its own (some gradients of weights): time in
    which no operation was seen is a part too.
    """
    names = name_parts(program)
    seen = {span.name for span in profile.operations}
    frames = {name for name, inner in _find_inner(program).items() if seen & inner.keys()}
    parts, device = dict.fromkeys(PARTS, 0.0), 0.0
    for step in profile.steps:
        inside = [op for op in profile.operations if step.start <= op.start < step.end]
        first = min((op.start for op in inside), default=step.start)
        last = max((op.end for op in inside), default=step.end)
        device += last - first
        working = [op for op in inside if op.name not in frames]
        for name, seconds in _share(working, first, last):
            parts[names.get(name, REST) if name else NOT_SEEN] += seconds
    count = len(profile.steps)
    return StepParts(
        step=sum(step.end - step.start for step in profile.steps) / count,
        device=device / count,
        parts={part: seconds / count for part, seconds in parts.items()},
    )


def _share(operations: list[Span], first: float, last: float) -> Iterator[tuple[str, float]]:
    """The names of operations with their shares of the time from first to last; "": none ran."""
    changes = [(span.start, 1, span.name) for span in operations]
    changes += [(span.end, -1, span.name) for span in operations]
    changes.sort(key=lambda change: (change[0], -change[1]))  # Each starts before it ends.
    running: collections.Counter[str] = collections.Counter()
    now = first
    for time, change, name in [*changes, (last, 0, "")]:
        for other, count in running.items():
            yield other, (time - now) * count / running.total()
        if not running:
            yield "", time - now
        now = time
        running[name] += change
        if not running[name]:
            del running[name]


def name_parts(program: Program) -> dict[str, str]:
    """The part of each instruction of a program, by the instruction's name."""
    inner = _find_inner(program)
    return {
        instruction.name: _find_part(program, computation, instruction, inner)
        for computation in program.computations.values()
        for instruction in computation.instructions.values()
    }


def _find_part(
    program: Program,
    computation: Computation,
    instruction: Instruction,
    inner: dict[str, dict[str, Instruction]],
) -> str:
    """What the instruction's scope says; if it has none, what it consists of or is part of."""
    if instruction.opcode in _COPIES:
        return REST
    if part := _part_of_scopes(instruction):
        return part
    inside = map(_part_of_scopes, inner.get(instruction.name, {}).values())
    found = collections.Counter(part for part in inside if part)
    if found:
        return found.most_common(1)[0][0]
    while caller := program.callers.get(computation.name):
        computation, outer = caller
        if part := _part_of_scopes(outer):
            return part
    return REST


def _part_of_scopes(instruction: Instruction) -> str | None:
    scopes = _SCOPE.findall(instruction.op_name)
    return PART_OF_SCOPE[scopes[-1]] if scopes else None


def _find_inner(program: Program) -> dict[str, dict[str, Instruction]]:
    """For each instruction that runs others, such as a loop or a fusion: these others by name."""
    inner: dict[str, dict[str, Instruction]] = {}
    for called, (_, caller) in program.callers.items():
        inner.setdefault(caller.name, {}).update(program.computations[called].instructions)
    return inner


def rows_of(figures: dict[str, Any]) -> dict[str, float]:
    """All that adds up to a step, in seconds: the parts on the devices, and the gap."""
    return {**figures["part_seconds"], HOST: figures["gap_seconds"]}


def describe_parts(figures: dict[str, Any]) -> str:
    """A table for people, of the figures in `StepParts.to_json`."""
    step, rows = figures["step_seconds"], rows_of(figures)
    width = max(map(len, rows))
    lines = [
        f"{name:<{width}}  {taken:8.4f} s  {taken / step:6.1%}" for name, taken in rows.items()
    ]
    title = f"where the time of a step goes (with a profiler, {step:.4f} s):"
    return "\n".join([title, *(f"  {line}" for line in lines)])
