"""The standard streams of a process: answers, which must arrive, and other output, which need not.

Whatever goes to standard error is best effort. Its reader may go away (`2>&1 | head`), its terminal
may close, its disk may be full: work goes on, and `lost()` says what happened. Lines, logs and bars
share one console, so that a line is printed above a bar and not into it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_STDIN, _STDOUT, _STDERR = range(3)
# Errors after which a stream never works again; others, such as a full disk, may pass.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET)
_lost: str | None = None
_answers: int | None = None
_silent = False
_last_line = 0.0
# Ends the line of a bar, and shows the cursor that it hides.
_AFTER_A_BAR = "\x1b[?25h\r\n"


def lost() -> str | None:
    """Returns why output to standard error was lost, the first time; None if none was."""
    return _lost


def guard() -> None:
    """Makes output to standard error best effort, however it is written, from here on.

    Does nothing where `sys.stderr` is not the stream of the process (a notebook, a test), or the
    second time.
    """
    global _lost
    if sys.stderr is not sys.__stderr__ or _is_guarded():
        return
    _open_closed()
    if sys.stderr is None:
        _lost = "standard error: closed"
    if hasattr(signal, "SIGPIPE") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(
        io.BufferedWriter(_BestEffort(_STDERR, "wb", closefd=False)),
        encoding=getattr(sys.stderr, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=True,
    )


@functools.cache
def console() -> Console:
    """The console of this process on standard error."""
    from rich.console import Console

    guard()
    return Console(stderr=True)


def silence() -> None:
    """Makes `say` do nothing in this process: of several, one speaks for all."""
    global _silent
    _silent = True


def is_silent() -> bool:
    """Whether `silence` was called."""
    return _silent


def say(text: str) -> None:
    """Prints lines to standard error, as they are: not wrapped, and without markup."""
    if not _silent:
        _print(text)


def seconds_since_a_line() -> float:
    """Seconds since a line was said or logged."""
    return time.monotonic() - _last_line


def last_words(text: str) -> None:
    """Writes a line to standard error past all buffers and locks, before a process is ended."""
    with contextlib.suppress(OSError):
        before = _AFTER_A_BAR if os.isatty(_STDERR) else ""
        os.write(_STDERR, f"{before}{text}\n".encode("utf-8", "backslashreplace"))


class LogHandler(logging.Handler):
    """Prints the records of a log as `say` does, those of a silent process too."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        try:
            _print(self.format(record))
        except Exception:
            self.handleError(record)


def _print(text: str) -> None:
    global _last_line
    _last_line = time.monotonic()
    console().print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def reserve_stdout() -> None:
    """Keeps the real standard output for `write_answer`; all other writers reach standard error."""
    global _answers
    guard()
    if sys.stdout is not None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    _answers = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    sys.stdout = sys.__stdout__ = sys.stderr


def write_answer(text: str) -> None:
    """Writes to standard output at once.

    Raises:
      OSError: standard output is closed or full.
    """
    if _answers is None:
        print(text, end="", flush=True)
        return
    data = memoryview(text.encode("utf-8", "backslashreplace"))
    while data:
        data = data[os.write(_answers, data) :]


class _BestEffort(io.FileIO):
    """Standard error, whose writes do not fail."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            written = _lose(error)
        # A reader too slow for a stream that does not wait (None) loses this text.
        return memoryview(data).nbytes if written is None else written


def _is_guarded() -> bool:
    return isinstance(getattr(getattr(sys.stderr, "buffer", None), "raw", None), _BestEffort)


def _lose(error: OSError) -> None:
    global _lost
    _lost = _lost or f"standard error: {error.strerror}"
    if error.errno not in _GONE:
        return
    # For child processes and for libraries that write to the descriptors themselves.
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (_STDERR,) if _answers is None else (_STDERR, _STDOUT):
            os.dup2(nothing, stream)
        os.close(nothing)


def _open_closed() -> None:
    """Opens the null device on closed standard streams, where the next file would be opened.

    For reading alone, so that an answer written to a closed standard output remains an error.
    """
    for stream in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(stream)
        except OSError:
            mode = os.O_WRONLY if stream == _STDERR else os.O_RDONLY
            os.set_inheritable(os.open(os.devnull, mode), True)
