"""The runs that are being trained, as a live table on standard error.

Without a terminal it is a line for each of them whenever nothing was said for some seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightning_jax.ablation.tasks import Progress, Task
from lightning_jax.runtime import output

_REDRAW_SECONDS, _LINE_SECONDS = 0.5, 10.0


class Screen:
    """Shows tasks while they are trained.

    Args:
      tasks: all that will be trained.
      jobs: how many at once.
    """

    def __init__(self, tasks: Sequence[Task], jobs: int) -> None:
        self._total, self._jobs = len(tasks), jobs
        self._begun: dict[Task, float] = {}
        self._seconds: list[float] = []
        self._failed = 0
        self._drawn = time.monotonic()
        console = output.console()
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._has_table = console.is_terminal

    def __enter__(self) -> Screen:
        if self._has_table:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_table:
            self._live.stop()

    def begin(self, task: Task) -> None:
        """A task is being trained from now on."""
        self._begun[task] = time.monotonic()
        number = len(self._seconds) + len(self._begun)
        output.say(f"run {number} of {self._total}: {task.name}")

    def end(self, task: Task, failure: str | None) -> None:
        """A task is trained no more; it has failed if there is a reason."""
        seconds = time.monotonic() - self._begun.pop(task)
        self._seconds.append(seconds)
        self._failed += failure is not None
        what = f"failed: {failure}" if failure else duration(seconds)
        running = [Progress.of(other) for other in self._begun]
        output.say(f"{task.name}: {what}  ({self._caption(running)})")

    def look(self) -> None:
        """Draws the table or says the lines, if it is time."""
        if self._has_table and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)
        elif not self._has_table and output.seconds_since_a_line() > _LINE_SECONDS:
            for task in self._begun:
                output.say(f"{task.name}: {_text(Progress.of(task))}")

    def _table(self) -> Table:
        found = {task: Progress.of(task) for task in self._begun}
        table = Table(caption=Text(self._caption(found.values())), caption_justify="left")
        for index, name in enumerate(("run", "step", "loss", "tok/s", "left")):
            table.add_column(name, justify="right" if index else "left")
        for task, progress in found.items():
            table.add_row(Text(task.name), *_cells(progress))
        return table

    def _caption(self, running: Iterable[Progress]) -> str:
        """How many have ended, and how long the others will take at the pace of those."""
        ended = len(self._seconds)
        text = f"{ended} of {self._total} runs ended"
        text += f", {self._failed} failed" if self._failed else ""
        if not ended:
            return text
        each = sum(self._seconds) / ended
        waiting = self._total - ended - len(self._begun)
        left = each * waiting + sum(each if p.left is None else p.left for p in running)
        return f"{text}, about {duration(left / self._jobs)} left" if left else text


def _text(progress: Progress) -> str:
    if not progress.step:
        return "starting"
    step, loss, speed, left = _cells(progress)
    then = "evaluating" if progress.step == progress.steps else f"{left} left"
    return f"step {step}  loss {loss}  {speed} tok/s  {then}"


def _cells(progress: Progress) -> list[str]:
    """Step, loss, tokens per second and time left, as texts."""
    loss = "-" if progress.loss is None else f"{progress.loss:.3f}"
    speed = "-" if progress.speed is None else f"{progress.speed:,.0f}"
    left = "-" if progress.left is None else duration(progress.left)
    return [f"{progress.step}/{progress.steps}", loss, speed, left]


def duration(seconds: float) -> str:
    """Returns a time as text, in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
