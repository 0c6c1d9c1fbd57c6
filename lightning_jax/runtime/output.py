"""The standard streams of a process: answers, which must arrive, and other output, which need not.

Whatever goes to standard error is best effort. Its reader may go away (`2>&1 | head`), its terminal
may close, its disk may be full: work goes on, and `lost()` says what happened.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from typing import Any

_STDIN, _STDOUT, _STDERR = range(3)
# Errors after which a stream never works again; others, such as a full disk, may pass.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET)
_lost: str | None = None
_answers: int | None = None


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
