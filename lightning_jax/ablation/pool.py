"""Runs in processes of their own, several at once: what one dies of does not reach the others.

A process per run costs about a second of imports. Compiled programs are kept in a folder that all
runs of a sweep share, so that the seeds of an arm compile once. The cores are divided among the
processes by affinity, which XLA asks for the number of its threads.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lightning_jax.ablation import child, failures
from lightning_jax.ablation.table import Screen
from lightning_jax.ablation.tasks import Task
from lightning_jax.config.fields import to_dict
from lightning_jax.runtime import output
from lightning_jax.train.interruption import Stopped
from lightning_jax.train.signals import StopRequest

# What the process of a run prints, in the run's folder.
LOG = "log.txt"
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Pool:
    """How tasks are trained.

    Attributes:
      compiled: folder of the compiled programs that they share.
      jobs: how many at once.
      allow_changed_data: see `train.loop.run`.
    """

    compiled: Path
    jobs: int = 1
    allow_changed_data: bool = False

    def train(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, str | None]]:
        """Trains tasks; yields each when it has ended, with the reason, in one line, if it failed.

        A half-done task resumes. The reason is kept as `failure.txt` in the task's folder, but for
        a folder that another process uses, and for a process that somebody else has stopped.

        Raises:
          Stopped: a signal to this process; the states of all tasks have been saved.
        """
        waiting, running = collections.deque(tasks), dict[int, _Process]()
        cores, stopped = divide_cores(self.jobs), 0
        with StopRequest() as stop, Screen(tasks, self.jobs) as screen:
            stop.has_work = True
            try:
                while running or (waiting and not stop.signal):
                    for slot in sorted({*range(self.jobs)} - {*running}):
                        if waiting and not stop.signal:
                            task = waiting.popleft()
                            screen.begin(task)
                            running[slot] = _Process(task, self, cores[slot])
                    for slot, process in [*running.items()]:
                        if stop.signal:
                            process.stop()
                        if not process.is_alive():
                            del running[slot]
                            has_ended, failure = process.result()
                            stopped += not has_ended
                            if has_ended:
                                screen.end(process.task, failure)
                                yield process.task, failure
                    screen.look()
                    time.sleep(_POLL_SECONDS)
            finally:
                for process in running.values():
                    process.stop()
                for process in running.values():
                    process.wait()
            if stop.signal:
                saved = f"{stopped} runs are saved" if stopped else "nothing was running"
                output.say(f"{stop.signal.name}: {saved}; the same command resumes")
                raise Stopped(stop.signal)


def divide_cores(jobs: int) -> list[list[int] | None]:
    """Returns the cores of each of `jobs` processes; None for all, or where it is not known.

    With more processes than cores, some have the same core.
    """
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        return [[cores[index % len(cores)]] for index in range(jobs)]
    return [part.tolist() for part in np.array_split(cores, jobs)]


class _Process:
    """The process of a task, see `child`."""

    def __init__(self, task: Task, pool: Pool, cores: list[int] | None) -> None:
        self.task, self._is_told = task, False
        request = child.Request(
            config=to_dict(task.config),
            folder=str(task.folder),
            ways={name: dataclasses.asdict(way) for name, way in task.ways},
            compiled=str(pool.compiled),
            cores=cores,
            allow_changed_data=pool.allow_changed_data,
            argv=sys.argv,
            orig_argv=sys.orig_argv,
        )
        task.folder.mkdir(parents=True, exist_ok=True)
        with open(task.folder / LOG, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", child.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # A terminal's Ctrl-C reaches the pool alone, which passes it on.
                start_new_session=True,
            )
        assert self._process.stdin  # As asked for; it stays open, see `child`.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(dataclasses.asdict(request)).encode() + b"\n")
            self._process.stdin.flush()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Asks the run to save its state and to end, once."""
        if not self._is_told:
            self._is_told = True
            self._process.terminate()

    def wait(self) -> None:
        """Waits for the end, without closing standard input, at whose end the process is ended."""
        self._process.wait()

    def result(self) -> tuple[bool, str | None]:
        """Of a process that has ended: whether its run has, and why it failed if it did."""
        answer, _ = self._process.communicate()
        if not self._process.returncode:
            return True, json.loads(answer)["failure"]
        if self._is_told:
            return False, None
        reason = failures.of_status(self._process.returncode)
        if not failures.is_order(self._process.returncode):
            failures.keep(self.task.folder, f"{reason}\n\nIts last words are in {LOG}.\n")
        return True, reason
