"""Turns the signals that end a run into a question that the loop asks between steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from lightning_jax.runtime import interrupts, processes

# A closed terminal, a scheduler's warning before its SIGTERM, the limit of CPU time.
_WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# `nohup` and a shell's `&` say through these that a program is to outlive them.
_KEPT_IGNORED = (signal.SIGHUP, signal.SIGINT)
NOTICE = "stopping: the step at hand is saved first; Ctrl-C again ends at once, without saving"


class StopRequest:
    """While entered, the first signal is remembered; a second order ends the process at once.

    Orders are SIGTERM and SIGINT; one that follows an order within a second is the same order. In a
    program the second one is heard by `runtime.interrupts`, whatever the main thread is doing;
    elsewhere, in a notebook, it acts as usual.

    Warnings are SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU: they ask for the same, and are never a second
    order. SIGHUP and SIGINT stay ignored where they are. In another thread than the main one, where
    Python allows no handlers, nothing is changed.

    Attributes:
      signal: the first one; None before.
      has_work: whether steps were taken that are not saved, perhaps. Before, an order that is not
        followed within seconds ends a program at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.has_work = False
        self._ordered: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._orderly = interrupts.orderly(self._notice)

    def __enter__(self) -> StopRequest:
        self._orderly.__enter__()
        if threading.current_thread() is threading.main_thread():
            for number in (*interrupts.ORDERS, *_WARNINGS):
                before = signal.getsignal(number)
                if not (before is signal.SIG_IGN and number in _KEPT_IGNORED):
                    # None is a handler that Python did not set and cannot set again.
                    self._previous[number] = before or signal.SIG_DFL
                    signal.signal(number, self._remember)
        return self

    def _notice(self) -> str | None:
        # Of several processes, the others would wait for this one.
        return NOTICE if self.has_work or processes.count() > 1 else None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
        if number not in interrupts.ORDERS or interrupts.is_listening():
            return
        now = time.monotonic()
        if self._ordered is None:
            self._ordered = now
        elif now > self._ordered + interrupts.SAME_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        if isinstance(error, SystemExit):
            interrupts.has_said()
        self._orderly.__exit__(kind, error, trace)
