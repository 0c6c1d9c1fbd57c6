"""Static cycles of a TPU program, without a TPU: libtpu compiles it and profiles its own schedule.

The profiler walks the scalar program of every op (grid, branches and loops on program ids, data
movement with its latency) and adds up the cycles of the schedule. It leaves out shared bandwidth of
the main memory, clocks under load and launch costs, and takes a scalar that is read from memory as
zero: kernels must derive their control flow from program ids, and `executed` shows the share that
ran. The cycles rank kernels; they are no measured time. libtpu reads its flags once, so every case
is a process of its own.

    python -m benchmarks.tpu_static MODULE CASE TOPOLOGY FOLDER    # the child
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from lightning_jax.aot import chips, topologies
from lightning_jax.aot.chips import Chip

# Bytes that a child may use.
_MEMORY = 12 * 2**30


# Those that libtpu's profiler models.
CHIPS = {name: chips.CHIPS[name] for name in ("v5e", "v5p", "v6e")}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Attributes:
      function: the function to compile.
      arguments: shapes and dtypes.
      flops: useful FLOPs, of visible pairs only.
      traffic: least bytes that move to and from the main memory.
      pairs: pairs of tiles (in the code, run) of the kernel with products, to check the tiles that
        the profiler ran; None if not known.
    """

    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    flops: float
    traffic: float
    pairs: tuple[int, int] | None = None


def environment(folder: Path | None = None, trace: bool = False) -> dict[str, str]:
    """The environment in which libtpu compiles without a TPU; dumps go to `folder`."""
    flags = []
    if folder is not None:
        flags = [
            f"--xla_jf_dump_to={folder}/llo",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=.*(final|pre-delay|packed-bundles-post-ra).*",
            f"--xla_jf_dump_static_llo_profile_to={folder}/profile",
        ]
    if trace:
        flags.append("--xla_tpu_impure_dump_unrolled_bundles=true")
    return topologies.environment(flags)


def measure(module: str, name: str, chip: str, *, trace: bool) -> dict[str, Any]:
    """Compiles case `name` of `module.cases(chip)` and reads the profile.

    Args:
      module: full name of a module with `cases(chip) -> dict[str, Callable[[], Case]]`.
      name: the case.
      chip: a key of `CHIPS`.
      trace: also count the tiles that ran; the trace grows with the cycles.

    Returns:
      `cycles` of all ops, `us` at the chip's clock, `hbm_us` for the least traffic, `bound_us`
      (the larger), `mxu` (useful FLOPs over those of the cycles), `compile_s` (processor time,
      profile included), and of the slowest kernel its name and cycles, `vmem_kib`, `bundles`,
      `spills`, `block` (bundles of its longest straight piece), `*_slots` (share of the issue slots
      used there) and, if traced, `executed` (pairs that ran, over those that should). If the
      profiler fails, only `error`.
    """
    with tempfile.TemporaryDirectory(prefix="tpu_static_") as folder:
        path = Path(folder)
        for part in ("llo", "profile"):
            (path / part).mkdir()
        command = [sys.executable, "-m", __spec__.name, module, name, chip, folder]
        found = subprocess.run(
            command, env=environment(path, trace), capture_output=True, text=True, check=False
        )
        if found.returncode:
            return {"error": first_error(found.stderr)}
        return _read(path, CHIPS[chip], trace)


def first_error(log: str) -> str:
    """Returns the line of a child's log that says why it failed."""
    lines = [line for line in log.splitlines() if re.search(r"failed|rror|exceed|alloc", line)]
    return (lines or log.splitlines() or ["no output"])[0][:300]


def _read(path: Path, chip: Chip, trace: bool) -> dict[str, Any]:
    stats = json.loads((path / "stats.json").read_text())
    ops = _cycles((path / "program.txt").read_text())
    cycles = sum(count for count, _ in ops.values())
    kernels = {name: op for name, op in ops.items() if list(path.glob(f"profile/{name}_*"))}
    seconds = cycles / chip.clock
    floor = stats["traffic"] / chip.bandwidth
    slowest = max(kernels or ops, key=lambda name: ops[name][0])
    row = {
        "cycles": cycles,
        "kernel": slowest,
        "kernel_cycles": ops[slowest][0],
        "us": round(seconds * 1e6, 1),
        "hbm_us": round(floor * 1e6, 1),
        "bound_us": round(max(seconds, floor) * 1e6, 1),
        "mxu": round(stats["flops"] / (cycles * chip.flops * chip.cores), 4),
        "vmem_kib": ops[slowest][1] // 1024,
        "compile_s": stats["seconds"],
    }
    row |= _schedule(path, slowest)
    if trace and stats["pairs"]:
        row["executed"] = _executed(path, slowest, *stats["pairs"])
    return row


def _cycles(program: str) -> dict[str, tuple[int, int]]:
    """Cycles and bytes of fast memory of every op that libtpu has profiled."""
    found = {}
    # Attributes may hold line breaks, so the text after a name is read up to the next name.
    for text in re.split(r"\n(?=\s+(?:ROOT )?%[\w.\-]+ = )", program):
        name = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = ", text)
        count = re.search(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"', text)
        if name and count:
            memory = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', text)
            sizes = re.findall(r'"size":"(\d+)"', memory[1]) if memory else []
            found[name[1]] = int(count[1]), sum(map(int, sizes))
    return found


def _schedule(path: Path, kernel: str) -> dict[str, Any]:
    """Slot use, spills and size of a kernel's final schedule."""
    table = _only(path, f"llo/*-{kernel}-*-pre-delay_hlo-static-per-bundle-utilization.txt")
    bundles = _only(path, f"llo/*-{kernel}-*-packed-bundles-post-ra.txt")
    if not table or not bundles:
        return {}
    lines = table.read_text().splitlines()
    names = [x.strip().split(":")[-1] for x in lines[1].split(",")]
    capacity, *rows = (
        [int(x) for x in line.split()] for line in lines[2:] if line.strip()[:1].isdigit()
    )
    code = [
        line
        for line in bundles.read_text().splitlines()
        if re.match(r"\s*(0x)?[0-9a-f]+ .*{", line)
    ]
    # A branch takes effect four bundles later.
    ends = [0, *(at + 5 for at, line in enumerate(code) if "sbr.rel" in line), len(rows)]
    start, end = max(zip(ends, ends[1:], strict=False), key=lambda ends: ends[1] - ends[0])
    used = zip(names, capacity, zip(*rows[start:end], strict=True), strict=True)
    return {
        "bundles": len(rows),
        "spills": sum(row[names.index("SPILL")] for row in rows),
        "block": end - start,
        **{
            f"{name.lower()}_slots": round(sum(column) / (end - start) / most, 3)
            for name, most, column in used
        },
    }


def _executed(path: Path, kernel: str, in_code: int, expected: int) -> float | None:
    """Pairs of tiles that ran in the profile, over those that should have run."""
    trace = path / f"profile/{kernel}_bundles.txt"
    final = _only(path, f"llo/*-{kernel}-*-final_bundles.txt")
    if not trace.exists() or not final:
        return None
    with trace.open() as lines:
        ran = sum(line.count("vmatmul") for line in lines)
    return round(ran / final.read_text().count("vmatmul") * in_code / expected, 3)


def _only(path: Path, pattern: str) -> Path | None:
    found = [file for file in path.glob(pattern) if "schedule-analysis" not in file.name]
    return found[0] if found else None


def compile_case(case: Case, chip: str) -> Any:
    """Compiles for one device of a chip; the process needs the variables of `environment`."""
    devices = topologies.Slice.parse(CHIPS[chip].topology).devices()
    sharding = SingleDeviceSharding(devices[0])
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in case.arguments]
    return jax.jit(case.function).lower(*arguments).compile()


def _child(module: str, name: str, chip: str, folder: str) -> None:
    # The profiler may ask for more memory than the machine has; then only this process fails.
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    case = importlib.import_module(module).cases(chip)[name]()
    start = os.times()
    compiled = compile_case(case, chip)
    end = os.times()
    (Path(folder) / "program.txt").write_text(compiled.as_text())
    stats = {
        "flops": case.flops,
        "traffic": case.traffic,
        "pairs": case.pairs,
        "seconds": round(end.user + end.system - start.user - start.system, 1),
    }
    (Path(folder) / "stats.json").write_text(json.dumps(stats))


if __name__ == "__main__":
    _child(*sys.argv[1:])
