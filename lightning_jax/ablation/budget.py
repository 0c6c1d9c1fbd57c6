"""Equal budgets: arms that train with as many FLOPs, or as long, as the baseline.

Where a sweep's budget is `flops` or `time`, the stages of each arm are made longer or shorter by
one factor, its scale, so that its training needs the FLOPs (`accounting`, with the experts that
tokens use) or the seconds of the baseline's. What no config says is measured by a run of each arm
that needs it, its calibration, in `<root>/calibration/<arm>`; `<root>/calibration.json` keeps the
result, so that a sweep which goes on has the scales that it began with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_jax.ablation import training_cost
from lightning_jax.ablation.results import Run, is_finished, read_by_arm
from lightning_jax.ablation.sweep import Sweep
from lightning_jax.ablation.training_cost import Measured
from lightning_jax.config import RunConfig, kinds
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.runtime.files import read_json, write_json
from lightning_jax.train.metrics import read_rows
from lightning_jax.train.plan import Plan
from lightning_jax.train.workdir import METRICS

# Trains a config in a folder to its end; raises UserError if it fails.
Train = Callable[[RunConfig, Path], object]

FILE = "calibration.json"
_FOLDER = "calibration"
# Of a calibration that measures speed alone: its share of the tokens, and the least steps of each
# stage. Experts need a whole run: under a fixed p of 0.5 their number fell from 3.4 to 1.4 and rose
# to 2.3 in 196 steps, and a half of the tokens gave 5% fewer FLOPs, a quarter 2%.
_SHARE, _STEPS = 0.05, 16
_WORDS = {
    "tokens": ("more tokens", "fewer tokens"),
    "flops": ("more FLOPs", "fewer FLOPs"),
    "time": ("more time", "less time"),
}
# Of budgets that are called equal.
_TOLERANCE = 0.02
_RECORD = {"config": kinds.TEXT, "stages": kinds.map_of(kinds.OBJECT)}
_STAGE = {
    "experts_per_token": kinds.or_null(kinds.number(0)),
    "tokens_per_second": kinds.number(0, above=True),
}


def scales(sweep: Sweep, root: Path, *, train: Train | None = None) -> dict[str, float]:
    """Returns the factor on the tokens of each arm that gives it the baseline's budget.

    `sweep.config(run, tokens=scale)` is the config to train. The scale of the baseline and of its
    `scaling_arms` is 1.

    Args:
      sweep: the sweep.
      root: its folder.
      train: makes the calibrations that are missing.

    Raises:
      UserError: a calibration failed, measured another config, or is missing without `train`.
    """
    for arm in uncalibrated(sweep, root):
        _calibrate(sweep, root, arm, train)
    return {arm: scale for arm, scale in known_scales(sweep, root).items() if scale is not None}


def known_scales(sweep: Sweep, root: Path) -> dict[str, float | None]:
    """Returns the `scales`; None of an arm that waits for its calibration or the baseline's."""
    if sweep.budget == "tokens":
        return dict.fromkeys([*sweep.arms, *sweep.scaling_arms], 1.0)
    costs = _costs(sweep, calibrations(sweep, root))
    whole = costs[sweep.baseline]
    found = {arm: whole / cost if whole and cost else None for arm, cost in costs.items()}
    return {**found, **dict.fromkeys([sweep.baseline, *sweep.scaling_arms], 1.0)}


def _costs(sweep: Sweep, known: Mapping[str, Mapping[str, Measured]]) -> dict[str, float | None]:
    """Training FLOPs, or seconds, of each arm at the tokens of its config; None if unknown."""
    configs = {arm: sweep.config(Run(arm, sweep.seeds[0])) for arm in sweep.arms}
    if sweep.budget == "time":
        return {
            arm: training_cost.training_seconds(config, known[arm]) if arm in known else None
            for arm, config in configs.items()
        }
    sized = training_cost.with_vocabularies(configs.values())
    return {
        arm: training_cost.expected_flops(config, known.get(arm, {}))
        for arm, config in zip(configs, sized, strict=True)
    }


def uncalibrated(sweep: Sweep, root: Path) -> list[str]:
    """Returns the arms whose budget needs a calibration that is missing."""
    known = calibrations(sweep, root)
    return [arm for arm in sweep.arms if arm not in known and _needs_calibration(sweep, arm)]


def _needs_calibration(sweep: Sweep, arm: str) -> bool:
    moe = sweep.config(Run(arm, sweep.seeds[0])).model.moe
    return sweep.budget == "time" or (sweep.budget == "flops" and not training_cost.is_known(moe))


def calibrations(sweep: Sweep, root: Path) -> dict[str, dict[str, Measured]]:
    """Returns what the calibrations of the sweep's arms have measured, by arm and stage.

    Raises:
      UserError: the file is damaged, or measured another config of an arm.
    """
    path, found = root / FILE, {}
    for arm, record in read_by_arm(path, _RECORD, required=[*_RECORD]).items():
        for name, stage in record["stages"].items():
            kinds.check(stage, _STAGE, f"{path}: {arm}.{name}", required=[*_STAGE])
        if arm in sweep.arms:
            _check_config(sweep, arm, record, root)
            found[arm] = {name: Measured(**stage) for name, stage in record["stages"].items()}
    return found


def _check_config(sweep: Sweep, arm: str, record: Mapping[str, Any], root: Path) -> None:
    config = calibration_config(sweep, arm)
    stages = {stage.name for stage in config.stages}
    if record["config"] != _fingerprint(config) or set(record["stages"]) != stages:
        raise UserError(
            f"arm {arm!r}: {root / FILE} has measured another config; use another --workdir, or "
            f"remove the arm from this file and {root / _FOLDER / arm}"
        )


def _calibrate(sweep: Sweep, root: Path, arm: str, train: Train | None) -> None:
    """Makes the calibration of an arm, and keeps what it measured."""
    folder, config = root / _FOLDER / arm, calibration_config(sweep, arm)
    if train is None:
        raise UserError(
            f"arm {arm!r}: budget = {sweep.budget!r} needs its calibration, which {root / FILE} "
            "does not have: experiments.sweep --prepare makes it"
        )
    if not is_finished(folder):
        try:
            train(config, folder)
        except UserError as error:
            raise UserError(f"arm {arm!r}: its calibration failed: {error}") from error
    path = folder / METRICS
    stages = training_cost.measured(read_rows(path), path)
    record = {
        "config": _fingerprint(config),
        "stages": {name: dataclasses.asdict(stage) for name, stage in stages.items()},
    }
    write_json(root / FILE, {**read_json(root / FILE, missing_ok=True), arm: record})


def calibration_config(sweep: Sweep, arm: str) -> RunConfig:
    """Returns the config of an arm's calibration, with the first seed.

    It has all tokens where experts must be measured, else few; stages are shortened alike. Experts
    are logged at every step; speed over several, as logging takes time too.
    """
    run = Run(arm, sweep.seeds[0])
    config = sweep.config(run)
    if training_cost.is_known(config.model.moe):
        shortest = min(segment.steps for segment in Plan.of(config).segments)
        config = sweep.config(run, tokens=min(max(_SHARE, _STEPS / shortest), 1.0))
    last = config.stages[-1]
    return dataclasses.replace(
        config,
        log_every=1 if sweep.budget == "flops" else min(config.log_every, _STEPS // 4),
        histogram_every=0,
        eval_every=0,
        final_eval_tokens=last.batch_size * last.seq_len,
        sample_tokens=0,
        keep_checkpoints=1,
    )


def mismatches(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each arm whose budget was not the baseline's, by more than 2%.

    Compared are the means over the finished runs of each arm: tokens, measured training FLOPs, or
    seconds at the measured speed.

    Args:
      sweep: the sweep.
      rows: of `results.run_row`.
    """
    means = {}
    for arm in sweep.arms:
        spent = [_spent(sweep.budget, row) for row in rows if row["arm"] == arm]
        if found := [value for value in spent if value is not None]:
            means[arm] = sum(found) / len(found)
    whole, notes = means.get(sweep.baseline), []
    for arm, mean in means.items():
        if whole and abs(more := mean / whole - 1) > _TOLERANCE:
            words = _WORDS[sweep.budget][more < 0]
            notes.append(
                f"Unequal budgets: {arm} trained with {abs(more):.1%} {words} than "
                f"{sweep.baseline}."
            )
    return notes


def _spent(budget: str, row: Mapping[str, Any]) -> float | None:
    if budget == "tokens":
        return row["train_tokens"]
    if budget == "flops":
        return row["train_flops"]
    return row["train_tokens"] / row["tokens_per_second"] if row["tokens_per_second"] else None


def _fingerprint(config: RunConfig) -> str:
    """sha256 (hex) of a config but its seed."""
    values = {**to_dict(config), "seed": 0}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
