"""Everything that the report of a sweep shows, as numbers and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lightning_jax.ablation import budget, decode_speed, inference, search
from lightning_jax.ablation.report import domains, gain, recall_scores
from lightning_jax.ablation.report.provenance import changed_text, provenance
from lightning_jax.ablation.report.verdicts import (
    Rows,
    headline,
    judge,
    scores_of,
    spread,
    why_withheld,
)
from lightning_jax.ablation.results import COST_CONTEXT, METRIC, Run, outcome
from lightning_jax.ablation.sweep import Sweep

COSTS = (
    "params_total",
    "params_active",
    "kv_bytes_per_token",
    "attention_flops_per_token",
    "experts_per_token",
    "load_max_over_mean",
    "train_tokens",
    "train_flops",
    "tokens_per_second",
    "seconds",
)
# A sweep's budget: what of a run's row it is, in words.
_BUDGETS = {
    "tokens": ("train_tokens", "training tokens"),
    "flops": ("train_flops", "training FLOPs"),
    "time": ("seconds", "seconds of training"),
}
# Of a comparison.
_METHOD = ("method", "homogeneity_p", "deviation", "degrees")
# Ratios of budgets that differ by less are called the same.
_SAME = 0.005


def summarize(sweep: Sweep, root: Path) -> dict[str, Any]:
    """Computes everything that the report shows, from the runs' folders.

    Returns `question`, `baseline`, `metric`, `context`, `seeds`, and

    - `headline`: one sentence, and `arms`, one dict each: `arm`, `changes`, `seeds` (finished),
      `sentence` (the answer), and where there are any: `bits_per_byte` (see `verdicts.spread`;
      `by_seed` in the order of `seeds`), `difference` to the baseline (see `verdicts.judge`; None
      for the baseline and where it is withheld), `costs` (means over seeds), `search`, `decode` and
      `gain` (None where not measured);
    - `margin` (`share`, and `bits_per_byte` where there is a baseline), `method`, `deviation`,
      `degrees`, `homogeneity_p`: of the differences;
    - `withheld`: why there are no differences, or None;
    - `domains`: by name, see `domains.summarize`; `recall`, see `recall_scores.summarize`;
    - `inference`: rows of `inference.table`, with `percent`, the paired difference to the arm's own
      routing (`mean`, and `low` and `high` of a 95% interval of Student's t);
    - `scaling`: of the baseline, see `gain.summarize`; None without;
    - `budget`: what arms have in common (`matched`, `sentence`);
    - `missing`: the runs without a result and why; `notes`; `provenance`.
    """
    rows, missing = _outcomes(sweep, root)
    compared = {arm: rows[arm] for arm in sweep.arms}
    withheld = why_withheld(compared)
    scores = scores_of(compared, lambda row: row[METRIC])
    judged = (
        None if withheld else judge(scores, sweep.baseline, margin=sweep.margin, is_answer=True)
    )
    decode, searched = decode_speed.read(root), search.read(root)
    trend = None if withheld else gain.summarize(sweep, rows)
    origin = provenance(sweep.runs(), root)
    arms = []
    for arm in sweep.arms:
        entry = _arm(sweep, arm, compared[arm], judged, withheld)
        if compared[arm]:
            entry |= {
                "search": searched.get(arm),
                "decode": decode.get(arm),
                "gain": trend and trend["gains"].get(arm),
            }
        arms.append(entry)
    base = scores.get(sweep.baseline)
    margin = {"share": sweep.margin}
    if base:
        margin["bits_per_byte"] = sweep.margin * float(np.mean([*base.values()]))
    found = [row for by in compared.values() for row in by.values()]
    return {
        "question": sweep.question,
        "baseline": sweep.baseline,
        "metric": METRIC,
        "context": COST_CONTEXT,
        "seeds": list(sweep.seeds),
        "headline": f"Verdicts are withheld: {withheld}."
        if withheld
        else headline(sweep.baseline, judged, sweep.margin),
        "margin": margin,
        **{key: judged and judged[key] for key in _METHOD},
        "withheld": withheld,
        "arms": arms,
        "domains": {} if withheld else domains.summarize(sweep, compared, root),
        "recall": recall_scores.summarize(sweep, compared, root),
        "scaling": trend,
        "inference": _inference(sweep, compared, root),
        "budget": {"matched": sweep.budget, "sentence": _budget(sweep, compared)},
        "missing": missing,
        "notes": [
            *_notes(sweep, rows, missing, changed_text(origin)),
            *budget.mismatches(sweep, found),
            *_edges(sweep, searched),
        ],
        "provenance": origin,
    }


def _outcomes(
    sweep: Sweep, root: Path
) -> tuple[dict[str, dict[int, dict[str, Any]]], list[dict[str, Any]]]:
    rows: dict[str, dict[int, dict[str, Any]]]
    rows = {arm: {} for arm in (*sweep.arms, *sweep.scaling_arms)}
    missing = []
    for run in sweep.runs():
        row, reason = outcome(run, root)
        if row is None:
            missing.append({"arm": run.arm, "seed": run.seed, "reason": reason})
        else:
            rows[run.arm][run.seed] = row
    return rows, missing


def _arm(
    sweep: Sweep,
    arm: str,
    mine: Mapping[int, dict[str, Any]],
    judged: dict[str, Any] | None,
    withheld: str | None,
) -> dict[str, Any]:
    entry: dict[str, Any] = {"arm": arm, "changes": sweep.arms[arm], "seeds": list(mine)}
    if why := sweep.several.get(arm):
        entry["several"] = why
    if not mine:
        return {**entry, "sentence": f"{arm}: no run of it has a result."}
    score = spread({seed: row[METRIC] for seed, row in mine.items()})
    difference = judged["differences"].get(arm) if judged else None
    std = score["std"]
    deviation = "" if std is None else f" (standard deviation over seeds {std:.4f})"
    bits = f"{score['mean']:.4f} bits per byte{deviation}"
    if difference is not None:
        sentence = difference["sentence"]
    elif arm == sweep.baseline:
        sentence = f"{arm} is the baseline: {bits}."
    elif withheld:
        sentence = f"{arm}: {bits}; its verdict is withheld."
    else:
        sentence = f"{arm}: {bits}; no seed in common with the baseline {sweep.baseline}."
    costs = {name: _mean([row[name] for row in mine.values()]) for name in COSTS}
    return {
        **entry,
        "sentence": sentence,
        METRIC: score,
        "difference": difference,
        "costs": costs,
    }


def _budget(sweep: Sweep, rows: Rows) -> str:
    """Says what arms were matched by, and by how much the other budgets differ."""
    same, apart = [], []
    for key, words in _BUDGETS.values():
        means = {arm: _mean([row[key] for row in by.values()]) for arm, by in rows.items()}
        base = means[sweep.baseline]
        ratios = [mean / base for mean in means.values() if mean and base]
        low, high = min(ratios, default=1.0), max(ratios, default=1.0)
        if high - low < _SAME:
            same.append(words)
        else:
            apart.append(f"{low:.2f} to {high:.2f} times its {words}")
    sentence = f"Arms are matched by {_BUDGETS[sweep.budget][1]}."
    if same:
        sentence += f" All had the same {' and '.join(same)}."
    if apart:
        sentence += f" Relative to {sweep.baseline} arms had {' and '.join(apart)}."
    return sentence


def _notes(
    sweep: Sweep, rows: Rows, missing: Sequence[Mapping[str, Any]], changed: Sequence[str]
) -> list[str]:
    """Caveats that a reader must know before believing the table."""
    notes = []
    if missing:
        total = len(sweep.runs())
        notes.append(f"Incomplete: {len(missing)} of {total} runs have no result.")
    if not rows[sweep.baseline]:
        notes.append(f"The baseline {sweep.baseline!r} has no result: no differences.")
    if max((len(rows[arm]) for arm in sweep.arms), default=0) == 1:
        notes.append("One seed an arm: no intervals; differences may be noise.")
    if len({tuple(rows[arm]) for arm in sweep.arms if rows[arm]}) > 1:
        notes.append("Arms have different seeds: compare paired differences, not means.")
    if changed:
        notes.append(f"The training text differs between runs: {', '.join(changed)}.")
    for why in dict.fromkeys(sweep.several.values()):
        arms = [arm for arm, reason in sweep.several.items() if reason == why]
        verb = "changes" if len(arms) == 1 else "change"
        notes.append(f"{', '.join(arms)} {verb} several factors: {why.rstrip('.')}.")
    found = [row for arm in sweep.arms for row in rows[arm].values()]
    if found:
        seen = max(row["train_tokens"] for row in found)
        size = max(row["params_total"] for row in found)
        notes.append(
            f"Limits: models of up to {size:,.0f} parameters after {seen:,.0f} tokens "
            f"({seen / size:.2g} per parameter). The order of arms may change with size and length."
        )
    return notes


def _edges(sweep: Sweep, searched: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{arm}: its best learning rate is at an edge of the search; a better one may lie beyond."
        for arm in sweep.arms
        if arm in searched and searched[arm]["edge"]
    ]


def _inference(sweep: Sweep, rows: Rows, root: Path) -> list[dict[str, Any]]:
    """Rows of `inference.table` with `percent`; none before any run was inferred otherwise."""
    if not sweep.inference:
        return []
    runs = [Run(arm, seed) for arm in sweep.arms for seed in rows[arm]]
    table = inference.table(runs, root, [*sweep.inference])
    if all(row["way"] == inference.OWN for row in table):
        return []
    for row in table:
        own = row[METRIC] - float(np.mean(row["more"]))
        interval = zip(("mean", "low", "high"), _paired(row["more"]), strict=True)
        row["percent"] = {key: None if x is None else 100 * x / own for key, x in interval}
    return table


def _paired(differences: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean, and the 95% interval of Student's t; no interval for fewer than two."""
    mean, count = float(np.mean(differences)), len(differences)
    if count < 2:
        return mean, None, None
    half = float(stats.t.ppf(0.975, count - 1) * np.std(differences, ddof=1) / count**0.5)
    return mean, mean - half, mean + half


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
