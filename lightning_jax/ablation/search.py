"""The best learning rate of each arm, so that arms are compared at their own best.

With `sweep.search`, one factor on the learning rates of all stages is searched for each arm. The
first half of its trials is a grid, even in the logarithm, the same for all arms; the others refine
it by a tree-structured Parzen estimator (Bergstra et al. 2011; optuna's `TPESampler`). Trials train
on a seed that is not among the sweep's, in `<root>/search/<arm>/trial_<k>`, and
`<root>/search.json` keeps the results. What is tried next depends on the results before it alone,
so a search that was interrupted goes on as if nothing had happened.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.ablation.pool import Pool
from lightning_jax.ablation.results import METRIC, Run, is_finished, read_by_arm, run_row
from lightning_jax.ablation.same import check_config
from lightning_jax.ablation.sweep import Sweep
from lightning_jax.ablation.tasks import Task
from lightning_jax.config import kinds
from lightning_jax.config.errors import UserError
from lightning_jax.runtime import invocation
from lightning_jax.runtime.files import write_json
from lightning_jax.train.metrics import pace, read_rows
from lightning_jax.train.workdir import METRICS

logger = logging.getLogger(__name__)

FILE = "search.json"
_FOLDER = "search"
_FIRST_SEED = 10_000
# Factors whose logarithms differ by less than this are as good as equal.
_EDGE = 0.1
_RECORD = {
    "factor": kinds.number(0, 1e6, above=True),
    "edge": kinds.or_null(kinds.choice(("low", "high"))),
    "trials": kinds.list_of(kinds.OBJECT),
    "seconds": kinds.number(0),
    "train_flops": kinds.number(0),
}
_TRIAL = {"factor": _RECORD["factor"]}


def factors(
    sweep: Sweep, root: Path, arms: Sequence[str], scales: Mapping[str, float], pool: Pool | None
) -> dict[str, float]:
    """Returns the best factor on the learning rates of each arm that has been searched.

    Without `sweep.search` it is 1 for all. An arm of which every trial failed has none.

    Args:
      sweep: the sweep.
      root: its folder.
      arms: those to search now, unless they have been searched.
      scales: of the tokens of each arm, see `budget.scales`.
      pool: trains the trials that are missing; None refuses, unless nothing is missing.

    Raises:
      UserError: a trial is missing without `pool`, or has begun with another config; `search.json`
        is damaged; optuna is not installed.
      Stopped: a signal; the states of the trials have been saved.
    """
    if not sweep.search:
        return dict.fromkeys(sweep.arms, 1.0)
    known, count = read(root), sweep.search["trials"]
    for arm in arms:
        if arm in known:
            _check(sweep, root, arm, scales[arm], known[arm]["trials"])
    left = [arm for arm in arms if arm not in known or len(known[arm]["trials"]) != count]
    if left and pool is None:
        raise UserError(
            f"arm {left[0]!r}: its learning rate has not been searched, which experiments.sweep "
            "--prepare does"
        )
    if left and pool is not None:
        known |= _search(sweep, root, {arm: scales[arm] for arm in left}, pool)
        write_json(root / FILE, known)
    for arm in arms:
        if edge := known.get(arm, {}).get("edge"):
            logger.warning(
                "arm %r: its best learning rate is at an edge of the search, %s = %g: widen it",
                *(arm, f"search.{edge}", sweep.search[edge]),
            )
    return {arm: record["factor"] for arm, record in known.items() if arm in sweep.arms}


def read(root: Path) -> dict[str, dict[str, Any]]:
    """Returns what `search.json` of a sweep's folder says, by arm; empty without the file.

    `factor`, the best one; `edge` of the search that it is at (None: at none); `trials`; `seconds`
    and `train_flops` of all trials together.

    Raises:
      UserError: the file is damaged.
    """
    found = read_by_arm(root / FILE, _RECORD, required=[*_RECORD])
    for arm, record in found.items():
        for trial in record["trials"]:
            kinds.check(trial, _TRIAL, f"{root / FILE}: {arm}.trials", required=[*_TRIAL])
    return found


def _check(
    sweep: Sweep, root: Path, arm: str, scale: float, trials: Sequence[Mapping[str, Any]]
) -> None:
    """Raises a UserError unless the trials of an arm are those that its search would make."""
    factors = [trial["factor"] for trial in trials]
    if len(trials) == sweep.search["trials"]:
        grid = _grid(sweep)
        if not np.allclose(factors[: len(grid)], grid, rtol=1e-6):
            low, high = sweep.search["low"], sweep.search["high"]
            raise UserError(
                f"search.low = {low:g}, search.high = {high:g}: {root / FILE} has trials of arm "
                f"{arm!r} between others; use another --workdir, or remove the arm from this file "
                f"and {root / _FOLDER / arm}"
            )
    for number, factor in enumerate(factors):
        _task(sweep, root, arm, number, scale, factor)


def _grid(sweep: Sweep) -> list[float]:
    low, high, count = (sweep.search[key] for key in ("low", "high", "trials"))
    return np.geomspace(low, high, max(count // 2 + 1, 3)).tolist()


def _search(
    sweep: Sweep, root: Path, scales: Mapping[str, float], pool: Pool
) -> dict[str, dict[str, Any]]:
    """Searches the arms of `scales`; returns the records of those of which a trial has finished."""
    low, high, count = (sweep.search[key] for key in ("low", "high", "trials"))
    ask = _Estimator(low, high)
    grid = _grid(sweep)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in scales}
    # The grid is trained at once, then one trial of each arm at a time.
    for numbers in [range(len(grid)), *([number] for number in range(len(grid), count))]:
        tasks = {}
        for arm, scale in scales.items():
            for number in numbers:
                factor = grid[number] if number < len(grid) else ask(results[arm], number)
                tasks[arm, factor] = _task(sweep, root, arm, number, scale, factor)
        failed = _train(tasks.values(), pool)
        for (arm, factor), task in tasks.items():
            results[arm].append(_result(task, factor, failed.get(task)))
    return {
        arm: _record(trials, {"low": low, "high": high})
        for arm, trials in results.items()
        if any(trial[METRIC] is not None for trial in trials)
    }


def _task(sweep: Sweep, root: Path, arm: str, number: int, scale: float, factor: float) -> Task:
    """A trial: an arm with its learning rates times `factor`, on a seed of no run of the sweep."""
    seed = next(n for n in itertools.count(_FIRST_SEED) if n not in sweep.seeds)
    name = f"{arm} trial {number}, learning rate times {factor:.3g}"
    folder = root / _FOLDER / arm / f"trial_{number}"
    config = sweep.config(Run(arm, seed), tokens=scale * sweep.search["tokens"], rate=factor)
    check_config(name, config, folder)
    return Task(name, config, folder)


def _train(tasks: Iterable[Task], pool: Pool) -> dict[Task, str]:
    """Trains those that have not finished; returns the reasons of those that failed."""
    left = [task for task in tasks if not is_finished(task.folder)]
    failed = {task: failure for task, failure in pool.train(left) if failure}
    for task, failure in failed.items():
        logger.warning("%s failed: %s", task.name, failure)
    return failed


def _result(task: Task, factor: float, failure: str | None) -> dict[str, Any]:
    """What search.json says of a trial; one that failed has no bits per byte."""
    result: dict[str, Any] = {"factor": factor, METRIC: None, "seconds": 0.0, "train_flops": 0.0}
    if failure is None:
        try:
            row = run_row(Run(task.name, 0), task.folder)
            return result | {name: row[name] for name in (METRIC, "seconds", "train_flops")}
        except UserError as error:
            failure = str(error)
    _, seconds = pace(read_rows(task.folder / METRICS))
    return result | {"seconds": seconds, "failure": failure}


def _record(trials: Sequence[dict[str, Any]], edges: Mapping[str, float]) -> dict[str, Any]:
    finished = [trial for trial in trials if trial[METRIC] is not None]
    best = min(finished, key=lambda trial: trial[METRIC])["factor"]
    return {
        "factor": best,
        "edge": next((name for name, edge in edges.items() if _is_near(best, edge)), None),
        "trials": trials,
        "seconds": sum(trial["seconds"] for trial in trials),
        "train_flops": sum(trial["train_flops"] or 0.0 for trial in trials),
    }


def _is_near(factor: float, edge: float) -> bool:
    return abs(math.log(factor / edge)) < _EDGE


class _Estimator:
    """Proposes factors from the results of those before."""

    def __init__(self, low: float, high: float) -> None:
        try:
            import optuna
        except ImportError as error:
            install = invocation.install("search")
            raise UserError(f"search: needs optuna, which is not installed: {install}") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self._space: dict[str, Any] = {
            "factor": optuna.distributions.FloatDistribution(low, high, log=True)
        }

    def __call__(self, before: Sequence[Mapping[str, Any]], seed: int) -> float:
        """Returns the next factor; it depends on nothing but the arguments."""
        optuna = self._optuna
        sampler = optuna.samplers.TPESampler(n_startup_trials=0, seed=seed)
        study = optuna.create_study(sampler=sampler)
        for trial in before:
            value = math.inf if trial[METRIC] is None else trial[METRIC]
            study.add_trial(
                optuna.trial.create_trial(
                    params={"factor": trial["factor"]}, distributions=self._space, value=value
                )
            )
        return study.ask(self._space).params["factor"]
