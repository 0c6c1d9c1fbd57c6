"""The report of a suite: its rows, and the machine and versions that they were measured on."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import jax

from benchmarks.measure import Options
from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.fields import require_choice
from lightning_jax.runtime import files, huge_pages, tables
from lightning_jax.runtime.checkout import git_commit

# Each is a module of this package with `run(options)`; loaded when asked for.
SUITES = (
    "attention",
    "moe",
    "train",
    "serve_small",
    "startup",
    "data",
    "kernels_tpu",
    "tpu_program",
    "kernels_gpu",
)
PROFILED = ("attention", "moe", "train")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


def run_suite(name: str, options: Options) -> dict[str, Any]:
    """Runs a suite.

    Returns:
      `suite`, `date`, `commit`, `rounds`, `machine`, `versions` and `rows`.

    Raises:
      UserError: no such suite, a profile of one that makes none, or no row of the suite is wanted.
    """
    require_choice("suite", name, SUITES)
    if options.profile and name not in PROFILED:
        raise UserError(f"--profile is for the suites {', '.join(PROFILED)}, not {name}")
    suite = importlib.import_module(f"benchmarks.{name}")

    def measure() -> list[dict[str, Any]]:
        rows = suite.run(options)
        if not rows:
            raise UserError(
                no_such_rows(name, options) or f"suite = {name!r}: nothing was measured"
            )
        return rows

    return describe(name, measure, options.rounds)


def describe(name: str, measure: Callable[[], list[dict[str, Any]]], rounds: int) -> dict[str, Any]:
    """Measures, and says on what: `run_suite`'s result for the rows that `measure` returns."""
    load = os.getloadavg()[0]
    rows = measure()
    return {
        "suite": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit()[0],
        "rounds": rounds,
        "machine": machine() | {"load_before": round(load, 2)},
        "versions": versions(),
        "rows": rows,
    }


def no_such_rows(suite: str, options: Options) -> str | None:
    """Returns a line that names a part of `options.only` that no row's name has; else None."""
    for part in options.only:
        if not any(part in row for row in options.asked):
            rows = (
                suggest(part, sorted(options.asked)) if options.asked else "none: no row is named"
            )
            return f"only = {part!r}: no row of the suite {suite} has that in its name, {rows}"
    return None


def machine() -> dict[str, Any]:
    """The processor, the memory, and the devices of jax."""
    device = jax.devices()[0]
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    vectors = [flag for flag in _VECTORS if flag in _cpu_field("flags").split()]
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "vectors": " ".join(vectors) or None,
        "memory_gb": round(num_bytes / 1e9, 1),
        "huge_pages": huge_pages.has_huge_pages(),
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


# The flags that decide the speed of a matrix product on x86.
_VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages measured; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def write(report: dict[str, Any], path: str | Path) -> None:
    """Writes the report as JSON; makes the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, report)


def print_tables(report: dict[str, Any], file: TextIO | None = None) -> None:
    """Prints the rows, one table for each value of their key `table`, to standard error."""
    rows: Sequence[dict[str, Any]] = report["rows"]
    for title in dict.fromkeys(row.get("table", report["suite"]) for row in rows):
        inside = [row for row in rows if row.get("table", report["suite"]) == title]
        _print_table(title, [_without(row, "table", "profile") for row in inside], file)
    for row in rows:
        if "profile" in row:
            _print_table(f"{row['name']}: where its milliseconds go", _by_kind(row), file)


def _print_table(title: str, rows: Sequence[dict[str, Any]], file: TextIO | None) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    tables.print_table([columns, *cells], title, file=file)


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _by_kind(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The profiles of a row as a table: a line for each kind of work, a column per program."""
    profiles: dict[str, dict[str, float]] = row["profile"]
    kinds = dict.fromkeys(kind for profile in profiles.values() for kind in profile)
    return [
        {"work": kind} | {name: profile.get(kind) for name, profile in profiles.items()}
        for kind in kinds
    ]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else _long(value)


def _long(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)
