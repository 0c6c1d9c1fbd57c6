"""Compiles the programs of a run for a slice, each in a process of its own, and reports on them."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_jax import accounting
from lightning_jax.aot import topologies
from lightning_jax.aot.programs import PROGRAMS, Shape, check_shape, segment_of
from lightning_jax.aot.topologies import Slice
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.fields import to_dict
from lightning_jax.runtime.checkout import git_commit
from lightning_jax.train.resolve import resolve

logger = logging.getLogger(__name__)

# glog's line for a check that ends the process, without its prefix.
_FATAL = re.compile(r"^F\d{4} .*?\] (.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Task:
    """A program of a run on a slice; what a compilation depends on, besides versions."""

    config: RunConfig
    topology: Slice
    program: str
    shape: Shape

    def request(self) -> dict[str, Any]:
        """The task as JSON for `child`."""
        return {
            "config": to_dict(self.config),
            "generation": self.topology.generation,
            "sizes": list(self.topology.sizes),
            "slices": self.topology.count,
            "program": self.program,
            "shape": dataclasses.asdict(self.shape),
        }


def check(config: RunConfig, programs: Sequence[str], shape: Shape) -> RunConfig:
    """Makes sure that a run can be compiled; returns it with its vocabulary's size.

    Raises:
      UserError: an unknown program or stage, a size below 1, or no libtpu.
    """
    for name in programs:
        if name not in PROGRAMS:
            raise UserError(f"programs = {name!r}: must be {suggest(name, PROGRAMS)}")
    check_shape(shape)
    segment_of(config, shape.stage)
    topologies.versions()
    return config if config.model.vocab_size else resolve(config).config


def compile_all(
    config: RunConfig, topology: Slice, programs: Sequence[str], shape: Shape
) -> dict[str, Any]:
    """Compiles programs for a slice, one after the other.

    Args:
      config: as `check` returns it.
      topology: where it shall run.
      programs: some of `PROGRAMS`.
      shape: their sizes.

    Returns:
      `about` and, by name, what `child.answer` says of each program.

    Raises:
      UserError: as `run_task`.
    """
    found = {}
    for name in programs:
        logger.info("compiling %s for %s", name, topology)
        found[name] = run_task(Task(config, topology, name, shape))
    mesh = next(iter(found.values()))["mesh"]
    return {**about(config, topology), "mesh": mesh, "programs": found}


def about(config: RunConfig, topology: Slice) -> dict[str, Any]:
    """What a report is about: model, slice, versions, the commit of this checkout if it is one."""
    size = accounting.parameters(config.model)
    return {
        "topology": str(topology),
        "slices": topology.count,
        "chips": topology.chips,
        "chip": dataclasses.asdict(topology.chip) | {"peak": topology.chip.peak},
        "versions": topologies.versions(),
        "commit": git_commit()[0],
        "parameters": size.total,
        "parameters_per_token": size.active,
        "layers": config.model.num_layers,
    }


def run_task(task: Task) -> dict[str, Any]:
    """Compiles one program in a process of its own.

    Raises:
      UserError: bad input, or the compiler ended the process.
      RuntimeError: the process failed by our fault; holds its standard error.
    """
    with tempfile.TemporaryDirectory(prefix="lightning_jax_aot_") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps(task.request()))
        command = [sys.executable, "-m", "lightning_jax.aot.child", str(request), str(answer)]
        done = subprocess.run(
            command,
            env=topologies.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise _failure(task, done.returncode, done.stderr)
        found = json.loads(answer.read_text())
    if "error" in found:
        raise UserError(f"{task.program} on {task.topology}: {found['error']}")
    return found


def _failure(task: Task, status: int, log: str) -> Exception:
    where = f"{task.program} on {task.topology}"
    if status == -signal.SIGKILL:
        return UserError(f"{where}: the compiler was killed; it needs more memory than is here")
    if status < 0:
        words = _FATAL.findall(log)
        reason = words[0] if words else signal.Signals(-status).name
        return UserError(f"{where}: libtpu ended the process: {reason[:300]}")
    return RuntimeError(f"{where}:\n{log}")
