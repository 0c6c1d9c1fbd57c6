"""Runs of a sweep handed to a scheduler by submitit: a job for each run that has not finished."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_jax.ablation import runner
from lightning_jax.ablation.sweep import Sweep
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require, require_choice
from lightning_jax.runtime import invocation
from lightning_jax.train.interruption import Stopped

CLUSTERS = ("slurm", "local")
# Of the jobs: their scripts, logs and results.
_FOLDER = "submitit"


@dataclasses.dataclass(frozen=True)
class Job:
    """What jobs call: it trains one run, see `runner.run_task`.

    A job whose time is up, or that must make room for others, gets a signal: the run is saved, and
    submitit queues the job again.
    """

    sweep: Sweep
    workdir: str
    allow_changed_data: bool

    def __call__(self, task: int) -> None:
        """Trains the run with a number. UserError: it failed."""
        try:
            _, failed = runner.run_task(
                self.sweep, self.workdir, task, allow_changed_data=self.allow_changed_data
            )
        except Stopped as stopped:
            # Now that the run is saved, for the handler of submitit.
            signal.raise_signal(stopped.signal)
            raise
        for name, reason in failed.items():
            raise UserError(f"{name} failed: {reason}")

    def checkpoint(self, task: int) -> Any:
        """Returns the call of a job that is queued again; submitit asks for it."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, task)


def submit(
    sweep: Sweep,
    workdir: str | os.PathLike[str],
    cluster: str,
    parameters: Mapping[str, Any],
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    allow_changed_data: bool = False,
) -> dict[str, str]:
    """Hands every run that has not finished to a scheduler, and returns at once.

    Args:
      sweep: what to run.
      workdir: folder of the sweep, which the jobs see too; gets `submitit`, with their logs.
      cluster: `slurm`, or `local`: processes of this machine, all of them at once.
      parameters: of submitit's `AutoExecutor`: `timeout_min`, and such as `slurm_partition`.
      only: arms to run; empty: all.
      seeds: seeds to run; empty: all.
      allow_changed_data: see `train.loop.run`.

    Returns:
      The identifiers of the jobs by run.

    Raises:
      UserError: submitit is not installed, or refuses the cluster or a parameter; the folder holds
        runs of another sweep; or what runs depend on is missing (see `runner.prepare`).
    """
    require_choice("submit", cluster, CLUSTERS)
    require("timeout_min" in parameters, "executor", parameters, "with timeout_min, of one run")
    root = Path(os.path.abspath(workdir))
    numbers = {run: number for number, run in enumerate(sweep.runs())}
    runs = sweep.runs(only, seeds)
    runner.configs(sweep, root, runs, None)
    left, _ = runner.unfinished(sweep, runs, root)
    executor = _executor(root / _FOLDER, cluster, {"name": "lightning_jax", **parameters})
    job = Job(sweep, str(root), allow_changed_data)
    jobs = executor.map_array(job, [numbers[run] for run in left]) if left else []
    return {str(run): submitted.job_id for run, submitted in zip(left, jobs, strict=True)}


def _executor(folder: Path, cluster: str, parameters: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError as error:
        install = invocation.install("slurm")
        raise UserError(f"submit: needs submitit, which is not installed: {install}") from error

    def executor(folder: str | Path) -> Any:
        made = submitit.AutoExecutor(folder=folder, cluster=cluster)
        made.update_parameters(**parameters)
        return made

    try:
        # An executor makes its folder before it refuses its parameters.
        with tempfile.TemporaryDirectory() as elsewhere:
            executor(elsewhere)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"submit = {cluster!r}: {' '.join(str(error).split())}") from error
    return executor(folder)
