"""The report of a sweep: held-out bits per byte by arm, paired differences, cost, plots."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lightning_jax.ablation import page
from lightning_jax.ablation.results import COST_CONTEXT, METRIC, Run, outcome
from lightning_jax.ablation.sweep import Sweep, build_sweep
from lightning_jax.config.errors import UserError
from lightning_jax.runtime import tables
from lightning_jax.runtime.files import read_json, write_file, write_json

_CONFIDENCE = 0.95
_COSTS = (
    "params_total",
    "params_active",
    "kv_bytes_per_token",
    "attention_flops_per_token",
    "experts_per_token",
    "tokens_per_second",
    "seconds",
)


def paired_difference(
    values: Sequence[float], baseline: Sequence[float]
) -> tuple[float, float | None]:
    """Mean of paired differences and half the width of its 95% t-interval.

    The half width is t(0.975, n - 1) s / sqrt(n), with s the standard deviation of the n
    differences (Student 1908); None for a single pair, which has no spread.
    """
    differences = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    count, mean = len(differences), float(differences.mean())
    if count < 2:
        return mean, None
    quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1)
    return mean, float(quantile * differences.std(ddof=1) / math.sqrt(count))


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Returns mean, sample standard deviation (None for one value), least and greatest."""
    array = np.asarray(values, np.float64)
    deviation = float(array.std(ddof=1)) if len(array) > 1 else None
    return {
        "mean": float(array.mean()),
        "std": deviation,
        "min": float(array.min()),
        "max": float(array.max()),
    }


def read_sweep(workdir: str | os.PathLike[str]) -> Sweep:
    """Reads `sweep.json` of a sweep's folder.

    Raises:
      UserError: it is not the folder of a sweep.
    """
    path = Path(workdir) / "sweep.json"
    if not path.exists():
        raise UserError(f"workdir = {str(workdir)!r}: must be a folder that experiments.sweep made")
    return build_sweep(read_json(path))


def summarize(sweep: Sweep, workdir: Path) -> dict[str, Any]:
    """Computes everything that the report shows, from the runs' folders.

    Returns `question`, `baseline`, `metric`, `context`, `seeds`; `arms`, one dict each: `arm`,
    `changes`, `seeds` (finished), and where there are any: `bits_per_byte` (see `spread`;
    `by_seed` in the order of `seeds`), `domains` (mean bits per byte by domain), `difference` to
    the baseline over the seeds that both have (`mean`, `low`, `high`, `seeds`, `verdict`; None for
    the baseline or without common seeds) and `costs` (means over seeds); `missing`, the runs
    without a result and why; `notes`.
    """
    rows: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in sweep.arms}
    missing = []
    for run in sweep.runs():
        row, reason = outcome(run, workdir)
        if row is None:
            missing.append({"arm": run.arm, "seed": run.seed, "reason": reason})
        else:
            rows[run.arm][run.seed] = row
    arms = [_arm_summary(sweep, arm, rows) for arm in sweep.arms]
    return {
        "question": sweep.question,
        "baseline": sweep.baseline,
        "metric": METRIC,
        "context": COST_CONTEXT,
        "seeds": list(sweep.seeds),
        "arms": arms,
        "missing": missing,
        "notes": _notes(sweep, rows, missing),
    }


def _arm_summary(
    sweep: Sweep, arm: str, rows: dict[str, dict[int, dict[str, Any]]]
) -> dict[str, Any]:
    mine, others = rows[arm], rows[sweep.baseline]
    summary: dict[str, Any] = {"arm": arm, "changes": sweep.arms[arm], "seeds": list(mine)}
    if not mine:
        return summary
    values = [row[METRIC] for row in mine.values()]
    summary[METRIC] = {**spread(values), "by_seed": values}
    names = dict.fromkeys(name for row in mine.values() for name in row["domains"])
    summary["domains"] = {
        name: _mean([row["domains"].get(name, {}).get(METRIC) for row in mine.values()])
        for name in names
    }
    summary["difference"] = None
    common = [seed for seed in mine if seed in others]
    if arm != sweep.baseline and common:
        pairs = [(mine[seed][METRIC], others[seed][METRIC]) for seed in common]
        mean, half = paired_difference(*zip(*pairs, strict=True))
        summary["difference"] = {
            "mean": mean,
            "low": None if half is None else mean - half,
            "high": None if half is None else mean + half,
            "seeds": common,
            "verdict": _verdict(mean, half),
        }
    summary["costs"] = {name: _mean([row[name] for row in mine.values()]) for name in _COSTS}
    return summary


def _verdict(mean: float, half: float | None) -> str:
    if half is None:
        return "one seed"
    if abs(mean) <= half:
        return "unclear"
    return "better" if mean < 0 else "worse"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _notes(
    sweep: Sweep, rows: dict[str, dict[int, dict[str, Any]]], missing: list[dict[str, Any]]
) -> list[str]:
    """Caveats that a reader must know before believing the table."""
    notes = []
    found = [row for of_arm in rows.values() for row in of_arm.values()]
    if missing:
        total = len(sweep.runs())
        notes.append(f"Incomplete: {len(missing)} of {total} runs have no result.")
    if not rows[sweep.baseline]:
        notes.append(f"The baseline {sweep.baseline!r} has no result: no differences.")
    if max((len(of_arm) for of_arm in rows.values()), default=0) == 1:
        notes.append("One seed an arm: no intervals; differences may be noise.")
    sizes = {row["bytes"] for row in found}
    if len(sizes) > 1:
        least, most = f"{min(sizes):,}", f"{max(sizes):,}"
        notes.append(
            f"Held-out text differs between runs ({least} to {most} bytes): not comparable."
        )
    if sum(len(of_arm) > 1 for of_arm in rows.values()) > 2:
        notes.append("Each interval holds 95% by itself, not all of them together.")
    return notes


def table_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the cells of the report's table, as text."""
    context = f"{report['context'] // 1024}K"
    header = [
        "arm",
        "seeds",
        "bits/byte",
        "range",
        f"minus {report['baseline']} [95%]",
        "verdict",
        "active params",
        f"KV B/token at {context}",
        f"attn FLOP/token at {context}",
        "experts",
        "tokens/s",
    ]
    base = next(arm for arm in report["arms"] if arm["arm"] == report["baseline"])
    return header, [_cells(arm, base) for arm in report["arms"]]


def _cells(arm: dict[str, Any], base: dict[str, Any]) -> list[str]:
    if METRIC not in arm:
        return [arm["arm"], "0", "no result", *["-"] * 8]
    score, difference, cost = arm[METRIC], arm["difference"], arm["costs"]
    deviation = "" if score["std"] is None else f" ± {score['std']:.4f}"
    reach = "-" if score["std"] is None else f"{score['min']:.4f} to {score['max']:.4f}"
    if difference is None:
        compared = ["baseline" if arm is base else "-", "-"]
    else:
        interval = (
            ""
            if difference["low"] is None
            else f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
        )
        compared = [f"{difference['mean']:+.4f}{interval}", difference["verdict"]]
    relative = base.get("costs", {})
    return [
        arm["arm"],
        str(len(arm["seeds"])),
        f"{score['mean']:.4f}{deviation}",
        reach,
        *compared,
        _count(cost["params_active"]),
        *[
            _count(cost[name]) + _ratio(cost[name], relative.get(name))
            for name in ("kv_bytes_per_token", "attention_flops_per_token")
        ],
        "-" if cost["experts_per_token"] is None else f"{cost['experts_per_token']:.2f}",
        _count(cost["tokens_per_second"]),
    ]


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{value:,.0f}"


def _ratio(value: float, base: float | None) -> str:
    return f" (x{value / base:.2f})" if base else ""


def print_report(report: dict[str, Any]) -> None:
    """Prints question, table, gaps and notes on standard error."""
    header, rows = table_rows(report)
    # The range is for the page: a terminal has no room for it.
    shown = [index for index, name in enumerate(header) if name != "range"]
    cells = [[row[index] for index in shown] for row in (header, *rows)]
    tables.print_table(cells, report["question"])
    for line in _gaps(report):
        print(line, file=sys.stderr)


def _gaps(report: dict[str, Any]) -> list[str]:
    lost = [
        f"Missing: {run['arm']} seed {run['seed']} ({run['reason']})" for run in report["missing"]
    ]
    return [*report["notes"], *lost]


def write_report(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes `report.json`, `report.png` and `report.html` into a sweep's folder.

    Returns:
      The result of `summarize`.

    Raises:
      UserError: it is not the folder of a sweep, or no run in it has a result.
    """
    root = Path(workdir).absolute()
    sweep = read_sweep(root)
    report = summarize(sweep, root)
    if not any(arm["seeds"] for arm in report["arms"]):
        reasons = "; ".join(_gaps(report)[:2])
        raise UserError(f"workdir = {str(workdir)!r}: no run of the sweep has a result ({reasons})")
    finished = [Run(arm["arm"], seed) for arm in report["arms"] for seed in arm["seeds"]]
    image = page.plot(report, page.curves(finished, root))
    write_json(root / "report.json", report)
    write_file(root / "report.png", image)
    header, cells = table_rows(report)
    text = page.build(report, header, cells, _gaps(report), image, page.origin(sweep.runs(), root))
    write_file(root / "report.html", text)
    return report
