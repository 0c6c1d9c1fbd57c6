"""Runs of a sweep: what is finished is skipped, what is half done resumes, what fails is a row."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_jax.ablation import budget, failures, inference, same, search
from lightning_jax.ablation.pool import Pool
from lightning_jax.ablation.results import FAILURE, METRIC, Run, collect, read, write_results
from lightning_jax.ablation.sweep import FILE, Sweep
from lightning_jax.ablation.tasks import Task
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.config.routing import EvalRouting
from lightning_jax.runtime.files import write_json
from lightning_jax.train.workdir import claim

logger = logging.getLogger(__name__)

_COMPILED = "compiled"


def run_sweep(
    sweep: Sweep,
    workdir: str | os.PathLike[str],
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
    allow_changed_data: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Trains the unfinished runs in `workdir/<arm>/seed_<n>`, and collects the results.

    What runs depend on comes first, see `configs`. Finished runs are skipped and half-done ones
    resume; those that failed before come last. After each run `results.jsonl` and `results.csv`
    have one row for each finished run of the folder (see `collect`). Each run is a process of its
    own (see `pool`): what it raises or is killed by becomes its `failure.txt`, with a traceback if
    it was no bad input, and the next run begins.

    Args:
      sweep: what to run.
      workdir: folder of the sweep; gets `sweep.json`.
      only: arms to run; empty: all.
      seeds: seeds to run; empty: all.
      jobs: runs at once; they divide the cores among them.
      allow_changed_data: see `train.loop.run`.

    Returns:
      The rows, and by run the one-line reason of those that failed this time, or that have a result
      or a folder which cannot be used.

    Raises:
      UserError: the folder holds runs of another sweep (names the field), or is in use; see
        `configs`.
      Stopped: a signal; the states of the runs have been saved.
    """
    require(jobs >= 1, "jobs", jobs, "1 or more")
    runs = sweep.runs(only, seeds)
    with claim(workdir) as claimed:
        root = claimed.path
        pool = Pool(root / _COMPILED, jobs, allow_changed_data)
        return _train(sweep, root, runs, configs(sweep, root, runs, pool), pool)


def run_task(
    sweep: Sweep, workdir: str | os.PathLike[str], task: int, *, allow_changed_data: bool = False
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Trains one run of a sweep, as `run_sweep` does, but locks no more than the run's folder.

    So any scheduler can train the runs of a sweep, in any order and at the same time.

    Args:
      sweep: what to run.
      workdir: folder of the sweep.
      task: the run's number in `sweep.runs()`.
      allow_changed_data: see `train.loop.run`.

    Raises:
      UserError: there is no such run, the folder holds runs of another sweep, or what runs depend
        on is missing (see `prepare`).
      Stopped: a signal; the state has been saved.
    """
    runs = sweep.runs()
    right = f"the number of a run, from 0 to {len(runs) - 1}"
    require(0 <= task < len(runs), "task", task, right)
    root = Path(os.path.abspath(workdir))
    pool = Pool(root / _COMPILED, 1, allow_changed_data)
    return _train(sweep, root, [runs[task]], configs(sweep, root, runs, None), pool)


def prepare(
    sweep: Sweep,
    workdir: str | os.PathLike[str],
    *,
    jobs: int = 1,
    allow_changed_data: bool = False,
) -> dict[str, dict[str, float]]:
    """Trains what runs depend on, see `configs`, and no run; `run_task` needs it.

    Returns:
      By arm, the factors on `tokens` and `learning_rate` of its config.
    """
    require(jobs >= 1, "jobs", jobs, "1 or more")
    with claim(workdir) as claimed:
        root = claimed.path
        pool = Pool(root / _COMPILED, jobs, allow_changed_data)
        configs(sweep, root, sweep.runs(), pool)
        _write(sweep, root)
        scales = budget.scales(sweep, root)
        rates = search.factors(sweep, root, (), scales, None)
        return {arm: {"tokens": scales[arm], "learning_rate": rate} for arm, rate in rates.items()}


def configs(
    sweep: Sweep, root: Path, runs: Sequence[Run], pool: Pool | None
) -> dict[Run, RunConfig]:
    """Returns the configs of a sweep's runs, with the tokens and learning rates of their arms.

    What these depend on is trained first where the folder does not have it: calibrations of budgets
    (`budget.scales`), then searches of learning rates (`search.factors`).

    Args:
      sweep: the sweep.
      root: its folder.
      runs: those that will be trained, whose learning rates must be known.
      pool: trains what is missing; None refuses it.

    Returns:
      By run, but for those whose arm was not searched, or all of whose trials failed.

    Raises:
      UserError: the folder holds runs of another sweep (names the field); a calibration failed; or
        something is missing without a `pool`.
      Stopped: a signal; the states of what is trained have been saved.
    """
    same.check_runs(sweep, root)
    train = None if pool is None else functools.partial(_calibrate, pool)
    scales = budget.scales(sweep, root, train=train)
    # A run that measures the baseline's scaling has its learning rate.
    models = {arm: arm for arm in sweep.arms} | dict.fromkeys(sweep.scaling_arms, sweep.baseline)
    needed = dict.fromkeys(models[run.arm] for run in runs)
    rates = search.factors(sweep, root, [*needed], scales, pool)
    found = {
        run: sweep.config(run, tokens=scales[run.arm], rate=rates[models[run.arm]])
        for run in sweep.runs()
        if models[run.arm] in rates
    }
    same.check_configs(found, root)
    return found


def _calibrate(pool: Pool, config: RunConfig, folder: Path) -> None:
    for _, failure in pool.train([Task(f"calibration of {folder.name}", config, folder)]):
        if failure:
            raise UserError(failure)


def unfinished(sweep: Sweep, runs: Iterable[Run], root: Path) -> tuple[list[Run], dict[str, str]]:
    """Returns the runs to train, those that failed before last, and why others cannot be used.

    A run that was not evaluated under all routings of `sweep.inference` is one of them.
    """
    left, failed = [], {}
    for run in runs:
        try:
            row = read(run, run.folder(root))
        except UserError as error:
            failed[str(run)] = str(error)
            logger.error("%s: %s", run, error)
        else:
            if row is None or not inference.is_measured(run.folder(root), _ways(sweep, run)):
                left.append(run)
            else:
                logger.info("%s: finished before", run)
    return sorted(left, key=lambda run: (run.folder(root) / FAILURE).exists()), failed


def _ways(sweep: Sweep, run: Run) -> Mapping[str, EvalRouting]:
    return sweep.routings if sweep.config(run).model.moe.num_experts else {}


def _train(
    sweep: Sweep, root: Path, runs: Sequence[Run], known: Mapping[Run, RunConfig], pool: Pool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Trains what is left of some runs, whose configs are `known`; see `run_sweep`."""
    _write(sweep, root)
    left, failed = unfinished(sweep, runs, root)
    tasks = {}
    for run in left:
        if run in known:
            ways = tuple(_ways(sweep, run).items())
            tasks[Task(str(run), known[run], run.folder(root), ways)] = run
        else:
            failed[str(run)] = "every trial of its learning rate failed"
            failures.keep(run.folder(root), failed[str(run)] + "\n")
    for task, failure in pool.train([*tasks]):
        if failure := failure or _judge(tasks[task], task.folder):
            failed[task.name] = failure
        _collect(sweep, root)
    return _collect(sweep, root), failed


def _judge(run: Run, folder: Path) -> str | None:
    """Reads the result of a run that has ended well; returns why it cannot be used, if so."""
    try:
        row = read(run, folder)
        reason = "it ended without an evaluation" if row is None else None
    except UserError as error:
        row, reason = None, str(error)
    if row is None:
        failures.keep(folder, f"{reason}\n")
        return reason
    failures.forget(folder)
    logger.info("%s: %.4f bits per byte", run, row[METRIC])
    return None


def _write(sweep: Sweep, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / FILE, dataclasses.asdict(sweep))


def _collect(sweep: Sweep, root: Path) -> list[dict[str, Any]]:
    """Writes and returns the rows of all runs that have finished, whoever trained them.

    Of several processes that do this at once, the last to write has read what all others left.
    """
    rows, written = collect(sweep.runs(), root), None
    while rows != written:
        write_results(root, rows)
        rows, written = collect(sweep.runs(), root), rows
    return rows
