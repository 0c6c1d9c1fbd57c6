"""The text of a program becomes computations of ops, and loops are counted."""

import re

import pytest

from lightning_jax.aot import hlo, loops
from tests.aot.samples import PROGRAM


@pytest.fixture(scope="module")
def program():
    return hlo.parse(PROGRAM)


def test_arrays_have_bytes_and_a_place():
    found = hlo.arrays_of("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=5*/f32[]{:T(128)}, s4[6]{0})")
    assert [str(array) for array in found] == ["bf16[2,3]", "f32[]", "s4[6]"]
    assert [array.num_bytes for array in found] == [12, 4, 3]
    assert [array.in_hbm for array in found] == [False, True, True]
    assert [a.num_bytes for a in hlo.arrays_of("(pred[8], f8e4m3fn[4], token[], c64[2])")] == [
        8,
        4,
        0,
        16,
    ]


def test_ops_in_the_order_of_the_schedule(program):
    assert program.entry == "main.1"
    names = [op.name for op in program.computations["body"]]
    assert names.index("async-collective-start") < names.index("fusion.2") < names.index("next.1")
    op = program.by_name["body"]["fusion.2"]
    assert op.opcode == "fusion" and op.called == ("carries",)
    assert op.operands == ("x.1", "fusion.1", "gte.1", "gte.2", "gte.3", "gte.4")
    assert [str(array) for array in op.arrays][:2] == ["bf16[32,512]", "bf16[64,256]"]
    assert {inner.opcode for _, inner in program.inside(op)} >= {"convolution", "all-gather"}


def test_attributes_with_brackets_and_line_breaks(program):
    main = program.by_name["main.1"]
    assert main["while.1"].attribute("body") == "%body"
    assert main["while.1"].called == ("condition", "body")
    assert main["kernel.1"].source == "jit(step)/kernel a second line"
    assert main["x.0"].source == "state.params['x']"
    assert program.by_name["all-reduce-scatter.1"]["dynamic-slice.1"].attribute(
        "dynamic_slice_sizes"
    ) == ("{32,256}")
    assert main["while.1"].attribute("nothing") is None


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        hlo.parse("HloModule empty\n")


def test_loops_multiply(program):
    found = {visit.computation: visit for visit in loops.visits(program)}
    assert found["body"].times == 3 and not found["body"].is_open
    assert found["rounds_body"].times == 1 and found["rounds_body"].is_open
    assert "condition" not in found and "starts" not in found


def turns(text):
    program = hlo.parse(text)
    return loops.trip_count(program, "main.1", program.by_name["main.1"]["while.1"])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("constant(3)", "constant(7)", 7),
        ("%zero.0 = s32[]{:T(128)} constant(0)", "%zero.0 = s32[]{:T(128)} constant(2)", 1),
        ("direction=LT", "direction=NE", None),
        (
            "%start.0 = s32[]{:T(128)} copy(%zero.0)",
            "%start.0 = s32[] add(%count.0, %count.0)",
            None,
        ),
        # The limit comes from outside of the loop, as element 1 of its state.
        (
            "%limit.1 = s32[]{:T(128)} constant(3)",
            "%limit.1 = s32[]{:T(128)} get-tuple-element(%state.2), index=0",
            0,
        ),
        (
            'metadata={op_name="jit(step)/while"}',
            'backend_config={"known_trip_count":{"n":"9"}}',
            9,
        ),
    ],
)
def test_trip_counts(old, new, expected):
    assert old in PROGRAM
    assert turns(PROGRAM.replace(old, new)) == expected


def test_a_condition_may_be_a_fusion():
    """Its parameters may stand in another order than its operands."""
    fused = """\
%fused_lt (c.0: s32[], c.1: s32[]) -> pred[] {
  %c.0 = s32[]{:T(128)} parameter(0)
  %c.1 = s32[]{:T(128)} parameter(1)
  ROOT %lt.9 = pred[]{:T(512)} compare(%c.1, %c.0), direction=LT
}

"""
    root = "ROOT %lt.1 = pred[]{:T(512)} compare(%turn.2, %limit.1), direction=LT"
    call = "ROOT %lt.1 = pred[]{:T(512)} fusion(%limit.1, %turn.2), kind=kLoop, calls=%fused_lt"
    text = PROGRAM.replace(root, call)
    assert turns(re.sub(r"(?m)^%body ", fused + "%body ", text)) == 3
