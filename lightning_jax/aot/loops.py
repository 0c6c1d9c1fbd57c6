"""How often each computation of a program runs: the scan over units multiplies what is in its body.

Loops whose number of turns is computed on the device (rounds of an exchange, filled keys of a
cache) are *open*: nothing in the text says how often they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from lightning_jax.aot.hlo import Op, Program

_COPIES = ("copy", "bitcast", "convert", "copy-start", "copy-done")


class Visit(NamedTuple):
    """A computation, how often it runs in one call, and whether that is within an open loop.

    One turn of an open loop is counted. `turns` are those of the innermost loop.
    """

    computation: str
    times: int
    is_open: bool
    turns: int = 1


def visits(program: Program) -> Iterator[Visit]:
    """Yields every computation that runs as such (not inside a fusion), once for each caller."""
    yield from _visit(program, Visit(program.entry, 1, False))


def _visit(program: Program, visit: Visit) -> Iterator[Visit]:
    yield visit
    for op in program.computations[visit.computation]:
        if op.opcode == "while":
            turns = trip_count(program, visit.computation, op)
            is_open, turns = visit.is_open or turns is None, 1 if turns is None else turns
            body = (op.attribute("body") or "").lstrip("%")
            yield from _visit(program, Visit(body, visit.times * turns, is_open, turns))
        elif op.opcode in ("conditional", "call"):
            for name in op.called:
                yield from _visit(program, visit._replace(computation=name))


def trip_count(program: Program, computation: str, loop: Op) -> int | None:
    """Turns of a loop that counts by one up to a constant; None if it is not such a loop."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = (loop.attribute("condition") or "").lstrip("%")
    compared = _comparison(program, condition)
    if compared is None:
        return None
    counter, limit = compared
    index = _tuple_index(program, condition, counter)
    bound = _constant(program, condition, limit)
    if bound is None:
        # The limit may be handed in from outside of the loop.
        place = _tuple_index(program, condition, limit)
        bound = _initial(program, computation, loop, place)
    start = _initial(program, computation, loop, index)
    return None if bound is None or start is None else max(bound - start, 0)


def _comparison(program: Program, condition: str) -> tuple[str, str] | None:
    """The operands (counter, limit) of `counter < limit`, as names in the condition."""
    root = next(op for op in program.computations[condition] if op.is_root)
    if root.opcode == "compare" and root.attribute("direction") == "LT":
        return root.operands[0], root.operands[1]
    if root.opcode != "fusion":
        return None
    inner = root.called[0]
    last = next(op for op in program.computations[inner] if op.is_root)
    numbers = {op.name: number for number, op in program.parameters(inner).items()}
    is_less = last.opcode == "compare" and last.attribute("direction") == "LT"
    if not is_less or any(name not in numbers for name in last.operands):
        return None
    counter, limit = (root.operands[numbers[name]] for name in last.operands)
    return counter, limit


def _tuple_index(program: Program, computation: str, name: str) -> int | None:
    """Which element of the loop's state a name in its condition is."""
    op = _through_copies(program, computation, name)
    index = op.attribute("index") if op and op.opcode == "get-tuple-element" else None
    return None if index is None else int(index)


def _initial(program: Program, computation: str, loop: Op, index: int | None) -> int | None:
    """The constant with which a loop begins in an element of its state."""
    state = program.by_name[computation].get(loop.operands[0])
    if index is None or state is None or state.opcode != "tuple":
        return None
    return _constant(program, computation, state.operands[index])


def _constant(program: Program, computation: str, name: str) -> int | None:
    op = _through_copies(program, computation, name)
    if op is None or op.opcode != "constant":
        return None
    value = re.match(r"-?\d+", op.attributes)
    return int(value[0]) if value else None


def _through_copies(program: Program, computation: str, name: str) -> Op | None:
    op = program.by_name[computation].get(name)
    while op is not None and op.opcode in _COPIES:
        op = program.by_name[computation].get(op.operands[0])
    return op
