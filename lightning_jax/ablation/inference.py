"""Trained with one routing, inferred with another: finished runs are evaluated once more.

A sweep's `inference` names other ways to choose experts at inference, such as `{"top_2":
{"routing": "top_k", "top_k": 2}}`. Every finished run with experts is evaluated under each of them
on the text of its own evaluation. Nothing is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.ablation.results import METRIC, Run, held_out
from lightning_jax.config.errors import UserError
from lightning_jax.config.routing import EvalRouting
from lightning_jax.runtime.files import write_json
from lightning_jax.train.evaluation import EvalOptions, evaluate_run
from lightning_jax.train.workdir import EVALUATION

logger = logging.getLogger(__name__)

OWN = "as trained"


def evaluate(run: Run, folder: Path, ways: Mapping[str, EvalRouting]) -> None:
    """Evaluates a finished run in each way that was not measured before.

    The results are `inference/<way>.json` in the run's folder, each in the form of its
    evaluation.json.

    Raises:
      UserError: the run has no experts, or cannot be read.
    """
    for name, routing in ways.items():
        path = _path(folder, name)
        if not path.exists():
            logger.info("%s: inferred with %s", run, name)
            domains = evaluate_run(str(folder), EvalOptions(routing=routing))["domains"]
            path.parent.mkdir(exist_ok=True)
            write_json(path, domains)


def is_measured(folder: Path, ways: Iterable[str]) -> bool:
    """Whether a run's folder has its evaluations in all of these ways."""
    return all(_path(folder, name).exists() for name in ways)


def table(runs: Sequence[Run], root: Path, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Returns one row for each arm and way that was measured, `OWN` first.

    A row has `arm`, `way`, `seeds` (that have both this way and the arm's own),
    `bits_per_byte` and `experts_per_token` (means over them), and `more`: by how many bits per byte
    the way is above the arm's own routing, by seed.
    """
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        folders = {run.seed: run.folder(root) for run in runs if run.arm == arm}
        own = {seed: held_out(folder / EVALUATION) for seed, folder in folders.items()}
        if any(score["experts_per_token"] is None for score in own.values()):
            continue
        rows.append(_row(arm, OWN, own, own))
        for way in ways:
            paths = {seed: _path(folder, way) for seed, folder in folders.items()}
            scores = {seed: held_out(path) for seed, path in paths.items() if path.exists()}
            if scores:
                rows.append(_row(arm, way, scores, own))
    return rows


def _row(
    arm: str, way: str, scores: Mapping[int, dict[str, Any]], own: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    for seed, score in scores.items():
        if score["experts_per_token"] is None:
            raise UserError(
                f"{arm} seed {seed}: {way} has no experts_per_token; delete its folder `inference`"
            )
        if score["bytes"] != own[seed]["bytes"]:
            raise UserError(
                f"{arm} seed {seed}: {way} was measured on {score['bytes']:,} bytes of text, its "
                f"own routing on {own[seed]['bytes']:,}; delete its folder `inference`"
            )
    return {
        "arm": arm,
        "way": way,
        "seeds": list(scores),
        METRIC: float(np.mean([score[METRIC] for score in scores.values()])),
        "experts_per_token": float(np.mean([s["experts_per_token"] for s in scores.values()])),
        "more": [score[METRIC] - own[seed][METRIC] for seed, score in scores.items()],
    }


def _path(folder: Path, way: str) -> Path:
    return folder / "inference" / f"{way}.json"
