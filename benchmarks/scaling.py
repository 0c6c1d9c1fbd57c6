"""The tables of docs/scaling.md, from files that `experiments.aot_compile` wrote.

python -m benchmarks.scaling benchmarks/results/aot_*.json
python -m benchmarks.scaling --strong FILES     # one train step on more and more chips
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


_STRONG = (
    "slice",
    "chips",
    "mesh",
    "fits",
    "peak GiB",
    "GB moved",
    "step ms",
    "efficiency",
    "as scheduled ms",
    "efficiency",
)


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Cells of each program of a report."""
    return [[*_where(found), *_cells(name, entry)] for name, entry in found["programs"].items()]


def strong_rows(reports: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of the train step of each report, by chips.

    Efficiency is the chips times the time on the fewest chips, over that here: 100% if twice the
    chips take half the time.
    """
    reports = sorted(reports, key=lambda found: found["chips"])
    base = {
        name: reports[0]["chips"] * reports[0]["programs"]["train"]["roofline"][name]
        for name in ("step_s", "scheduled_s")
    }
    table = []
    for found in reports:
        entry = found["programs"]["train"]
        times = [
            cell
            for name, first in base.items()
            for cell in (
                f"{entry['roofline'][name] * 1e3:,.0f}",
                f"{first / found['chips'] / entry['roofline'][name]:.0%}",
            )
        ]
        held = _held(entry)
        table.append([*_where(found), *held, *times])
    return table


def _where(found: dict[str, Any]) -> list[str]:
    mesh = " ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    return [found["topology"], str(found["chips"]), mesh or "-"]


def _held(entry: dict[str, Any]) -> list[str]:
    moved = sum(row["bytes"] for row in entry["collectives"] if not row["in_open_loop"])
    fits = "yes" if entry["fits"] else "no"
    return [fits, f"{entry['memory']['peak'] / 2**30:.1f}", _short(moved / 1e9)]


def _cells(name: str, entry: dict[str, Any]) -> list[str]:
    shape = " ".join(
        f"{key} {value:,}" for key, value in entry["shape"].items() if isinstance(value, int)
    )
    time = entry["roofline"]
    return [
        f"{name}: {shape}",
        *_held(entry),
        *(_short(time[key] * 1e3) for key in ("compute_s", "hbm_s", "ici_s", "exposed_s")),
        *(f"{time[key]:.1%}" for key in ("mfu", "scheduled_mfu")),
        f"{entry['compile']['wall_s']:.0f}",
    ]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(reports: list[dict[str, Any]], *, strong: bool = False) -> str:
    """All programs of reports, or with `strong` their train steps, as a table of Markdown."""
    header = _STRONG if strong else _HEADER
    body = strong_rows(reports) if strong else [row for found in reports for row in rows(found)]
    lines = [header, ("---",) * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    names = sys.argv[1:]
    strong = names[:1] == ["--strong"]
    print(table([files.read_json(path) for path in names[strong:]], strong=strong))
