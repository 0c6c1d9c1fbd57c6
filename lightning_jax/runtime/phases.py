"""Long work that says that it goes on, so that a program is never silent for long.

    with phase("training the tokenizer") as now:
        now.detail = "3 of 16 MB"

Work of less than a second says nothing. On a terminal, longer work is a spinner with its seconds,
or part of the bar that is there (`shown_by`); elsewhere it is a line whenever nothing else was
printed for four seconds, so that a command that is refused at once says that alone. A thread prints
them, while the work has the others. Of phases inside of phases the innermost is shown.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lightning_jax.runtime import output

if TYPE_CHECKING:
    from rich.status import Status

QUIET_SECONDS, LINE_SECONDS = 1.0, 4.0
_TICK_SECONDS = 0.25


class Phase:
    """Work that goes on.

    Attributes:
      what: the work, such as "evaluating code".
      detail: how far it is, such as "batch 3 of 8"; may change at any time.
    """

    def __init__(self, what: str) -> None:
        self.what, self.detail = what, ""
        self.is_known = False  # whether a line has named it
        self._entered = time.monotonic()
        self.restart()

    def restart(self) -> None:
        """Begins to count its seconds again."""
        self._begun = time.monotonic()

    def leave_out(self, inner: Phase) -> None:
        """Takes the time of a phase inside of this one from its seconds."""
        self._begun = min(self._begun + time.monotonic() - inner._entered, time.monotonic())

    @property
    def seconds(self) -> float:
        """Seconds since its beginning, without those of phases inside of it."""
        return time.monotonic() - self._begun

    def __str__(self) -> str:
        parts = [self.what, *filter(None, [self.detail]), f"{self.seconds:.0f} s"]
        return ", ".join(parts)


@contextlib.contextmanager
def phase(what: str) -> Iterator[Phase]:
    """A block of work that is shown while it lasts; it sets the `detail` of what it gets."""
    entered = Phase(what)
    _heart.enter(entered)
    try:
        yield entered
    finally:
        _heart.leave(entered)


def detail(text: str) -> None:
    """Sets the detail of the innermost phase; does nothing outside of phases."""
    if innermost := _heart.innermost():
        innermost.detail = text


@contextlib.contextmanager
def shown_by(show: Callable[[Phase], None]) -> Iterator[None]:
    """While this is entered, `show` shows the phases on a terminal, a few times per second."""
    _heart.show = show
    try:
        yield
    finally:
        _heart.show = None


class _Heart:
    """The thread that shows the innermost phase, and what it needs."""

    def __init__(self) -> None:
        self.show: Callable[[Phase], None] | None = None
        self._phases: list[Phase] = []
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._spinner: Status | None = None

    def innermost(self) -> Phase | None:
        return self._phases[-1] if self._phases else None

    def enter(self, entered: Phase) -> None:
        with self._changed:
            self._phases.append(entered)
            # A child of `fork` has no threads but the one that called it.
            if not (self._thread and self._thread.is_alive()) and not output.is_silent():
                self._thread = threading.Thread(target=self._beat, daemon=True, name="phases")
                self._thread.start()
            self._changed.notify()

    def leave(self, left: Phase) -> None:
        with self._changed:
            self._phases.remove(left)
            if self._spinner is not None:
                self._spinner.stop()
                self._spinner = None
            if outer := self.innermost():
                outer.leave_out(left)
                if self.show is not None:
                    self.show(outer)

    def _beat(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self.innermost)
                self.look()
            time.sleep(_TICK_SECONDS)

    def look(self) -> None:
        """Shows the innermost phase, if it is time."""
        with self._changed:
            now = self.innermost()
            if now is None or now.seconds < QUIET_SECONDS:
                return
            if not output.console().is_terminal:
                if output.seconds_since_a_line() >= LINE_SECONDS:
                    output.say(str(now) if now.is_known else f"{now.what} ...")
                    now.is_known = True
            elif self.show is not None:
                self.show(now)
            elif self._spinner is None:
                self._spinner = output.console().status(str(now))
                self._spinner.start()
            else:
                self._spinner.update(str(now))


_heart = _Heart()
