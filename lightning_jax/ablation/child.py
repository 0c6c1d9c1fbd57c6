"""The process of one run of a sweep: `python -m lightning_jax.ablation.child`.

Standard input has one line of JSON, a `Request`, and stays open for as long as the process that
asks lives: at its end this one ends at once, as if killed. Standard output gets
`{"failure": reason}`, null for a run that has finished. A run that is stopped by a signal saves its
state and answers nothing; its status is 128 + signal.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_jax.ablation import failures, inference
from lightning_jax.ablation.results import Run, is_finished
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.routing import EvalRouting
from lightning_jax.runtime import compiler, program
from lightning_jax.runtime.lock import InUse
from lightning_jax.train import loop

_ORPHANED = 137  # 128 + SIGKILL


@dataclasses.dataclass(frozen=True)
class Request:
    """What the process is asked to do.

    Attributes:
      config: of the run, as `to_dict` writes it.
      folder: of the run.
      ways: by name, the fields of other routings under which the finished run is evaluated.
      compiled: folder of compiled programs, which all runs of a sweep share.
      cores: numbers of the cores that the run may use; None for all.
      allow_changed_data: see `train.loop.run`.
      argv, orig_argv: of the process that asks, for the run's record and messages.
    """

    config: dict[str, Any]
    folder: str
    ways: dict[str, dict[str, Any]]
    compiled: str
    cores: list[int] | None
    allow_changed_data: bool
    argv: list[str]
    orig_argv: list[str]


def train(
    config: RunConfig,
    folder: Path,
    *,
    ways: Mapping[str, EvalRouting] = types.MappingProxyType({}),
    allow_changed_data: bool = False,
) -> str | None:
    """Trains a run, unless it has finished, and evaluates it under other routings.

    Returns the reason, in one line, if that failed. It is kept as `failure.txt`, with a traceback
    if it was no bad input; but for a folder in which another process trains.

    Raises:
      Stopped: a signal; the state has been saved.
    """
    try:
        if not is_finished(folder):
            loop.run(config, folder, allow_changed_data=allow_changed_data)
        inference.evaluate(Run(folder.parent.name, config.seed), folder, ways)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an extension's panic is no Exception
        if isinstance(error, SystemExit) and type(error.code) is int and error.code > 128:
            raise
        reason = failures.reason(error)
        trace = "" if isinstance(error, UserError) else "\n" + traceback.format_exc()
        if not isinstance(error, InUse):
            failures.keep(folder, f"{reason}\n{trace}")
        return reason
    return None


def main() -> None:
    """Reads the request, trains and answers."""
    request = Request(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    sys.argv, sys.orig_argv = request.argv, request.orig_argv
    if request.cores is not None:
        # Before XLA makes a thread for each core.
        os.sched_setaffinity(0, request.cores)
    compiler.cache_in(request.compiled)
    config, folder = RunConfig.parse(request.config, "config"), Path(request.folder)
    ways = {name: EvalRouting(**fields) for name, fields in request.ways.items()}
    failure = train(config, folder, ways=ways, allow_changed_data=request.allow_changed_data)
    program.emit_json({"failure": failure})


def _end_with_parent() -> None:
    # Not `sys.stdin`, whose lock would be held at the end of the interpreter.
    while os.read(0, 1):
        pass
    os._exit(_ORPHANED)


if __name__ == "__main__":
    program.run(main)
