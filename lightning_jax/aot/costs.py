"""FLOPs of the products in a compiled program, and the bytes that its ops move to and from HBM.

Both are of one device and of one run of an op. The bytes are those of the schedule: every op reads
its operands and writes its results, as far as these lie in the main memory; of a stack that an op
slices, only the slice counts. Kernels (Pallas) count their operands and results once; of a stack
with an entry for each turn of a loop, one entry. They count no FLOPs, because nothing in the text
says what they compute.
"""

from __future__ import annotations

import math
import re

import numpy as np

from lightning_jax.aot.hlo import Op, Program

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
KERNEL = 'custom_call_target="tpu_custom_call"'
# Ops that only name what is there, and ends of transfers, whose starts count.
_FREE = (
    "add-dependency",
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
)
_SLICES = ("dynamic-slice", "gather", "slice")


def flops(program: Program, computation: str, op: Op) -> float:
    """FLOPs of the products of an op, one inside a fusion included."""
    if op.opcode in ("convolution", "dot"):
        return _product_flops(program, computation, op)
    if op.opcode not in ("fusion", "async-start"):
        return 0.0
    return sum(
        _product_flops(program, name, inner)
        for name, inner in program.inside(op)
        if inner.opcode in ("convolution", "dot")
    )


def hbm_bytes(program: Program, computation: str, op: Op, turns: int = 1) -> int:
    """Bytes that an op reads from and writes to the main memory, in a loop of so many turns."""
    if op.opcode in _FREE or op.opcode.endswith("-done"):
        return 0
    if op.opcode == "custom-call" and KERNEL not in op.attributes:
        return 0
    if op.opcode in ("copy-start", "slice-start"):
        ends = op.arrays[:2]
        moved = min(array.num_bytes for array in ends)
        return moved * sum(array.in_hbm for array in ends)
    operands = program.operand_arrays(computation, op)
    written = sum(array.num_bytes for array in op.arrays if array.in_hbm)
    if op.opcode == "async-start":
        return written  # Its result names its operands too.
    if op.opcode == "fusion":
        return _fusion_bytes(program, computation, op)
    if op.opcode == "dynamic-update-slice":
        return 2 * operands[1].num_bytes * op.arrays[0].in_hbm
    if op.opcode in _SLICES:
        return written + op.num_bytes * operands[0].in_hbm
    if KERNEL in op.attributes and turns > 1:
        return written + _kernel_reads(program, computation, op, turns)
    return written + sum(array.num_bytes for array in operands if array.in_hbm)


def _kernel_reads(program: Program, computation: str, op: Op, turns: int) -> int:
    """Bytes of a kernel's operands.

    What comes into the loop from outside, with as many parts as the loop has turns, is a stack.
    """
    total, by_name = 0, program.by_name[computation]
    for name in op.operands:
        source = by_name[name]
        while source.opcode == "bitcast" and source.operands[0] in by_name:
            source = by_name[source.operands[0]]
        is_outside = source.opcode in ("parameter", "get-tuple-element")
        is_stack = is_outside and len(source.arrays) == 1 and source.arrays[0].dims[:1] == (turns,)
        read = sum(array.num_bytes for array in by_name[name].arrays if array.in_hbm)
        total += read // turns if is_stack else read
    return total


def _fusion_bytes(program: Program, computation: str, op: Op) -> int:
    """Bytes of a fusion, whose ops say how much of an operand or a result they touch."""
    name = op.called[0]
    ops, by_name = program.computations[name], program.by_name[name]
    operands = program.operand_arrays(computation, op)
    total = 0
    for index, inner in program.parameters(name).items():
        if index < len(operands) and operands[index].in_hbm:
            total += _read(program, name, inner)
    root = next(inner for inner in ops if inner.is_root)
    parts = root.operands if root.opcode == "tuple" else (root.name,)
    for array, part in zip(op.arrays, parts, strict=False):
        if array.in_hbm and part in by_name:
            total += _written(by_name, by_name[part], array.num_bytes)
    return total


def _read(program: Program, computation: str, value: Op) -> int:
    """Bytes of a value inside a fusion that its users read."""
    total = 0
    for user in program.computations[computation]:
        if value.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _read(program, computation, user)
        elif user.opcode == "fusion":
            inside = program.parameters(user.called[0])
            places = [at for at, name in enumerate(user.operands) if name == value.name]
            total += sum(_read(program, user.called[0], inside[at]) for at in places)
        elif user.opcode in _SLICES and user.operands[0] == value.name:
            total += user.num_bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # Written in place.
        elif user.opcode in ("tuple", *COLLECTIVES) or "AsyncCollective" in user.attributes:
            continue  # A piece of a transfer, which counts at its start.
        else:
            return value.num_bytes
    return min(total, value.num_bytes)


def _written(by_name: dict[str, Op], value: Op, num_bytes: int) -> int:
    """Bytes of a result of a fusion that it writes."""
    while value.opcode == "bitcast" and value.operands[0] in by_name:
        value = by_name[value.operands[0]]
    if value.opcode == "dynamic-update-slice":
        update = by_name.get(value.operands[1])
        return update.num_bytes if update else num_bytes
    return 0 if value.opcode in ("parameter", *COLLECTIVES) else num_bytes


def _product_flops(program: Program, computation: str, op: Op) -> float:
    operands = [program.by_name[computation][name].arrays[0].dims for name in op.operands[:2]]
    if op.opcode == "dot":
        dims = op.attribute("lhs_contracting_dims") or "{}"
        contracted = math.prod(operands[0][int(d)] for d in re.findall(r"\d+", dims))
        return 2.0 * math.prod(op.arrays[0].dims) * contracted
    return _convolution_flops(op, *operands)


def _convolution_flops(op: Op, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """FLOPs of a convolution, counting only pairs that meet inside of its input.

    A TPU's product of batched matrices is a convolution with holes over the batch.
    """
    left, right, out = re.findall(r"(\w+)_(\w+)->(\w+)", op.attribute("dim_labels") or "")[0]
    window = _window(op.attribute("window") or "")
    result = op.arrays[0].dims
    pairs = 1
    for label in (label for label in right if label.isdigit()):
        index = int(label)
        one = {name: values[index] for name, values in window.items() if index < len(values)}
        pairs *= _pairs(
            lhs[left.index(label)], rhs[right.index(label)], result[out.index(label)], one
        )
    features = result[out.index("b")] * result[out.index("f")] * rhs[right.index("i")]
    return 2.0 * features * pairs


def _window(text: str) -> dict[str, list[tuple[int, ...]]]:
    """`{size=3 stride=2 pad=0_0}` as numbers by name, one entry for each spatial axis."""
    found = {}
    for name, values in re.findall(r"(\w+)=([\dx_\-]+)", text):
        found[name] = [tuple(map(int, value.split("_"))) for value in values.split("x")]
    return found


def _pairs(lhs: int, rhs: int, result: int, window: dict[str, tuple[int, ...]]) -> int:
    """Pairs (place of the output, place of the window) that meet an element of the input."""
    stride, low = window.get("stride", (1,))[0], window.get("pad", (0, 0))[0]
    spread, dilation = window.get("lhs_dilate", (1,))[0], window.get("rhs_dilate", (1,))[0]
    at = np.arange(result)[:, None] * stride - low + np.arange(rhs)[None, :] * dilation
    return int(((at >= 0) & (at <= (lhs - 1) * spread) & (at % spread == 0)).sum())
