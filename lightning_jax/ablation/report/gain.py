"""Compute-equivalent gain of a sweep's arms, against the baseline trained with several budgets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lightning_jax.ablation.report.verdicts import Rows
from lightning_jax.ablation.results import METRIC
from lightning_jax.ablation.statistics import scaling
from lightning_jax.ablation.sweep import Sweep


def summarize(sweep: Sweep, rows: Rows) -> dict[str, Any] | None:
    """Fits the baseline's bits per byte over its training FLOPs, and places the arms on the fit.

    Returns `budgets` (of the baseline: `share` of its tokens, `flops`, `by_seed`), the fields of
    `scaling.Fit` as `fit`, a `sentence` about it, and `gains`, by arm the fields of `scaling.Gain`
    and its `flops`. None where the baseline has fewer than two budgets with a common seed.
    """
    shares = {sweep.baseline: 1.0, **sweep.scaling_arms}
    budgets = []
    for arm, share in shares.items():
        flops = _flops(rows, arm)
        if flops:
            by_seed = {seed: row[METRIC] for seed, row in rows[arm].items()}
            budgets.append({"share": share, "flops": flops, "by_seed": by_seed})
    budgets.sort(key=lambda budget: budget["flops"])
    common = set.intersection(*({*budget["by_seed"]} for budget in budgets)) if budgets else set()
    if len(budgets) < 2 or not common:
        return None
    fitted = scaling.fit({budget["flops"]: budget["by_seed"] for budget in budgets})
    gains = {}
    for arm in sweep.arms:
        flops, losses = _flops(rows, arm), {s: row[METRIC] for s, row in rows[arm].items()}
        if arm != sweep.baseline and flops and common & {*losses}:
            found = scaling.gain(fitted, losses, flops)
            gains[arm] = {**dataclasses.asdict(found), "seeds": list(found.seeds), "flops": flops}
    return {
        "budgets": budgets,
        "fit": dataclasses.asdict(fitted),
        "sentence": _sentence(fitted, [budget["share"] for budget in budgets]),
        "gains": gains,
    }


def _flops(rows: Rows, arm: str) -> float | None:
    """Training FLOPs of an arm, mean over its seeds; None without a run, or if unknown."""
    found = [row["train_flops"] for row in rows[arm].values()]
    return None if not found or None in found else float(np.mean(found))


def _sentence(fitted: scaling.Fit, shares: list[float]) -> str:
    slope = float(np.mean([*fitted.slopes.values()]))
    seeds = len(fitted.slopes)
    floor = f" above a floor of {fitted.floor:.3f}" if fitted.floor else ""
    return (
        f"A power law of the baseline at {', '.join(f'{share:g}' for share in shares)} times its "
        f"tokens, fitted to {'1 seed' if seeds == 1 else f'each of {seeds} seeds'}: bits per byte"
        f"{floor} fall with FLOPs to the power of {-slope:.3f}. Intervals are Fieller's over seeds."
    )
