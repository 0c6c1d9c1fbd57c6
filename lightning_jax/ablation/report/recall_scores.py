"""Exact recall of a sweep's arms, from the `recall` entries of their `evaluation.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.ablation.report.verdicts import Rows, Scores, judge, spread
from lightning_jax.ablation.results import Run
from lightning_jax.ablation.statistics import noise
from lightning_jax.ablation.sweep import Sweep
from lightning_jax.config import kinds
from lightning_jax.runtime.files import read_json
from lightning_jax.train.workdir import EVALUATION

# The difference in exact matches that matters: two points of a hundred.
MARGIN = 0.02
_RECALL = {"exact": kinds.number(0, 1), "cells": kinds.list_of(kinds.OBJECT)}
_CELL = {
    "length": kinds.integer(1),
    "windows": kinds.number(0),
    "depth": kinds.number(0, 1),
    "pairs": kinds.integer(1),
    "exact": kinds.number(0, 1),
    "examples": kinds.integer(1),
}
_PLACE = ("length", "depth", "pairs")

Cells = list[dict[str, Any]]


def summarize(sweep: Sweep, rows: Rows, root: Path) -> dict[str, Any]:
    """Summarizes each domain that has been measured by exact matches.

    Returns by domain: `grids`, by arm the cells (mean of `exact` and sum of `examples` over
    seeds); `common`, the number of cells that all arms have, since lengths follow the window of an
    arm; `arms`, the `spread` of the mean over those cells; `signal_to_noise` and `is_shown`, see
    `domains`; and what `judge` returns, with a margin of `MARGIN`. A difference is in points of a
    hundred, and more is better.
    """
    found: dict[str, dict[str, dict[int, Cells]]] = {}
    for arm, by_seed in rows.items():
        for seed in by_seed:
            for domain, cells in _read(Run(arm, seed).folder(root)).items():
                found.setdefault(domain, {}).setdefault(arm, {})[seed] = cells
    return {domain: _domain(sweep, by_arm) for domain, by_arm in found.items()}


def _read(folder: Path) -> dict[str, Cells]:
    path = folder / EVALUATION
    found = {}
    for name, domain in read_json(path).items():
        recall = domain.get("recall") if isinstance(domain, dict) else None
        if isinstance(recall, dict) and "cells" in recall:
            kinds.check(recall, _RECALL, f"{path}: {name}.recall", required=[*_RECALL])
            for cell in recall["cells"]:
                required = ["length", "windows", "exact", "examples"]
                kinds.check(cell, _CELL, f"{path}: {name}.recall.cells", required=required)
            found[name] = recall["cells"]
    return found


def _domain(sweep: Sweep, by_arm: dict[str, dict[int, Cells]]) -> dict[str, Any]:
    runs = [cells for by_seed in by_arm.values() for cells in by_seed.values()]
    common = set.intersection(*({_place(cell) for cell in cells} for cells in runs))
    scores: Scores = {}
    if common:
        scores = {
            arm: {seed: _mean(cells, common) for seed, cells in by_seed.items()}
            for arm, by_seed in by_arm.items()
        }
    ratio = noise.signal_to_noise(scores) if scores else None
    return {
        "grids": {arm: _grid([*by_seed.values()]) for arm, by_seed in by_arm.items()},
        "common": len(common),
        "arms": {arm: spread(values) for arm, values in scores.items()},
        "signal_to_noise": ratio,
        "is_shown": ratio is not None and ratio >= noise.SIGNAL_TO_NOISE,
        **(
            judge(scores, sweep.baseline, margin=MARGIN, relative_to=1.0, lower_is_better=False)
            or {"differences": {}}
        ),
    }


def _place(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell.get(key) for key in _PLACE)


def _mean(cells: Cells, places: set[tuple[Any, ...]]) -> float:
    return float(np.mean([cell["exact"] for cell in cells if _place(cell) in places]))


def _grid(runs: list[Cells]) -> Cells:
    cells: dict[tuple[Any, ...], Cells] = {}
    for run in runs:
        for cell in run:
            cells.setdefault(_place(cell), []).append(cell)
    return [
        {
            **{key: same[0][key] for key in ("windows", *_PLACE) if key in same[0]},
            "exact": float(np.mean([cell["exact"] for cell in same])),
            "examples": sum(cell["examples"] for cell in same),
        }
        for same in cells.values()
    ]
