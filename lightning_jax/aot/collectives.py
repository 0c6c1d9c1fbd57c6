"""The collectives of a compiled program: what they move, over which axes, and what runs meanwhile.

A TPU writes a reduce-scatter as an all-reduce inside a fusion named `all-reduce-scatter`, and may
spread one asynchronous all-gather over several fusions: one that starts it, those that carry it
along beside a product, one that ends it. Each counts once here, as what it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from lightning_jax.aot import groups
from lightning_jax.aot.costs import COLLECTIVES
from lightning_jax.aot.hlo import Op, Program
from lightning_jax.aot.loops import visits

# A transfer between slices is a pair of send and receive that meet by name in the hosts.
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_MEETING = re.compile(r'_xla_host_transfer_rendezvous="[^"]*"')
# Ops that hand on the state of a transfer which has started.
_HANDS_ON = ("bitcast", "get-tuple-element", "opt-barrier", "tuple")
_START, _DONE = 'custom_call_target="AsyncCollectiveStart"', '"AsyncCollectiveDone"'


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective op.

    Attributes:
      kind: one of `costs.COLLECTIVES`.
      source: path of the operation in the model's code.
      groups: devices [groups, members]; for a permute its pairs (source, target).
      axes: axes of the mesh that it runs over.
      operand_bytes: bytes of its operands on one device.
      times: runs in one call of the program.
      is_open: within a loop of unknown length, of which one turn is counted.
      is_async: whether other ops may run until it is done.
      between: (computation, op) scheduled between its start and its end.
      across_slices: between slices, over the hosts' network; the members are then slices.
    """

    kind: str
    source: str
    groups: np.ndarray
    axes: tuple[str, ...]
    operand_bytes: int
    times: int
    is_open: bool
    is_async: bool
    between: tuple[tuple[str, Op], ...]
    across_slices: bool = False

    @property
    def members(self) -> int:
        """Devices of one group."""
        return self.groups.shape[1]

    @property
    def moved_bytes(self) -> float:
        """Bytes that one device sends in one run, by an algorithm that sends the fewest.

        A ring for gathers and reductions; of a permute the mean over devices.
        """
        n, size = self.members, self.operand_bytes
        if self.kind == "collective-permute":
            # A permute names only the devices that send.
            return size * float((self.groups[:, 0] != self.groups[:, 1]).mean())
        return (
            size
            * {
                "all-gather": n - 1,
                "reduce-scatter": (n - 1) / n,
                "all-reduce": 2 * (n - 1) / n,
                "all-to-all": (n - 1) / n,
                "ragged-all-to-all": (n - 1) / n,
            }[self.kind]
        )


def find(program: Program, mesh: Mapping[str, int], slices: int = 1) -> list[Collective]:
    """Returns all collectives that move something between devices.

    Args:
      program: compiled for the devices of the mesh.
      mesh: the size of each axis within one slice, in order; the program numbers the devices of
        one slice.
      slices: number of slices, which transfers between hosts join.
    """
    found = []
    for computation, times, is_open, _ in visits(program):
        found += _across_slices(program, computation, times, is_open, slices)
        for kind, op, inside, between in _in_computation(program, computation):
            members = groups.groups_of(op, int(np.prod(list(mesh.values()))))
            axes = groups.axes_of(members, mesh)
            if not axes:
                continue
            found.append(
                Collective(
                    kind=kind,
                    source=op.source,
                    groups=members,
                    axes=axes,
                    operand_bytes=sum(
                        array.num_bytes for array in program.operand_arrays(inside, op)
                    ),
                    times=times,
                    is_open=is_open,
                    is_async=between is not None,
                    between=between or (),
                )
            )
    return found


def _across_slices(
    program: Program, computation: str, times: int, is_open: bool, slices: int
) -> Iterator[Collective]:
    """What a computation sends to the hosts, and receives from them, for other slices."""
    ops = program.computations[computation]
    for place, op in enumerate(ops):
        kind = _MEGASCALE.search(op.attributes) if op.opcode == "send" else None
        if not kind:
            continue
        meeting = _MEETING.search(op.attributes)
        received = {
            other.name
            for other in ops
            if other.opcode == "recv" and meeting and meeting[0] in other.attributes
        }
        ends = [at for at, other in enumerate(ops) if received & set(other.operands)]
        yield Collective(
            kind=kind[1].lower().replace("_", "-"),
            source=op.source,
            groups=np.arange(slices)[None],
            axes=("replica",),
            operand_bytes=op.arrays[0].num_bytes,
            times=times,
            is_open=is_open,
            is_async=True,
            between=tuple((computation, op) for op in ops[place + 1 : min(ends, default=place)]),
            across_slices=True,
        )


def _in_computation(
    program: Program, computation: str
) -> Iterator[tuple[str, Op, str, tuple[tuple[str, Op], ...] | None]]:
    """Yields (kind, the op, the computation it stands in, what lies between start and end).

    The last is None for a collective that has no start and end.
    """
    ops = program.computations[computation]
    for place, op in enumerate(ops):
        kind = op.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            if kind == op.opcode:
                yield kind, op, computation, None
            else:
                yield kind, op, computation, _between(program, computation, place, op)
        elif op.opcode in ("fusion", "async-start"):
            for name, inner in program.inside(op):
                if inner.opcode not in COLLECTIVES:
                    continue
                role = "start" if op.opcode == "async-start" else _role(program, name, inner)
                kind = "reduce-scatter" if "reduce-scatter" in name else inner.opcode
                if role == "start":
                    yield kind, inner, name, _between(program, computation, place, inner)
                elif role == "whole":
                    yield kind, inner, name, None


def _role(program: Program, computation: str, op: Op) -> str:
    """Whether a collective inside a fusion is its start, a later piece, or the whole of it."""
    if "all-reduce-scatter" in computation:
        return "whole"
    for user in program.computations[computation]:
        if op.name in user.operands:
            if _START in user.attributes:
                return "start"
            if _DONE in user.attributes or user.opcode == "tuple":
                return "piece"
    return "whole"


def _between(
    program: Program, computation: str, start: int, collective: Op
) -> tuple[tuple[str, Op], ...]:
    """What is scheduled after the op at `start` until the transfer that it starts has ended.

    If it does not end in this computation: until the end of that.
    """
    ops = program.computations[computation]
    channel = collective.attribute("channel_id")
    chain, end = {ops[start].name}, len(ops)
    for place in range(start + 1, len(ops)):
        op = ops[place]
        if chain.isdisjoint(op.operands):
            continue
        if op.opcode in _HANDS_ON:
            chain.add(op.name)
        elif op.opcode.endswith("-done"):
            end = place
            break
        elif op.opcode == "fusion":
            pieces = [inner for _, inner in program.inside(op)]
            if not any(inner.attribute("channel_id") == channel for inner in pieces):
                continue
            if any(_DONE in inner.attributes for inner in pieces):
                end = place
                break
            chain.add(op.name)
    return tuple((computation, op) for op in ops[start + 1 : end])
