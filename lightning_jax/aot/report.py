"""What a compiled program says: memory, FLOPs, bytes, collectives, a roofline. JSON and tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from lightning_jax.aot import collectives, costs, hlo, loops, memory, roofline
from lightning_jax.aot.roofline import Network, Transfer

Rows = list[list[str]]
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a program besides its text.

    Attributes:
      mesh: size of each axis within one slice, in order.
      slices: number of slices.
      network: the devices of one slice.
      model_flops, device_flops: of one device, see `programs.Lowered`.
      least_bytes: that a device moves at least: its arguments, and results in other places.
      memory: bytes by name, see `aot.memory`.
    """

    mesh: dict[str, int]
    slices: int
    network: Network
    model_flops: float
    device_flops: float
    least_bytes: float
    memory: dict[str, int | None]


def describe(text: str, assignment: str, facts: Facts) -> dict[str, Any]:
    """Reads a compiled program.

    Args:
      text: of the scheduled module.
      assignment: the compiler's dump of its buffers.
      facts: the rest.

    Returns:
      Of one device and one call: `memory` and `fits`, `largest_buffers`, `flops` and `bytes` (ours,
      and of the schedule), `collectives` by kind and axes, `open_loops` (loops of unknown length,
      of which `collectives` shows one turn and all else none), and the `roofline`.
    """
    program = hlo.parse(text)
    chip = facts.network.chip
    flops, scheduled_bytes, kernels = _schedule(program)
    turns_of = {visit.computation: visit.turns for visit in loops.visits(program)}

    @functools.cache
    def seconds_of(computation: str, op_name: str) -> float:
        op = program.by_name[computation][op_name]
        products = costs.flops(program, computation, op) / chip.peak
        moved = costs.hbm_bytes(program, computation, op, turns_of[computation])
        return max(products, moved / chip.bandwidth)

    moved = roofline.transfers(
        collectives.find(program, facts.mesh, facts.slices),
        facts.network,
        lambda computation, op: seconds_of(computation, op.name),
    )
    peak = facts.memory["peak"]
    return {
        "fits": facts.memory["program"] is not None and peak is not None and peak <= chip.hbm,
        "memory": facts.memory | {"hbm": chip.hbm},
        "largest_buffers": memory.largest(assignment, program),
        "flops": {
            "model": facts.model_flops,
            "device": facts.device_flops,
            "products": flops,
            "kernel_calls": kernels,
        },
        "bytes": {"least": facts.least_bytes, "scheduled": scheduled_bytes},
        "open_loops": _open_loops(program),
        "collectives": _by_kind(moved),
        "roofline": roofline.times(
            chip,
            flops=max(flops, facts.device_flops),
            hbm_bytes=max(scheduled_bytes, facts.least_bytes),
            moved=moved,
            model_flops=facts.model_flops,
        ),
    }


def _schedule(program: hlo.Program) -> tuple[float, float, int]:
    """FLOPs of products, bytes, and calls of kernels, whose FLOPs are unknown, of one call.

    Open loops are left out: rounds of an exchange after the first are an exception.
    """
    flops = num_bytes = 0.0
    kernels = 0
    for computation, times, is_open, turns in loops.visits(program):
        if is_open:
            continue
        for op in program.computations[computation]:
            flops += times * costs.flops(program, computation, op)
            num_bytes += times * costs.hbm_bytes(program, computation, op, turns)
            kernels += times * (costs.KERNEL in op.attributes)
    return flops, num_bytes, kernels


def _open_loops(program: hlo.Program) -> list[str]:
    found = set()
    for computation, *_ in loops.visits(program):
        for op in program.computations[computation]:
            if op.opcode == "while" and loops.trip_count(program, computation, op) is None:
                found.add(op.source or op.name)
    return sorted(found)


def _by_kind(moved: Sequence[Transfer]) -> list[dict[str, Any]]:
    """Transfers of one kind over the same axes, added up; those of open loops by themselves."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for move in moved:
        collective = move.collective
        key = collective.kind, collective.axes, collective.is_open
        row = groups.setdefault(
            key,
            {
                "kind": collective.kind,
                "axes": list(collective.axes),
                "in_open_loop": collective.is_open,
                "runs": 0,
                "asynchronous_runs": 0,
                "bytes": 0.0,
                "seconds": 0.0,
                "hidden_seconds": 0.0,
            },
        )
        row["runs"] += collective.times
        row["asynchronous_runs"] += collective.times * collective.is_async
        row["bytes"] += collective.times * collective.moved_bytes
        row["seconds"] += collective.times * move.seconds
        row["hidden_seconds"] += collective.times * move.hidden
    return sorted(groups.values(), key=lambda row: row["bytes"], reverse=True)


def memory_rows(found: dict[str, Any]) -> Rows:
    """Rows, header first: the memory of each program of a report."""
    names = ("arguments", "temporaries", "program", "peak", "hbm")
    rows = [["program", "sizes", "fits", *(f"{name} GiB" for name in names), "compiled in s"]]
    for name, entry in found["programs"].items():
        shape = " ".join(f"{key}={value}" for key, value in entry["shape"].items())
        held = [entry["memory"][key] for key in names]
        sizes = ["-" if size is None else f"{size / _GIB:.3g}" for size in held]
        fits = "yes" if entry["fits"] else "no"
        rows.append([name, shape, fits, *sizes, f"{entry['compile']['wall_s']:.0f}"])
    return rows


def time_rows(found: dict[str, Any]) -> Rows:
    """Rows, header first: the roofline of each program of a report."""
    names = ("compute", "hbm", "ici", "exposed", "step", "scheduled", "sum")
    rows = [["program", "GB moved", *(f"{name} ms" for name in names), "MFU", "as scheduled"]]
    for name, entry in found["programs"].items():
        time = entry["roofline"]
        moved = sum(row["bytes"] for row in entry["collectives"] if not row["in_open_loop"])
        times = [f"{time[f'{key}_s'] * 1e3:.3g}" for key in names]
        shares = [f"{time[key]:.1%}" for key in ("mfu", "scheduled_mfu")]
        rows.append([name, f"{moved / 1e9:.3g}", *times, *shares])
    return rows


def collective_rows(found: dict[str, Any]) -> Rows:
    """Rows, header first: the collectives of each program of a report."""
    rows = [["program", "collective", "over", "runs", "asynchronous", "MB moved", "ms", "hidden"]]
    for name, entry in found["programs"].items():
        for row in entry["collectives"]:
            hidden = row["hidden_seconds"] / row["seconds"] if row["seconds"] else 0.0
            rows.append(
                [
                    name,
                    row["kind"] + " (a turn of an open loop)" * row["in_open_loop"],
                    " ".join(row["axes"]),
                    str(row["runs"]),
                    str(row["asynchronous_runs"]),
                    f"{row['bytes'] / 1e6:.4g}",
                    f"{row['seconds'] * 1e3:.3g}",
                    f"{hidden:.0%}",
                ]
            )
    return rows


def buffer_rows(found: dict[str, Any]) -> Rows:
    """Rows, header first: the largest buffers of each program of a report."""
    rows = [["program", "kind", "arrays", "number", "MiB each", "from"]]
    for name, entry in found["programs"].items():
        for row in entry["largest_buffers"]:
            size = f"{row['bytes'] / 2**20:.1f}"
            source = row["source"][-70:]
            rows.append([name, row["kind"], row["arrays"], str(row["count"]), size, source])
    return rows
