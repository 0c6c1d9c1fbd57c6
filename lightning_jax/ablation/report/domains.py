"""Scores of a sweep's arms by domain, and how well each domain tells arms apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.ablation.report.verdicts import Rows, judge, scores_of, spread
from lightning_jax.ablation.results import METRIC, Run
from lightning_jax.ablation.statistics import noise
from lightning_jax.ablation.sweep import Sweep
from lightning_jax.train.metrics import read_rows
from lightning_jax.train.workdir import METRICS

# Evaluations during training whose spread is a run's checkpoint noise.
_LAST = 5


def summarize(sweep: Sweep, rows: Rows, root: Path) -> dict[str, Any]:
    """Summarizes each held-out domain.

    Returns by domain: its `bytes`; `arms`, mean bits per byte; `signal_to_noise` of arms over
    seeds, and `signal_to_checkpoint_noise` over the last evaluations during training (None without
    three); `is_shown`, False where the domain tells arms apart no better than seeds do; and what
    `judge` returns.
    """
    wobble = _checkpoint_noise(rows, root)
    found = {}
    names = dict.fromkeys(n for by in rows.values() for row in by.values() for n in row["domains"])
    for name in names:
        scores = scores_of(rows, lambda row, name=name: row["domains"][name][METRIC])
        sizes = [row["domains"][name]["bytes"] for by in rows.values() for row in by.values()]
        ratio, deviation = noise.signal_to_noise(scores), wobble.get(name)
        found[name] = {
            "bytes": sizes[0],
            "arms": {arm: spread(values)["mean"] for arm, values in scores.items()},
            "signal_to_noise": ratio,
            "signal_to_checkpoint_noise": None
            if deviation is None
            else noise.signal_to_noise(scores, noise=deviation),
            "is_shown": ratio is not None and ratio >= noise.SIGNAL_TO_NOISE,
            **(judge(scores, sweep.baseline, margin=sweep.margin) or {"differences": {}}),
        }
    return found


def _checkpoint_noise(rows: Rows, root: Path) -> dict[str, float]:
    """Deviation of a run's bits per byte over its last evaluations by domain, mean over runs."""
    found: dict[str, list[float]] = {}
    for arm, by_seed in rows.items():
        for seed in by_seed:
            steps = read_rows(Run(arm, seed).folder(root) / METRICS)
            scores: dict[str, list[float]] = {}
            for row in steps:
                for name, domain in row.get("eval", {}).items():
                    value = domain.get(METRIC) if isinstance(domain, dict) else None
                    if isinstance(value, float):
                        scores.setdefault(name, []).append(value)
            for name, values in scores.items():
                deviation = noise.checkpoint_noise(values[-_LAST:])
                if deviation is not None:
                    found.setdefault(name, []).append(deviation)
    return {name: float(np.mean(values)) for name, values in found.items()}
