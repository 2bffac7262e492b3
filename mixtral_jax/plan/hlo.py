"""Parses the text of a compiled XLA program: computations, instructions, and how often they run.

A program has the body of a loop once, however often it runs: a scan over 32 layers looks like one
layer. `Program.executions` says how often each computation runs. Other files interpret the
instructions.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator

_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "s32": 32,
    "u32": 32,
    "s64": 64,
    "u64": 64,
    "f8e4m3fn": 8,
    "f8e5m2": 8,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "c64": 64,
    "c128": 128,
    "token": 0,
}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"(calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array. `is_in_hbm` is False if the compiler put it into on-chip memory."""

    dtype: str
    dimensions: tuple[int, ...]
    is_in_hbm: bool = True

    @property
    def num_bytes(self) -> int:
        """Bytes without padding. An XLA token has 0."""
        return math.prod(self.dimensions) * _BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dimensions))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program: results, opcode, names of operands, and the rest as text."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """The path of jax transformations and primitives that the instruction comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    @property
    def result_bytes(self) -> int:
        """Bytes of all results together."""
        return sum(array.num_bytes for array in self.results)

    def computation(self, role: str) -> str | None:
        """The computation that it uses as `calls`, `body`, `condition`, `to_apply`, ..."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the result of the computation."""
        return next(
            instruction for instruction in self.instructions.values() if instruction.is_root
        )

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that produce the operands of `instruction`."""
        return [self.instructions[name] for name in instruction.operands]

    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.operands[0]): i for i in found}


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations of a compiled module. `parse_program` explains `expected_trips`."""

    computations: dict[str, Computation]
    entry: str
    expected_trips: Callable[[Instruction], int | None] = lambda loop: None

    @functools.cached_property
    def executions(self) -> dict[str, int | None]:
        """How often each computation runs in a step.

        None: the computation is in a loop whose length is known only at run time, and
        `expected_trips` does not know it. All branches of a conditional count as taken.
        Computations that only reductions or sorts apply have 0.
        """
        counts: dict[str, int | None] = {name: 0 for name in self.computations}

        def run(name: str, times: int | None) -> None:
            before = counts[name]
            counts[name] = None if times is None or before is None else before + times
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                for called, trips in self.calls(computation, instruction):
                    run(called, None if times is None or trips is None else times * trips)

        run(self.entry, 1)
        return counts

    @functools.cached_property
    def callers(self) -> dict[str, tuple[Computation, Instruction]]:
        """The instruction that runs each computation, with the computation that contains it.

        If several instructions run a computation, this is one of them.
        """
        return {
            called: (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            for called, _ in self.calls(computation, instruction)
        }

    def instructions(self) -> Iterator[tuple[Computation, Instruction, int | None]]:
        """Yields every instruction that runs, with its computation and how often it runs.

        Instructions inside fusions are included.
        """
        for name, times in self.executions.items():
            if times != 0:
                computation = self.computations[name]
                yield from (
                    (computation, instruction, times)
                    for instruction in computation.instructions.values()
                )

    def calls(
        self, computation: Computation, instruction: Instruction
    ) -> Iterator[tuple[str, int | None]]:
        """Yields the computations that an instruction runs, and how often; None if unknown."""
        if instruction.opcode == "while":
            trips = self._trip_count(computation, instruction)
            trips = self.expected_trips(instruction) if trips is None else trips
            yield from (
                (instruction.computation(role) or "", trips) for role in ("body", "condition")
            )
        elif instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            names = re.findall(r"[\w.\-]+", branches.group(1)) if branches else []
            names += [
                instruction.computation(role) for role in ("true_computation", "false_computation")
            ]
            yield from ((name, 1) for name in names if name)
        # The -start of an asynchronous call names the computation that it runs. Its -update and
        # -done may name it too, so they are not counted.
        elif instruction.opcode in ("call", "call-start", "fusion", "async-start"):
            found = _CALLED.search(instruction.rest)
            if found:
                yield found.group(2), 1

    def _trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """The trip count of a loop, if the text has it.

        It is in XLA's own note, or follows from a condition `i < constant` on a counter that starts
        at a constant and grows by 1.
        """
        noted = re.search(r'"known_trip_count":(\{[^}]*\})', loop.rest)
        if noted:
            return int(json.loads(noted.group(1))["n"])
        condition = self.computations[loop.computation("condition") or ""]
        body = self.computations[loop.computation("body") or ""]
        compare = condition.root
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None
        counter, limit = (_origin(condition, name) for name in compare.operands)
        index, values = _tuple_index(counter), _origin(computation, loop.operands[0])
        # A loop whose values are no tuple goes on with those of another computation.
        if index is None or limit.opcode != "constant" or values.opcode != "tuple":
            return None
        start = _origin(computation, values.operands[index])
        if start.opcode != "constant" or not _adds_one(body, index):
            return None
        return max(0, int(limit.operands[0]) - int(start.operands[0]))


def parse_program(
    text: str, expected_trips: Callable[[Instruction], int | None] = lambda loop: None
) -> Program:
    """Parses the output of `compiled.as_text()`.

    Args:
        expected_trips: gives the trip count of a `while` if the text does not have it.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        header = _HEADER.match(line)
        if header:
            current = {}
            computations[header.group(2)] = Computation(header.group(2), current)
            entry = header.group(2) if header.group(1) else entry
        elif start := _INSTRUCTION.match(line):
            instruction = _parse_instruction(line, start)
            current[instruction.name] = instruction
    assert entry, "the text has no ENTRY computation"
    return Program(computations, entry, expected_trips)


def _parse_instruction(line: str, start: re.Match[str]) -> Instruction:
    shape_end = _end_of_shape(line, start.end())
    opening = line.index("(", shape_end)
    closing = _closing(line, opening)
    opcode = line[shape_end:opening].strip()
    inside = line[opening + 1 : closing]
    # The parentheses hold the number of a parameter, the value of a constant, and otherwise names
    # of operands, perhaps with their types before them.
    operands = (
        (inside,)
        if opcode in ("parameter", "constant")
        else tuple(re.findall(r"%([\w.\-]+)", inside))
    )
    results = tuple(_array(*found) for found in _ARRAY.findall(line[start.end() : shape_end]))
    return Instruction(
        start.group(2), opcode, results, operands, line[closing + 1 :], bool(start.group(1))
    )


def _array(dtype: str, dimensions: str, layout: str) -> Array:
    sizes = tuple(int(size.lstrip("<=")) for size in dimensions.split(",") if size)
    # S(0), which is not written, is HBM. S(1) and up are memories on the chip or the host.
    return Array(dtype, sizes, not re.search(r"S\([1-9]", layout))


def _end_of_shape(line: str, start: int) -> int:
    if line[start] == "(":
        return _closing(line, start) + 1
    return line.index(" ", start)


def _closing(line: str, opening: int) -> int:
    depth = 0
    for position in range(opening, len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if depth == 0:
            return position
    raise AssertionError(f"unbalanced parentheses: {line[:200]}")


def _origin(computation: Computation, name: str) -> Instruction:
    """The instruction that computes this value. Copies, which only move it, are followed."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "copy-start", "copy-done", "bitcast", "convert"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _tuple_index(instruction: Instruction) -> int | None:
    found = re.search(r"index=(\d+)", instruction.rest)
    return int(found.group(1)) if instruction.opcode == "get-tuple-element" and found else None


def _adds_one(body: Computation, index: int) -> bool:
    """True if the loop's body returns its `index`-th value plus 1."""
    update = _origin(body, body.root.operands[index])
    if update.opcode != "add":
        return False
    terms = [_origin(body, name) for name in update.operands]
    ones = [term for term in terms if term.opcode == "constant" and term.operands == ("1",)]
    return len(ones) == 1 and any(_tuple_index(term) == index for term in terms)
