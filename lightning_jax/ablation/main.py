"""What `experiments.sweep` does, by its flags."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_jax.ablation import cluster, plan, runner
from lightning_jax.ablation.sweep import Sweep, load_sweep
from lightning_jax.config import overrides
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.runtime import files, invocation, program


@dataclasses.dataclass(frozen=True)
class Call:
    """The flags of the program; of `plan`, `prepare`, `task` and `submit` one at the most is given.

    Attributes:
      sweep: a sweep file.
      workdir: folder of the sweep.
      changes: of config fields, for every arm.
      only, seeds: arms and seeds; empty for all.
      jobs: runs at once.
      plan: print what the sweep will take.
      prepare: train what runs depend on.
      task: number of the one run to train.
      submit: scheduler for the runs.
      executor: parameters of `submit`, each as `name=value`.
      allow_changed_data: see `train.loop.run`.
    """

    sweep: str
    workdir: str
    changes: Mapping[str, Any]
    only: Sequence[str]
    seeds: Sequence[int]
    jobs: int
    plan: bool
    prepare: bool
    task: int | None
    submit: str | None
    executor: Sequence[str]
    allow_changed_data: bool


def run(call: Call) -> None:
    """Does what is asked for, and prints the answer as JSON.

    Raises:
      UserError: bad input, or a run has failed.
    """
    files.check_output_folder("workdir", call.workdir)
    _check_mode(call)
    parameters = _parameters(call)
    sweep = load_sweep(call.sweep, call.changes)
    if call.plan:
        program.emit_json({"plan": plan.print_plan(sweep, Path(call.workdir))})
    elif call.prepare:
        arms = runner.prepare(
            sweep, call.workdir, jobs=call.jobs, allow_changed_data=call.allow_changed_data
        )
        program.emit_json({"prepared": arms})
    elif call.submit is not None:
        jobs = cluster.submit(
            sweep,
            call.workdir,
            call.submit,
            parameters,
            only=call.only,
            seeds=call.seeds,
            allow_changed_data=call.allow_changed_data,
        )
        program.emit_json({"submitted": jobs})
    else:
        _train(sweep, call)


def _check_mode(call: Call) -> None:
    """Refuses flags that what is asked for does not read."""
    modes = {
        "plan": (call.plan, ("only", "seeds")),
        "prepare": (call.prepare, ("only", "seeds")),
        "task": (call.task is not None, ("only", "seeds", "jobs")),
        "submit": (call.submit is not None, ("jobs",)),
    }
    given = {"only": bool(call.only), "seeds": bool(call.seeds), "jobs": call.jobs != 1}
    for mode, (is_asked, unread) in modes.items():
        for name in unread if is_asked else ():
            require(not given[name], name, getattr(call, name), f"left out with --{mode}")


def _parameters(call: Call) -> dict[str, Any]:
    """The values of `executor`, which are Python literals or text."""
    right = "given with --submit"
    require(call.submit is not None or not call.executor, "executor", call.executor, right)
    pairs = [text.partition("=") for text in call.executor]
    for name, equals, _ in pairs:
        require(bool(name and equals), "executor", name, "written name=value,name=value")
    return {name: overrides.parse(value) for name, _, value in pairs}


def _train(sweep: Sweep, call: Call) -> None:
    if call.task is None:
        rows, failed = runner.run_sweep(
            sweep,
            call.workdir,
            only=call.only,
            seeds=call.seeds,
            jobs=call.jobs,
            allow_changed_data=call.allow_changed_data,
        )
    else:
        rows, failed = runner.run_task(
            sweep, call.workdir, call.task, allow_changed_data=call.allow_changed_data
        )
    if rows:
        report = invocation.command("report", f"--workdir={call.workdir}")
        print(f"next     {report}", file=sys.stderr)
    program.emit_json({"finished": rows, "failed": failed})
    if failed:
        name, first = next(iter(failed.items()))
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"{name} failed{others}: {first}")
