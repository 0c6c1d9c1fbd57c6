"""What a sweep will take, before it runs: runs, tokens, FLOPs, memory and hours of each arm."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_jax import accounting
from lightning_jax.ablation import budget, same, search, training_cost
from lightning_jax.ablation.results import COST_CONTEXT, Run, collect, costs, is_finished
from lightning_jax.ablation.sweep import Sweep
from lightning_jax.ablation.table import duration
from lightning_jax.ablation.training_cost import Measured
from lightning_jax.config import RunConfig
from lightning_jax.runtime import tables

_UNKNOWN = {"tokens": None, "train_flops": None, "seconds": None}
_BUDGETS = {
    "tokens": "all arms train on the same tokens",
    "flops": "all arms train with the FLOPs of {baseline}",
    "time": "all arms train for as long as {baseline}",
}


def rows(sweep: Sweep, root: Path) -> list[dict[str, Any]]:
    """Returns what each arm takes, as one dict per arm, those of `scaling_arms` last.

    `arm`; `runs`, and how many are `finished`; `trials`, those of the search of the learning rate
    that are left; `params_total` and `kv_bytes_per_token` (see `results.costs`); `tokens`,
    `train_flops` and `seconds` (of training alone) of one run, and the same over all that is left,
    trials included, as `tokens_left`, `train_flops_left` and `seconds_left`. Tokens are None where
    they wait for a calibration, and FLOPs until the experts per token are known. Seconds are those
    of the arm's finished runs, or of its calibration; before there are any, an arm is taken to
    compute as many FLOPs per second as the finished runs of other arms, and `is_guess` says so;
    None until one run has finished.

    Raises:
      UserError: the text cannot be read, the folder holds runs of another sweep, or a calibration
        measured another config.
    """
    same.check_runs(sweep, root)
    known, scales = budget.calibrations(sweep, root), budget.known_scales(sweep, root)
    finished = collect(sweep.runs(), root)
    searched = search.read(root)
    configs = training_cost.with_vocabularies(
        sweep.config(Run(arm, sweep.seeds[0]), tokens=scale or 1.0) for arm, scale in scales.items()
    )
    pace = _ratio(finished, "seconds", "train_flops")
    planned = []
    for (arm, scale), config in zip(scales.items(), configs, strict=True):
        # A run of a scaling arm is one of the baseline, with other tokens.
        model = sweep.baseline if arm in sweep.scaling_arms else arm
        like = [row for row in finished if row["arm"] == model]
        done = sum(row["arm"] == arm for row in finished)
        is_searched = arm != model or arm in searched
        trials = 0 if is_searched else _trials_left(sweep, root / "search" / arm)
        left = len(sweep.seeds) - done + trials * sweep.search.get("tokens", 0)
        size = costs(config.model, None)
        one = _UNKNOWN if scale is None else _one_run(config, like, known.get(model))
        is_guess = one["seconds"] is None
        if is_guess and one["train_flops"] and pace:
            one = {**one, "seconds": one["train_flops"] * pace}
        planned.append(
            {
                "arm": arm,
                "runs": len(sweep.seeds),
                "finished": done,
                "trials": trials,
                **{name: size[name] for name in ("params_total", "kv_bytes_per_token")},
                **one,
                "is_guess": is_guess and one["seconds"] is not None,
                **{f"{name}_left": None if n is None else n * left for name, n in one.items()},
            }
        )
    return planned


def _trials_left(sweep: Sweep, folder: Path) -> int:
    trials = range(sweep.search.get("trials", 0))
    return sum(not is_finished(folder / f"trial_{number}") for number in trials)


def _one_run(
    config: RunConfig, like: Sequence[Mapping[str, Any]], calibration: Mapping[str, Measured] | None
) -> dict[str, float | None]:
    """Tokens, FLOPs and seconds of one run: as finished runs `like` it, or as calibrated."""
    tokens = training_cost.tokens(config)
    flops = training_cost.expected_flops(config, calibration or {})
    seconds = training_cost.training_seconds(config, calibration) if calibration else None
    if like:
        per_token = [_ratio(like, name, "train_tokens") for name in ("train_flops", "seconds")]
        flops, seconds = (None if ratio is None else ratio * tokens for ratio in per_token)
    return {"tokens": tokens, "train_flops": flops, "seconds": seconds}


def _ratio(found: Sequence[Mapping[str, Any]], above: str, below: str) -> float | None:
    """The sum of one column over that of another, of the rows that have both; None without any."""
    known = [row for row in found if row[above] and row[below]]
    if not known:
        return None
    return sum(row[above] for row in known) / sum(row[below] for row in known)


def print_plan(sweep: Sweep, root: Path) -> list[dict[str, Any]]:
    """Prints the `rows` on standard error, with their sums, and returns them."""
    planned = rows(sweep, root)
    context = f"{COST_CONTEXT // 1024}K"
    header = [
        "arm",
        "runs",
        "done",
        "tokens",
        "FLOPs",
        "params",
        f"KV B/token at {context}",
        "left",
    ]
    cells = [
        [
            row["arm"],
            str(row["runs"]) + (f" + {row['trials']} trials" if row["trials"] else ""),
            str(row["finished"]),
            *(_count(row[n]) for n in ("tokens", "train_flops", "params_total")),
            _count(row["kv_bytes_per_token"]),
            "about " * row["is_guess"] + _duration(row["seconds_left"]),
        ]
        for row in planned
    ]
    sums = {name: _sum([row[f"{name}_left"] for row in planned]) for name in _UNKNOWN}
    runs, trials, done = (sum(row[n] for row in planned) for n in ("runs", "trials", "finished"))
    tables.print_table([header, *cells], sweep.question)
    lines = [
        f"Budget: {_BUDGETS[sweep.budget].format(baseline=sweep.baseline)}.",
        f"Left: {runs - done} of {runs} runs{f' and {trials} trials' if trials else ''}, "
        f"{_count(sums['tokens'])} tokens, {_count(sums['train_flops'])} FLOPs, "
        f"{_duration(sums['seconds'])} one after another.",
    ]
    if arms := budget.uncalibrated(sweep, root):
        tokens = sum(training_cost.tokens(budget.calibration_config(sweep, arm)) for arm in arms)
        lines.append(
            f"First come calibrations of {', '.join(arms)}: {_count(tokens)} tokens together."
        )
    if any(row["seconds_left"] is None for row in planned):
        lines.append("Hours are unknown until one run has finished.")
    if any(row["is_guess"] for row in planned):
        lines.append("About: an arm without a finished run, at the FLOPs per second of the others.")
    for line in lines:
        print(line, file=sys.stderr)
    return planned


def _sum(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)


def _count(value: float | None) -> str:
    return "unknown" if value is None else accounting.count_text(value)


def _duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)
