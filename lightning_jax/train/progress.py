"""The progress bar: stage, step, loss, tokens a second, time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress as bars
from rich.console import Console

from lightning_jax.config import RunConfig

_SMOOTHING = 0.95


class Progress:
    """A bar over the steps of all stages, on stderr; without a terminal a line now and then."""

    def __init__(self, config: RunConfig, start: int):
        self._config = config
        self._console = Console(stderr=True)
        self._bar = bars.Progress(
            bars.TextColumn("{task.fields[stage]}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("loss {task.fields[loss]:.3f}"),
            bars.TextColumn("{task.fields[speed]:,.0f} tok/s"),
            bars.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=config.total_steps, completed=start, stage="", loss=float("nan"), speed=0.0
        )
        self._loss: float | None = None
        self._tokens = 0
        self._since = time.perf_counter()
        self._line_due = 0.0
        self._begun = self._since

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def begin_stage(self, name: str) -> None:
        """Shows the stage that the next steps belong to."""
        self._bar.update(self._task, stage=name)
        self._since, self._tokens = time.perf_counter(), 0

    def advance(self, number: int, loss: float, tokens: int) -> None:
        """Counts a step."""
        self._loss = (
            loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        )
        self._tokens += tokens
        speed = self._tokens / max(time.perf_counter() - self._since, 1e-9)
        self._bar.update(self._task, completed=number, loss=self._loss, speed=speed)
        if not self._console.is_terminal and time.perf_counter() > self._line_due:
            self._line_due = time.perf_counter() + 15
            total = self._config.total_steps
            left = self._bar.tasks[0].time_remaining
            self.note(
                f"step {number}/{total}  loss {self._loss:.3f}  {speed:,.0f} tok/s"
                + (f"  {left:,.0f} s left" if left else "")
            )

    def rate(self) -> dict[str, float]:
        """Returns tokens a second since the last call, and seconds since the start."""
        now = time.perf_counter()
        speed = self._tokens / max(now - self._since, 1e-9)
        self._since, self._tokens = now, 0
        return {"tokens_per_second": speed, "seconds": now - self._begun}

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
