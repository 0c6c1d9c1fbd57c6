"""FLOPs and bytes of ops, by hand."""

import jax
import jax.numpy as jnp
import pytest

from lightning_jax.aot import costs, hlo
from tests.aot.samples import PROGRAM


@pytest.fixture(scope="module")
def program():
    return hlo.parse(PROGRAM)


def bytes_of(program, computation, name):
    return costs.hbm_bytes(program, computation, program.by_name[computation][name])


def test_a_product_inside_a_fusion(program):
    op = program.by_name["body"]["fusion.2"]
    assert costs.flops(program, "body", op) == 2 * 32 * 128 * 512
    loop = program.by_name["main.1"]["while.1"]
    assert costs.flops(program, "main.1", loop) == 0


def test_of_a_stack_only_the_slice_counts(program):
    slice_bytes = 128 * 512 * 2
    assert bytes_of(program, "body", "fusion.1") == 2 * slice_bytes
    update = 32 * 256 * 4
    assert bytes_of(program, "body", "fusion.4") == 2 * update


def test_pieces_of_a_transfer_and_fast_memory_are_free(program):
    # The product reads two operands and writes one result; what the transfer hands on is in VMEM.
    assert bytes_of(program, "body", "fusion.2") == 2 * (32 * 128 + 128 * 512 + 32 * 512)
    assert bytes_of(program, "body", "async-collective-done") == 0
    assert bytes_of(program, "body", "collective-permute-done") == 0
    assert bytes_of(program, "main.1", "kernel.1") == 2 * 8 * 128 * 4
    assert bytes_of(program, "main.1", "while.1") == 0


STACKS = """\
%inner (stack.2: f32[10,8,128], at.2: s32[]) -> f32[1,8,128] {
  %stack.2 = f32[10,8,128]{2,1,0} parameter(0)
  %at.2 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[1,8,128]{2,1,0} dynamic-slice(%stack.2, %at.2, %zero.2, %zero.2)
}

%outer (at.1: s32[], stack.1: f32[10,8,128]) -> f32[1,8,128] {
  %at.1 = s32[] parameter(0)
  %stack.1 = f32[10,8,128]{2,1,0} parameter(1)
  %fusion.1 = f32[1,8,128]{2,1,0} fusion(%stack.1, %at.1), kind=kLoop, calls=%inner
  ROOT %negate.1 = f32[1,8,128]{2,1,0} negate(%fusion.1)
}

ENTRY %main (state.1: (s32[], f32[10,8,128])) -> f32[8,128] {
  %state.1 = (s32[], f32[10,8,128]{2,1,0}) parameter(0)
  %at.0 = s32[] get-tuple-element(%state.1), index=0
  %stack.0 = f32[10,8,128]{2,1,0} get-tuple-element(%state.1), index=1
  %flat.1 = f32[80,128]{1,0} bitcast(%stack.0)
  %fusion.2 = f32[1,8,128]{2,1,0} fusion(%at.0, %stack.0), kind=kLoop, calls=%outer
  %made.1 = f32[10,8,128]{2,1,0} negate(%stack.0)
  ROOT %kernel.1 = f32[8,128]{1,0} custom-call(%at.0, %flat.1, %made.1), KERNEL
}
""".replace("KERNEL", costs.KERNEL)


def test_a_stack_is_sliced_in_a_fusion_inside_of_another():
    assert bytes_of(hlo.parse(STACKS), "main", "fusion.2") == 2 * 8 * 128 * 4 + 4


def test_a_kernel_in_a_loop_reads_the_part_of_a_stack_that_is_its_turns():
    program = hlo.parse(STACKS)
    kernel, part = program.by_name["main"]["kernel.1"], 8 * 128 * 4
    assert costs.hbm_bytes(program, "main", kernel) == 4 + 20 * part + part
    # What is made in the loop is no stack over its turns, even of the same shape.
    assert costs.hbm_bytes(program, "main", kernel, turns=10) == 4 + part + 10 * part + part
    assert costs.hbm_bytes(program, "main", kernel, turns=5) == 4 + 20 * part + part


def convolution(out, lhs, rhs, attributes):
    text = f"""\
ENTRY %main (a: {lhs}, b: {rhs}) -> {out} {{
  %a = {lhs}{{0}} parameter(0)
  %b = {rhs}{{0}} parameter(1)
  ROOT %c = {out}{{0}} convolution(%a, %b), {attributes}
}}
"""
    program = hlo.parse(text)
    return costs.flops(program, "main", program.by_name["main"]["c"])


@pytest.mark.parametrize(
    ("shapes", "attributes", "expected"),
    [
        # A plain product.
        (("f32[4,7]", "f32[4,5]", "f32[5,7]"), "dim_labels=bf_io->bf", 2 * 4 * 5 * 7),
        # Three matrices, each with its own: a convolution with holes.
        (
            ("f32[3,4,7]", "f32[3,4,5]", "f32[3,5,7]"),
            "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            3 * 2 * 4 * 5 * 7,
        ),
        # A contraction over two axes, one of them spatial.
        (
            ("f32[4,7,1]", "f32[4,2,5]", "f32[2,5,7]"),
            "window={size=2}, dim_labels=b0f_0io->bf0",
            2 * 4 * 7 * 2 * 5,
        ),
        # A real convolution with padding: three places, of which the outer miss one tap.
        (
            ("f32[1,3,1]", "f32[1,3,1]", "f32[3,1,1]"),
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * (2 + 3 + 2),
        ),
    ],
)
def test_convolutions(shapes, attributes, expected):
    assert convolution(*shapes, attributes) == expected


def test_dots_of_another_compiler():
    """XLA writes plain dots on a CPU; the sum is that of its own analysis."""
    f = jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))
    compiled = f.lower(jnp.ones((3, 4, 5)), jnp.ones((3, 5, 7))).compile()
    program = hlo.parse(compiled.as_text())
    total = sum(
        costs.flops(program, name, op)
        for name, ops in program.computations.items()
        for op in ops
        if op.opcode == "dot"
    )
    assert total == 2 * 3 * 4 * 5 * 7
