"""The report of a sweep: which differences are real, and what they cost: page, table, JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_jax.ablation.report import cells, page, pictures
from lightning_jax.ablation.report.summary import summarize
from lightning_jax.ablation.results import Run, csv_text
from lightning_jax.ablation.sweep import FILE, Sweep, build_sweep
from lightning_jax.config.errors import UserError, some_of
from lightning_jax.runtime import invocation, tables
from lightning_jax.runtime.files import read_json, write_file, write_json

# What makes the report, as another reader would call it.
_PROGRAM = "experiments/report.py"


def read_sweep(workdir: str | os.PathLike[str]) -> Sweep:
    """Reads `sweep.json` of a sweep's folder.

    Raises:
      UserError: it is not the folder of a sweep.
    """
    path = Path(workdir) / FILE
    if not path.exists():
        raise UserError(f"workdir = {str(workdir)!r}: must be a folder that experiments.sweep made")
    try:
        return build_sweep(read_json(path))
    except UserError as error:
        raise UserError(f"{path}: not a sweep ({error})") from error


def has_routers(sweep: Sweep) -> bool:
    """Whether any arm has experts."""
    return any(sweep.config(Run(arm, sweep.seeds[0])).model.moe.num_experts for arm in sweep.arms)


def write_report(workdir: str | os.PathLike[str], *, routers: bool = True) -> dict[str, Any]:
    """Writes `report.html`, `report.json`, `report.csv` and `report_<figure>.png` into the folder.

    Args:
      workdir: the sweep's folder; the sweep may still be running.
      routers: draw the routers of arms with experts, which loads a run of each.

    Returns:
      The result of `summary.summarize`, and `command`, which makes the report again.

    Raises:
      UserError: it is not the folder of a sweep, or no run in it has a result.
    """
    root = Path(workdir).absolute()
    sweep = read_sweep(root)
    report = {
        **summarize(sweep, root),
        "command": invocation.recorded([_PROGRAM, f"--workdir={os.fspath(workdir)}"]),
    }
    if not any(arm["seeds"] for arm in report["arms"]):
        reasons = some_of([*dict.fromkeys(run["reason"] for run in report["missing"])])
        raise UserError(f"workdir = {str(workdir)!r}: no run of the sweep has a result ({reasons})")
    drawn = pictures.draw(report, root)
    routed, texts = pictures.draw_routers(report, sweep, root) if routers else ([], {})
    drawn += routed
    text = page.build(report, drawn, texts)  # Nothing is written of a report that has no page.
    write_json(root / "report.json", report)
    write_file(root / "report.csv", csv_text(cells.csv_rows(report)))
    files = {f"report_{picture.name}.png": picture.png for picture in drawn}
    for old in root.glob("report_*.png"):
        if old.name not in files:
            old.unlink()
    for name, image in files.items():
        write_file(root / name, image)
    write_file(root / "report.html", text)
    return report


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the answer, the tables, the notes and what is missing on standard error."""
    print("\n".join([report["question"], "", report["headline"]]), file=sys.stderr)
    for arm in report["arms"]:
        print(f"- {arm['sentence']}", file=sys.stderr)
    tables.print_table(cells.quality_rows(report), f"Quality, against {report['baseline']}")
    tables.print_table(cells.cost_rows(report), f"Cost per token at {report['context'] // 1024}K")
    tables.print_table(cells.training_rows(report), "Training, of one run")
    tables.print_table(cells.time_rows(report), "Time")
    if report["inference"]:
        tables.print_table(cells.inference_rows(report), "Inferred with another routing")
    _, *lost = cells.missing_rows(report)
    for line in [*report["notes"], *[f"No result: {runs} ({reason})." for runs, reason in lost]]:
        print(line, file=sys.stderr)
