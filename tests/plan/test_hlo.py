"""The text of a compiled program is parsed, with how often its parts run."""

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax.plan.hlo import Array, parse_program
from tests.plan.programs import RAGGED, asynchronous, ragged


def test_a_loop_runs_its_body_as_often_as_its_condition_says() -> None:
    executions = ragged().executions
    assert executions == {"main.12_spmd": 1, "body.1": 3, "condition.2": 3, "region_1.2": 0}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # A start at 1, a step of 2, a computed limit, and counting down. Only the trip count of the
        # first loop is known.
        ("%constant.80 = s32[]{:T(128)} constant(0)", "%constant.80 = s32[]{:T(128)} constant(1)"),
        ("%constant.76 = s32[]{:T(128)} constant(1)", "%constant.76 = s32[]{:T(128)} constant(2)"),
        (
            "%constant.70 = s32[]{:T(128)} constant(3)",
            "%constant.70 = s32[]{:T(128)} get-tuple-element(%wide.param.27)",
        ),
        ("direction=LT", "direction=GT"),
    ],
)
def test_a_loop_of_another_kind_is_not_guessed_at(before: str, after: str) -> None:
    assert before in RAGGED
    expected = 2 if "constant.80" in before else None
    assert parse_program(RAGGED.replace(before, after)).executions["body.1"] == expected


def test_instructions_have_types_operands_and_places() -> None:
    body = ragged().computations["body.1"]
    sliced = body.instructions["dynamic-slice.2"]
    assert sliced.results == (Array("bf16", (1, 2, 128, 512), is_in_hbm=False),)
    assert [operand.name for operand in body.operands(sliced)] == [
        "get-tuple-element.317",
        "copy.96",
    ]
    assert body.instructions["ragged_all_to_all.82"].operands[1] == "broadcast.49"
    assert len(body.instructions["ragged_all_to_all.82"].operands) == 6
    assert [str(array) for array in body.root.results] == [
        "s32[]",
        "bf16[256,256]",
        "bf16[3,2,128,512]",
        "s32[4]",
    ]
    assert body.root.results[1].num_bytes == 256 * 256 * 2


def test_a_computation_knows_who_runs_it() -> None:
    assert asynchronous().callers["all-reduce-scatter.3"][1].name == "fusion.3"
    assert ragged().callers["body.1"][1].name == "while.45"


def test_nested_scans_multiply() -> None:
    def inner(x, _):
        return jnp.sin(x @ x), None

    def outer(x, _):
        return jax.lax.scan(inner, x, length=5)[0], None

    step = jax.jit(lambda x: jax.lax.scan(outer, x, length=7)[0])
    program = parse_program(step.lower(jnp.ones((64, 64))).compile().as_text())
    dots = [
        times for _, instruction, times in program.instructions() if instruction.opcode == "dot"
    ]
    assert dots == [35]
