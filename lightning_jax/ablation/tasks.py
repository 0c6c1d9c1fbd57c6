"""Runs to train, and how far they are."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from lightning_jax.config import RunConfig
from lightning_jax.config.routing import EvalRouting
from lightning_jax.train.plan import Plan
from lightning_jax.train.workdir import METRICS

# The end of a log, in which its last rows are.
_TAIL_BYTES = 65_536


@dataclasses.dataclass(frozen=True)
class Task:
    """A run to train.

    Attributes:
      name: what messages call it.
      config: of the run.
      folder: of the run.
      ways: by name, other routings under which it is evaluated when it has finished.
    """

    name: str
    config: RunConfig
    folder: Path
    ways: tuple[tuple[str, EvalRouting], ...] = ()


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is; None where its log does not say that.

    Attributes:
      step: steps that it has taken and logged.
      steps: of the whole run.
      loss: nats per token.
      speed: tokens per second.
      left: seconds of training.
    """

    step: int
    steps: int
    loss: float | None = None
    speed: float | None = None
    left: float | None = None

    @classmethod
    def of(cls, task: Task) -> Progress:
        """Reads the end of a run's log; one that cannot be read is as good as none."""
        plan = Plan.of(task.config)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            row = _last_step(task.folder / METRICS)
            speed = row["tokens_per_second"]
            left = max(plan.total_tokens - row["tokens"], 0) / speed
            return cls(row["step"], plan.total_steps, row["loss"], speed, left)
        return cls(0, plan.total_steps)


def _last_step(path: Path) -> dict[str, Any]:
    """The last whole row of a training step in a `metrics.jsonl`; an empty one if there is none."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        if b'"tokens_per_second"' in line:
            return json.loads(line)
    return {}
