"""The memory of a compiled program on one device, and its largest buffers.

Both come from the compiler's dump of its buffer assignment, which also exists for a program that
does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from lightning_jax.aot.hlo import Op, Program, arrays_of

_LARGEST = 10
_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(.*):$")
_VALUE = re.compile(r" value: <\d+ (\S+) @(\d+)> \(size=(\d+),offset=(\d+)\): (.*)$")


class Buffer(NamedTuple):
    """A piece of the main memory.

    `kind` is "argument", "output", "temporary" or "constant"; `op` the op that fills it, and
    `arrays` what it holds.
    """

    kind: str
    num_bytes: int
    op: str
    arrays: str


def held(assignment: str, code: int | None) -> dict[str, int | None]:
    """Returns the bytes of one device by name.

    The compiler compares these sums with the memory that there is. Its `memory_analysis` has the
    same arguments, outputs and aliased bytes, but counts some temporaries twice (libtpu 0.0.42).

    Args:
      assignment: the compiler's dump of the buffer assignment.
      code: bytes of the program; None if it does not fit, so that none was made.

    Returns:
      `arguments`; `outputs`, of which those `aliased` take the place of an argument; `temporaries`,
      constants among them; `program`; and `peak`, all that is held.
    """
    found = {"argument": 0, "output": 0, "temporary": 0, "constant": 0}
    aliased = 0
    for kind, size, words in _allocations(assignment):
        found[kind] += size
        aliased += size * (kind == "argument" and "live-out" in words)
    return {
        "arguments": found["argument"],
        "outputs": found["output"] + aliased,
        "aliased": aliased,
        "temporaries": found["temporary"] + found["constant"],
        "program": code,
        "peak": sum(found.values()) + (code or 0),
    }


def largest(assignment: str, program: Program) -> list[dict[str, Any]]:
    """Returns the largest buffers in the main memory, equal ones together.

    Temporaries are not all alive at one time.

    Args:
      assignment: the compiler's dump of the buffer assignment.
      program: to find the place in the code that an op comes from.
    """
    ops = {op.name: op for ops in program.computations.values() for op in ops}
    groups: dict[tuple[str, str, int, str], int] = {}
    for buffer in _buffers(assignment):
        source = _source(program, ops[buffer.op]) if buffer.op in ops else buffer.op
        key = buffer.kind, buffer.arrays, buffer.num_bytes, source
        groups[key] = groups.get(key, 0) + 1
    first = sorted(groups, key=lambda key: key[2] * groups[key], reverse=True)[:_LARGEST]
    return [
        {
            "kind": kind,
            "arrays": arrays,
            "bytes": size,
            "count": groups[kind, arrays, size, source],
            "source": source,
        }
        for kind, arrays, size, source in first
    ]


def _source(program: Program, op: Op) -> str:
    """The place in the code of an op, else of the last op inside of it, else its name."""
    inside = [inner.source for _, inner in program.inside(op)]
    return next((source for source in (op.source, *reversed(inside)) if source), op.name)


def _kind(text: str) -> str | None:
    """What an allocation is, from the words after its size; None outside of the main memory."""
    if "color" in text or "thread-local" in text:
        return None
    names = {"parameter": "argument", "live-out": "output", "constant": "constant"}
    return next((kind for word, kind in names.items() if word in text), "temporary")


def _allocations(assignment: str) -> Iterator[tuple[str, int, str]]:
    """Kind, bytes and description of each allocation in the main memory."""
    for line in assignment.splitlines():
        found = _ALLOCATION.match(line)
        if found and (kind := _kind(found[2])):
            yield kind, int(found[1]), found[2]


def _buffers(assignment: str) -> Iterator[Buffer]:
    """The values of each allocation; of those that share a place only the first."""
    kind, seen = None, set()
    for line in assignment.splitlines():
        if found := _ALLOCATION.match(line):
            kind, seen = _kind(found[2]), set()
        elif kind and (value := _VALUE.match(line)):
            place = value[3], value[4]
            if place not in seen:
                seen.add(place)
                arrays = ", ".join(map(str, arrays_of(value[5])))
                yield Buffer(kind, int(value[3]), value[1].split("{")[0], arrays)
