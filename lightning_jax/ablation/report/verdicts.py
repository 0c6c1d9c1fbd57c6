"""Scores of arms by seed, and the verdicts on them, as a report holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lightning_jax.ablation.statistics import comparison
from lightning_jax.config.errors import some_of

# By arm and seed: a row of `results.run_row`, or a score.
Rows = Mapping[str, Mapping[int, dict[str, Any]]]
Scores = dict[str, dict[int, float]]


def scores_of(rows: Rows, score: Callable[[dict[str, Any]], float | None]) -> Scores:
    """Returns a score of all runs that have it; arms without any are left out."""
    found: Scores = {}
    for arm, by_seed in rows.items():
        values = {seed: score(row) for seed, row in by_seed.items()}
        known = {seed: value for seed, value in values.items() if value is not None}
        if known:
            found[arm] = known
    return found


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """Returns mean, sample standard deviation (None for one value), least, greatest, `by_seed`."""
    array = np.array([*values.values()], np.float64)
    return {
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else None,
        "min": float(array.min()),
        "max": float(array.max()),
        "by_seed": array.tolist(),
    }


def judge(
    scores: Scores,
    baseline: str,
    *,
    margin: float,
    relative_to: float | None = None,
    lower_is_better: bool = True,
    is_answer: bool = False,
) -> dict[str, Any] | None:
    """Compares all arms with the baseline.

    Args:
      scores: by arm and seed.
      baseline: an arm.
      margin: the difference that matters, as a share of `relative_to`.
      relative_to: what percentages are of; None: the baseline's mean.
      lower_is_better: of the scores.
      is_answer: of the sweep's question: says how many seeds an undecided arm needs.

    Returns:
      The fields of `comparison.Comparison`; each of its `differences` has besides `percent` (mean,
      low and high), `by_seed` (of the paired seeds, in percent) and, of an answer, `sentence`. None
      without a baseline, or with nothing to compare.
    """
    if baseline not in scores or len(scores) < 2:
        return None
    whole = relative_to or float(np.mean([*scores[baseline].values()]))
    found = comparison.compare(
        scores,
        baseline,
        margin=margin * whole,
        lower_is_better=lower_is_better,
        plan=is_answer,
    )
    differences = {}
    for arm, difference in found.differences.items():
        ends = {key: getattr(difference, key) for key in ("mean", "low", "high")}
        paired = [scores[arm][seed] - scores[baseline][seed] for seed in difference.seeds]
        differences[arm] = {
            **dataclasses.asdict(difference),
            "seeds": list(difference.seeds),
            "percent": {k: None if v is None else 100 * v / whole for k, v in ends.items()},
            "by_seed": [100 * value / whole for value in paired],
        }
        if is_answer:
            text = comparison.sentence(arm, baseline, difference, whole)
            differences[arm]["sentence"] = text
    return {**dataclasses.asdict(found), "differences": differences}


def why_withheld(rows: Rows) -> str | None:
    """Returns why no arm may be compared: the held-out text differs in bytes; None if it does not.

    Bits per byte of different texts are not comparable, whatever the tokenizers.
    """
    sizes: dict[str, dict[int | None, list[str]]] = {}
    found = [(arm, seed, row) for arm, by in rows.items() for seed, row in by.items()]
    names = dict.fromkeys(name for *_, row in found for name in row["domains"])
    for name in names:
        for arm, seed, row in found:
            size = row["domains"].get(name, {}).get("bytes")
            sizes.setdefault(name, {}).setdefault(size, []).append(f"{arm} seed {seed}")
    for name, runs in sizes.items():
        if len(runs) > 1:
            parts = [
                f"{'none' if size is None else f'{size:,} bytes'} in {some_of(of_size, 1)}"
                for size, of_size in runs.items()
            ]
            return f"held-out text of {name} differs between runs: {'; '.join(parts)}"
    return None


def headline(baseline: str, judged: Mapping[str, Any] | None, margin: float) -> str:
    """Says which arms got which verdict, on how many seeds, against which margin."""
    if judged is None:
        return "No arm can be compared with the baseline yet."
    by_verdict: dict[str, list[str]] = {}
    for arm, difference in judged["differences"].items():
        by_verdict.setdefault(difference["verdict"], []).append(arm)
    order = ("better", "worse", "equivalent", "undecided")
    parts = [
        f"{_listed(by_verdict[word])} {'is' if len(by_verdict[word]) == 1 else 'are'} {word}"
        for word in order
        if word in by_verdict
    ]
    counts = sorted({len(difference["seeds"]) for difference in judged["differences"].values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return (
        f"Against {baseline}, {'; '.join(parts)}. Held-out bits per byte, {seeds} paired "
        f"seed{'' if counts[-1] == 1 else 's'}, margin {100 * margin:g}%."
    )


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
