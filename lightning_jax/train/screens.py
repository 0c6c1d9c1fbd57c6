"""The first and the last lines of a run: where things are, what happens, and what is next."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from lightning_jax import accounting
from lightning_jax.config import StageConfig
from lightning_jax.runtime import invocation
from lightning_jax.train.plan import Plan, end_rate

# Rows of the plan and of its sources; of a run with more, the rest is counted.
_MOST_ROWS = 8
# Where Linux says how much memory the processes of a container may take.
_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def opening(
    workdir: Path,
    plan: Plan,
    mesh: Mesh,
    *,
    start: int,
    lost: int,
    fresh: bool,
    epochs: Mapping[str, float],
    memory: Mapping[str, int],
) -> str:
    """Returns the first screen of a run: what is about to happen, where, and how to go on.

    Args:
      workdir: folder of the run.
      plan: of the run.
      mesh: of the run.
      start: steps that earlier sessions took and saved.
      lost: steps that they took after those.
      fresh: whether there is no checkpoint, not even one of imported weights.
      epochs: by source with weight, about how often the stages read all of it.
      memory: bytes on each device by what they are, see `placement.state_bytes`.
    """
    where = _near(workdir)
    model = accounting.summary_rows(plan.config.model, plan.max_seq_len)
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0]
    devices = f"{mesh.size} x {device.device_kind}" + (f" ({axes})" if axes else "")
    return "\n".join(
        [
            _headline(where, plan, start, lost, fresh),
            "",
            *_columns([["model", model[0][1]], *model[1:]]),
            *_columns([["devices", devices], *_memory(memory, device)]),
            "",
            *_columns(_stages(plan)),
            *_columns(_sources(plan, epochs)),
            "",
            *_columns(_ways(where), indent=""),
            "",
        ]
    )


def closing(workdir: Path, plan: Plan) -> str:
    """Returns the last lines of a run that has come to its end: where things are, what is next."""
    where = _near(workdir)
    run = f"--workdir={where}"
    prompt = f"--prompt={plan.config.sample_prompt}"
    return "\n".join(
        _columns(
            [
                ["done", f"all {plan.total_steps} steps of {where}/"],
                ["result", f"{where}/evaluation.json"],
                ["watch", _watch(where)],
                ["next", invocation.command("generate", run, prompt)],
                ["or", invocation.command("evaluate", run)],
            ],
            indent="",
        )
    )


def _headline(where: str, plan: Plan, start: int, lost: int, fresh: bool) -> str:
    total, tokens = plan.total_steps, accounting.count_text(plan.total_tokens)
    if not start:
        what = f"a new run of {total} steps, {tokens} tokens"
        what += "" if fresh else ", from the weights in checkpoint 0"
    elif start < total:
        stage = plan.segment_at(start).stage.name
        what = f"resumes after step {start} of {total}, in stage {stage!r}"
    else:
        what = f"all {total} steps were taken before: only the last evaluation is repeated"
    if lost:
        last = start + lost
        what += f"; steps {start + 1} to {last} were not saved and are taken again"
    return f"{where}: {what}"


def _memory(memory: Mapping[str, int], device: jax.Device) -> list[list[str]]:
    limit = _limit(device)
    rows = accounting.memory_rows(memory, limit)
    needed = sum(memory.values()) + memory["parameters"]
    if limit and needed > limit:
        rows[-1][1] += "; they do not fit: split them with config.mesh.fsdp"
    return rows


def _limit(device: jax.Device) -> int | None:
    """Bytes of memory of a device, its part of the machine's if it is a CPU; None if unknown."""
    if device.process_index != jax.process_index():
        return None
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    if not hasattr(os, "sysconf"):
        return None
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # "max": no limit of a container
        limits.append(int(_CONTAINER.read_text()))
    return min(limits) // jax.local_device_count()


def _stages(plan: Plan) -> list[list[str]]:
    rows = [["stage", "steps", "tokens", "batch x length", "learning rate, over tokens"]]
    previous = None
    for segment in plan.segments:
        parts = f" in {segment.accumulate} parts" if segment.accumulate > 1 else ""
        rows.append(
            [
                segment.stage.name,
                f"{segment.steps:,}",
                accounting.count_text(segment.steps * segment.step_tokens),
                f"{segment.batch_size} x {segment.seq_len}{parts}",
                _rate(segment.stage, previous),
            ]
        )
        previous = segment.stage
    return _cut(rows)


def _rate(stage: StageConfig, previous: StageConfig | None) -> str:
    """The shape of a stage's learning rate, such as "0 to 0.004 in 32 K, linear to 0 in 80 K"."""
    peak, count = f"{stage.learning_rate:g}", accounting.count_text
    text = peak
    if stage.warmup_tokens:
        begin = f"{end_rate(previous):g}" if previous else "0"
        text = f"{begin} to {peak} in {count(stage.warmup_tokens)}"
    if stage.decay != "none" and stage.decay_tokens:
        text += f", {stage.decay} to {stage.final_learning_rate:g} in {count(stage.decay_tokens)}"
    return text


def _sources(plan: Plan, epochs: Mapping[str, float]) -> list[list[str]]:
    stages = plan.config.stages
    shares = [plan.config.data.shares(stage) for stage in stages]
    rows = [["text", "tokens", "epochs", "share in each stage"]]
    for name, times in epochs.items():
        each = [share.get(name, 0.0) for share in shares]
        tokens = sum(stage.tokens * share for stage, share in zip(stages, each, strict=True))
        percent = ", ".join(f"{share:.0%}" for share in each)
        rows.append([name, accounting.count_text(tokens), f"{times:.2g}", percent])
    return _cut(rows)


def _ways(where: str) -> list[list[str]]:
    again = invocation.typed() or "run this cell again"
    return [
        ["files", f"{where}/: checkpoints, config.json, metrics.jsonl, run.json"],
        ["watch", _watch(where)],
        ["resume", again],
        ["Ctrl-C", "saves after the step at hand and ends; a second one ends at once"],
    ]


def _watch(where: str) -> str:
    return invocation.tool("tensorboard", f"--logdir={where}")


def _near(path: Path) -> str:
    """A path as it is written in the present folder, if it is in there."""
    inside = os.path.relpath(path)
    return str(path) if inside.startswith(os.pardir) else inside


def _cut(rows: list[list[str]]) -> list[list[str]]:
    left = len(rows) - 1 - _MOST_ROWS
    return [*rows[: _MOST_ROWS + 1], [f"and {left} more"]] if left > 0 else rows


def _columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Rows as aligned lines; those after the first are indented."""
    cells = [[indent * bool(i) + row[0], *row[1:]] for i, row in enumerate(rows)]
    width = [0] * max(map(len, cells))
    for row in cells:
        for column, cell in enumerate(row[:-1]):
            width[column] = max(width[column], len(cell))
    return [
        "  ".join([*(cell.ljust(width[i]) for i, cell in enumerate(row[:-1])), row[-1]])
        for row in cells
    ]
