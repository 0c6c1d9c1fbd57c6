"""The table of docs/scaling.md, from files that `experiments.aot_compile` wrote.

python -m benchmarks.scaling benchmarks/results/aot_*.json
"""

from __future__ import annotations

import sys
from typing import Any

from lightning_jax.runtime import files

_HEADER = (
    "slice",
    "chips",
    "mesh",
    "program",
    "fits",
    "peak GiB",
    "GB moved",
    "compute ms",
    "HBM ms",
    "links ms",
    "exposed ms",
    "MFU",
    "as scheduled",
    "compiled in s",
)


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Cells of each program of a report."""
    mesh = " ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    return [
        [found["topology"], str(found["chips"]), mesh or "-", *_cells(name, entry)]
        for name, entry in found["programs"].items()
    ]


def _cells(name: str, entry: dict[str, Any]) -> list[str]:
    shape = " ".join(
        f"{key} {value:,}" for key, value in entry["shape"].items() if isinstance(value, int)
    )
    time = entry["roofline"]
    moved = sum(row["bytes"] for row in entry["collectives"] if not row["in_open_loop"])
    return [
        f"{name}: {shape}",
        "yes" if entry["fits"] else "no",
        f"{entry['memory']['peak'] / 2**30:.1f}",
        f"{moved / 1e9:.3g}",
        *(f"{time[key] * 1e3:,.3g}" for key in ("compute_s", "hbm_s", "ici_s", "exposed_s")),
        *(f"{time[key]:.1%}" for key in ("mfu", "scheduled_mfu")),
        f"{entry['compile']['wall_s']:.0f}",
    ]


def table(reports: list[dict[str, Any]]) -> str:
    """All programs of reports as a table of Markdown."""
    lines = [_HEADER, ("---",) * len(_HEADER)]
    lines += [tuple(row) for found in reports for row in rows(found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table([files.read_json(path) for path in sys.argv[1:]]))
