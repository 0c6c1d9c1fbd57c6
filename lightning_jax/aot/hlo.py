"""The text of a compiled program (HLO), as computations of ops with shapes, operands and calls.

The text is in the order in which a device runs it (`is_scheduled=true`), so what stands between the
start and the end of a transfer is what it overlaps. Only what `aot` asks for is read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128, "token": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MEMORY = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of an op's result, on one device.

    Attributes:
      dtype: XLA's name, such as "bf16".
      dims: its sizes.
      in_hbm: whether it lies in the main memory, not in a fast one.
    """

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements, without the padding of its tiles."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Op:
    """One op: `name = type opcode(operands), attributes`."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of its result."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def source(self) -> str:
        """The path of the operation in the model's code, "" if none is known."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls: condition and body of a loop, branches, ..."""
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return tuple(names)

    def attribute(self, name: str) -> str | None:
        """The text of `name=...` up to the next comma or blank outside of brackets."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if not found:
            return None
        start, depth = found.end(), 0
        for end in range(start, len(self.attributes)):
            char = self.attributes[end]
            depth += char in "{[(" and 1 or -(char in "}])")
            if depth <= 0 and char in ", " and end > start:
                return self.attributes[start:end]
        return self.attributes[start:]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each with its ops in the order of the schedule."""

    entry: str
    computations: dict[str, tuple[Op, ...]]

    @functools.cached_property
    def by_name(self) -> dict[str, dict[str, Op]]:
        """Of each computation: its ops by name."""
        return {name: {op.name: op for op in ops} for name, ops in self.computations.items()}

    def inside(self, op: Op) -> Iterator[tuple[str, Op]]:
        """All (computation, op) that run within a fusion or an asynchronous op, at any depth."""
        for name in op.called:
            for inner in self.computations.get(name, ()):
                yield name, inner
                if inner.opcode in ("fusion", "call", "async-start"):
                    yield from self.inside(inner)

    def parameters(self, computation: str) -> dict[int, Op]:
        """The parameters of a computation by number."""
        return {
            int(re.findall(r"\d+", op.attributes)[0]): op
            for op in self.computations[computation]
            if op.opcode == "parameter"
        }

    def operand_arrays(self, computation: str, op: Op) -> list[Array]:
        """The arrays of all operands of an op, in order."""
        ops = self.by_name[computation]
        return [array for name in op.operands if name in ops for array in ops[name].arrays]


def parse(text: str) -> Program:
    """Reads the text of a module.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, list[Op]] = {}
    entry, current = "", ""
    for line in _lines(text):
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (op := _parse_op(line)):
            computations[current].append(op)
    if not entry:
        raise ValueError("the text has no entry computation")
    return Program(entry, {name: tuple(ops) for name, ops in computations.items()})


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a type, such as `(f32[2,3]{1,0}, s32[])`, in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        memory = _MEMORY.search(layout)
        sizes = tuple(int(size) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, memory is None or memory[1] == "0"))
    return tuple(found)


def _lines(text: str) -> Iterator[str]:
    """Lines of the text, with the line breaks inside of attributes taken out."""
    pending = ""
    for line in text.splitlines():
        if _OP.match(line) or _HEADER.match(line) or not line.strip() or line == "}":
            if pending:
                yield pending
            pending = line
        else:
            pending += " " + line.strip()
    yield pending


def _parse_op(line: str) -> Op | None:
    head = _OP.match(line)
    if not head:
        return None
    end = _closing(line, head.end()) if line[head.end()] == "(" else line.find(" ", head.end())
    kind = line[head.end() : end]
    start = line.find("(", end)
    opcode = line[end:start].strip()
    close = _closing(line, start)
    operands = line[start + 1 : close - 1]
    named = tuple(re.findall(r"%([\w.\-]+)", operands))
    # The value of a constant, and the number of a parameter, stand where operands would.
    attributes = line[close:] if named else f"{operands}{line[close:]}"
    return Op(head[2], opcode, arrays_of(kind), named, attributes, bool(head[1]))


def _closing(line: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if not depth:
            return at + 1
    return len(line)
