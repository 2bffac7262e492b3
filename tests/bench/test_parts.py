"""The time of a step by parts of the model: every moment is in one row, and the rows add up."""

import pytest

from mixtral_jax.bench.parts import HOST, NOT_SEEN, REST, describe_parts, name_parts, split_time
from mixtral_jax.bench.picture import draw_parts
from mixtral_jax.bench.profile import Profile, Span
from mixtral_jax.plan.hlo import parse_program

PROGRAM = parse_program(
    """HloModule jit_train_step, is_scheduled=true

%fused (p.0: f32[4]) -> f32[4] {
  %p.0 = f32[4] parameter(0)
  %sum = f32[4] add(%p.0, %p.0), metadata={op_name="jit(train_step)/optimizer/add"}
  ROOT %square = f32[4] multiply(%sum, %sum), metadata={op_name="jit(train_step)/optimizer/mul"}
}

%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %x = f32[4] get-tuple-element(%p.1), index=1
  %dot.1 = f32[4] add(%x, %x), metadata={op_name="jit(f)/transpose(jvp(dispatch))/experts/dot"}
  %route = f32[4] add(%dot.1, %x), metadata={op_name="jit(f)/jvp()/while/body/router/sort"}
  %plain = f32[4] add(%route, %x)
  ROOT %pair = (s32[], f32[4]) tuple(%i, %plain)
}

%condition (p.2: (s32[], f32[4])) -> pred[] {
  %p.2 = (s32[], f32[4]) parameter(0)
  %j = s32[] get-tuple-element(%p.2), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[4])) -> f32[4] {
  %a = (s32[], f32[4]) parameter(0)
  %loop = (s32[], f32[4]) while(%a), body=%body, condition=%condition, metadata={op_name="LOOP"}
  %y = f32[4] get-tuple-element(%loop), index=1
  %copy.1 = f32[4] copy(%y), metadata={op_name="jit(f)/attention/mul"}
  %norm = f32[4] add(%copy.1, %y), metadata={op_name="jit(f)/my_attention_2/add"}
  ROOT %fusion.1 = f32[4] fusion(%norm), kind=kLoop, calls=%fused
}
""".replace("LOOP", "jit(f)/attention/while")
)


def test_an_operation_belongs_to_its_innermost_scope_or_to_what_it_is_part_of():
    parts = name_parts(PROGRAM)
    assert parts["dot.1"] == "experts"  # Within `dispatch`, transposed.
    assert parts["route"] == "router and dispatch"
    assert parts["plain"] == "attention"  # Without a scope, in a loop that has one.
    assert parts["fusion.1"] == "optimizer"  # Without a scope, of operations that have one.
    assert parts["copy.1"] == REST
    assert parts["norm"] == REST  # A name that contains a scope is none.


def split(*operations, steps=((0, 10),)):
    spans = [Span(*operation) for operation in operations]
    return split_time(Profile([Span("", *step) for step in steps], spans), PROGRAM)


@pytest.mark.parametrize(
    ("operations", "expected"),
    {
        "one after the other": (
            [("dot.1", 1, 3), ("copy.1", 3, 4)],
            {"experts": 2, REST: 1},
        ),
        "at once, on two threads": (
            [("dot.1", 1, 5), ("route", 3, 5), ("copy.1", 5, 6)],
            {"experts": 3, "router and dispatch": 1, REST: 1},
        ),
        "the same one at once, on two devices": (
            [("dot.1", 1, 5), ("dot.1", 2, 5)],
            {"experts": 4},
        ),
        "a loop whose operations were seen": (
            [("loop", 1, 9), ("dot.1", 2, 4), ("route", 7, 9)],
            {"experts": 2, "router and dispatch": 2, NOT_SEEN: 4},
        ),
        "a loop whose operations were not seen": (
            [("loop", 1, 9), ("copy.1", 9, 9.5)],
            {"attention": 8, REST: 0.5},
        ),
        "with a pause": ([("dot.1", 1, 2), ("copy.1", 5, 6)], {"experts": 1, NOT_SEEN: 3, REST: 1}),
        "of no length": ([("dot.1", 1, 1), ("copy.1", 1, 2)], {REST: 1}),
        "of another program": ([("unknown", 1, 4)], {REST: 3}),
        "none at all": ([], {NOT_SEEN: 10}),
    }.values(),
    ids=lambda case: "",
)
def test_each_moment_is_in_one_part_and_unseen_time_is_a_part_too(operations, expected):
    result = split(*operations)
    assert {part: taken for part, taken in result.parts.items() if taken} == expected
    assert sum(result.parts.values()) == pytest.approx(result.device)


def test_figures_are_means_over_the_steps_and_the_gap_is_what_the_devices_wait():
    result = split(("dot.1", 1, 9), ("dot.1", 12, 18), steps=[(0, 10), (10, 20)])
    figures = result.to_json()
    assert figures["step_seconds"] == 10 and figures["device_seconds"] == 7
    assert figures["gap_seconds"] == 3 and figures["part_seconds"]["experts"] == 7


def test_the_table_and_the_picture_show_every_part_and_what_was_not_seen():
    figures = split(("dot.1", 1, 3), ("copy.1", 6, 9)).to_json()
    text = describe_parts(figures)
    (row,) = (line for line in text.splitlines() if NOT_SEEN in line)
    assert row.split()[-3:] == ["3.0000", "s", "30.0%"]
    assert "experts" in text and HOST in text
    picture = draw_parts(figures)
    (panel,) = picture.figure.axes
    shown = {label.get_text() for label in panel.get_yticklabels()}
    assert shown == {*figures["part_seconds"], HOST}
    assert [bar.get_width() for bar in panel.patches][-2:] == pytest.approx([3000, 2000])
    assert picture.to_png().startswith(b"\x89PNG")
