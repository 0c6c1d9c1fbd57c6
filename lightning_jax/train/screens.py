"""The first and the last lines of a run: where things are, what happens, and what is next."""

from __future__ import annotations

import shlex
from pathlib import Path

from jax.sharding import Mesh

from lightning_jax.runtime.invocation import command
from lightning_jax.train.plan import Plan


def opening(workdir: Path, plan: Plan, start: int, mesh: Mesh) -> str:
    """Returns the first screen of a run: where things are, and what is about to happen.

    Args:
      workdir: folder of the run.
      plan: of the run.
      start: steps that earlier sessions took.
      mesh: of the run.
    """
    total, stages = plan.total_steps, {stage.name: 0 for stage in plan.config.stages}
    for segment in plan.segments:
        stages[segment.stage.name] += segment.steps
    steps = f"{total} ({', '.join(f'{name} {count}' for name, count in stages.items())})"
    if start:
        steps += f", {start} of them before" if start < total else ", all of them before"
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    platform = mesh.devices.flat[0].device_kind
    return _screen(
        {
            "run": f"{workdir}/ (config.json, run.json, checkpoints, metrics.jsonl)",
            "watch": f"tensorboard --logdir={shlex.quote(str(workdir))}",
            "steps": steps,
            "devices": f"{mesh.size} x {platform}" + (f" ({axes})" if axes else ""),
        }
    )


def closing(workdir: Path, plan: Plan) -> str:
    """Returns the last lines of a run that has come to its end: where things are, what is next."""
    run = f"--workdir={workdir}"
    return _screen(
        {
            "done": f"all {plan.total_steps} steps of {workdir}/",
            "result": f"{workdir}/evaluation.json",
            "watch": f"tensorboard --logdir={shlex.quote(str(workdir))}",
            "next": command("generate", run, f"--prompt={plan.config.sample_prompt}"),
            "or": command("evaluate", run),
        }
    )


def _screen(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:<8} {text}" for name, text in lines.items())
