"""Speed of a run, and its progress bar: stage, step, loss, tokens per second, time left."""

from __future__ import annotations

import contextlib
import math
import time
from types import TracebackType

from rich import progress as bars

from lightning_jax.runtime import output, phases
from lightning_jax.train.plan import Segment

_SMOOTHING = 0.95


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
    """A bar over the steps of all stages, on stderr; without a terminal a line every few seconds.

    Steps are phases too (`runtime.phases`): one that takes long, because its program is compiled,
    is named with its seconds.
    """

    def __init__(self, total_steps: int, start: int):
        self._total_steps = total_steps
        console = output.console()
        self._has_bar = console.is_terminal
        self._bar = bars.Progress(
            bars.TextColumn("{task.fields[stage]}"),
            bars.BarColumn(bar_width=20),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[state]}"),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not self._has_bar,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start, stage="", state="")
        self._state: str | None = None  # of the last step; None while a program is compiled
        self._shapes: set[tuple[int, ...]] = set()
        self._loss: float | None = None
        self._line_due = 0.0
        self._begun = self._advanced = time.perf_counter()
        self._is_first = True
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Progress:
        self._opened.enter_context(self._bar)
        if self._has_bar:
            self._opened.enter_context(phases.shown_by(self._show))
        self._step = self._opened.enter_context(phases.phase("preparing the first step"))
        return self

    def _show(self, now: phases.Phase) -> None:
        is_step = now is self._step and self._state is not None
        quick = is_step and now.seconds < phases.LINE_SECONDS
        self._bar.update(self._task, state=self._state if quick else str(now))

    def begin(self, segment: Segment) -> None:
        """Shows the segment that the next steps belong to, and that its program is compiled."""
        self._bar.update(self._task, stage=segment.stage.name)
        shape = (segment.batch_size, segment.seq_len, segment.accumulate)
        if shape not in self._shapes:
            self._shapes.add(shape)
            which = f"a step of {segment.batch_size} x {segment.seq_len} tokens"
            self._step.what, self._state = f"compiling {which}", None
        self._step.restart()

    def advance(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` steps are done; the loss is smoothed over steps where it is finite."""
        if math.isfinite(loss):
            before = loss if self._loss is None else self._loss
            self._loss = _SMOOTHING * before + (1 - _SMOOTHING) * loss
        shown = "not finite" if self._loss is None else f"{self._loss:.3f}"
        self._state = f"loss {shown}  {tokens_per_second:,.0f} tok/s"
        self._bar.update(self._task, completed=step, state=self._state)
        now = time.perf_counter()
        # The next line would come with the next step, perhaps too late.
        due = now + (now - self._advanced) > self._line_due or step == self._total_steps
        if due and not self._has_bar:
            self._line_due = now + phases.LINE_SECONDS
            left = self._bar.tasks[0].time_remaining
            left_text = f"  {left:,.0f} s left" if left else ""
            first = f"  first step after {now - self._begun:.0f} s" if self._is_first else ""
            self.note(f"step {step}/{self._total_steps}  {self._state}{left_text}{first}")
        self._advanced, self._is_first = now, False
        self._step.what = f"step {step + 1}/{self._total_steps}"
        self._step.restart()

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        output.say(text)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, trace)
