"""Speed of a run, and its progress bar: stage, step, loss, tokens per second, time left."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich import progress as bars
from rich.console import Console

from lightning_jax.runtime import output

_SMOOTHING = 0.95
# Without a terminal there is no bar to redraw: a line is printed once in so many seconds.
_LINE_SECONDS = 15


class Throughput:
    """Counts tokens against the wall clock, in laps."""

    def __init__(self) -> None:
        self._begun = self._lap_begun = time.perf_counter()
        self._tokens = 0

    def count(self, tokens: int) -> None:
        """Adds tokens to the present lap."""
        self._tokens += tokens

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second in the present lap."""
        return self._tokens / max(time.perf_counter() - self._lap_begun, 1e-9)

    def end_lap(self) -> dict[str, float]:
        """Returns the speed of the lap and the seconds since the start; begins another lap."""
        speed, now = self.tokens_per_second, time.perf_counter()
        self._lap_begun, self._tokens = now, 0
        return {"tokens_per_second": speed, "seconds": now - self._begun}


class Progress:
    """A bar over the steps of all stages, on stderr; without a terminal a line now and then."""

    def __init__(self, total_steps: int, start: int):
        self._total_steps = total_steps
        output.guard()
        self._console = Console(stderr=True)
        self._bar = bars.Progress(
            bars.TextColumn("{task.fields[stage]}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[state]}"),
            bars.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=total_steps, completed=start, stage="", state="compiling"
        )
        self._loss: float | None = None
        self._line_due = 0.0
        self._begun: float | None = time.perf_counter()

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def open(self, screen: str) -> None:
        """Prints the first screen of a run, and says that compiling is next if no bar does."""
        self.note(screen)
        if not self._console.is_terminal:
            self.note("compiling the first step ...")

    def begin_stage(self, name: str) -> None:
        """Shows the stage that the next steps belong to."""
        self._bar.update(self._task, stage=name)

    def advance(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` steps are done; the loss is smoothed over steps where it is finite."""
        if math.isfinite(loss):
            before = loss if self._loss is None else self._loss
            self._loss = _SMOOTHING * before + (1 - _SMOOTHING) * loss
        shown = "not finite" if self._loss is None else f"{self._loss:.3f}"
        state = f"loss {shown}  {tokens_per_second:,.0f} tok/s"
        self._bar.update(self._task, completed=step, state=state)
        now = time.perf_counter()
        due = now > self._line_due or step == self._total_steps
        if not self._console.is_terminal and due:
            self._line_due = now + _LINE_SECONDS
            left = self._bar.tasks[0].time_remaining
            left_text = f"  {left:,.0f} s left" if left else ""
            first = f"  first step after {now - self._begun:.0f} s" if self._begun else ""
            self.note(f"step {step}/{self._total_steps}  {state}{left_text}{first}")
        self._begun = None

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)
