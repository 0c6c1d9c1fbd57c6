"""Ctrl-C ends a program soon and cleanly, whatever its main thread is doing.

Python runs handlers of signals in the main thread, between two steps of the interpreter: not while
XLA compiles for a minute, nor while a library waits. So a thread of the program hears of signals as
well (`signal.set_wakeup_fd`). What a program leaves half written when it is ended is what any kill
leaves, and nothing that a reader would take for whole.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from lightning_jax.runtime import output

# Asked for by a person or a scheduler.
ORDERS = (signal.SIGTERM, signal.SIGINT)
# Schedulers send a signal to a process and to its group: within so long, both are one order.
SAME_SECONDS = 1.0
# After so much longer, a program that saves no state is ended.
_PATIENCE_SECONDS = 2.0

_listening = False
_notice: Callable[[], str | None] = lambda: None  # noqa: E731
_has_said = threading.Event()


def leave_quietly() -> None:
    """Lets Ctrl-C end this process without a word, before `listen` is called."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def listen() -> None:
    """Hears orders to stop in a thread of its own, for the rest of this program.

    The first one does what it does in Python. If the program still runs three seconds later, or
    with a second order, the thread ends it; a program that is `orderly`, and has something to say
    then, is ended by a second order alone.
    """
    global _listening
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    heard, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(heard,), daemon=True, name="interrupts").start()
    _listening = True


def is_listening() -> bool:
    """Whether second orders end this process."""
    return _listening


@contextlib.contextmanager
def orderly(notice: Callable[[], str | None]) -> Iterator[None]:
    """A block that ends by itself after an order.

    Args:
      notice: called after an order. Returns what is said if that takes more than a second; None
        where nothing would be lost by ending the program.
    """
    global _notice
    before, _notice = _notice, notice
    try:
        yield
    finally:
        _notice = before


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """A block that an interrupt ends without unwinding it.

    For imports: extensions in C print the interrupt and turn it into errors of their own.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, _frame: FrameType | None = None) -> NoReturn:
    say_interrupted()
    os._exit(128 + number)


def has_said() -> None:
    """Tells that the program has said by itself that it was interrupted."""
    _has_said.set()


def say_interrupted() -> None:
    """Says, once, that the program was interrupted."""
    if not _has_said.is_set():
        _has_said.set()
        output.last_words("error: interrupted")


def _hear(heard: int) -> None:
    first = _wait_for_order(heard) or signal.SIGINT
    notice = _notice()
    time.sleep(SAME_SECONDS)
    while select.select([heard], [], [], 0)[0]:
        os.read(heard, 64)
    if notice is not None:
        output.say(notice)
    again = _wait_for_order(heard, None if notice else _PATIENCE_SECONDS)
    if again is None:
        _end(first)
    output.last_words(f"{signal.Signals(again).name} again: ended at once")
    os._exit(128 + again)


def _wait_for_order(heard: int, seconds: float | None = None) -> int | None:
    """Returns the next order; None if there is none for so long."""
    while select.select([heard], [], [], seconds)[0]:
        if orders := [number for number in os.read(heard, 64) if number in ORDERS]:
            return orders[0]
    return None
