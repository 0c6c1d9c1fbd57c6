"""A thread that makes batches ahead, and whose end, of whatever kind, its reader hears of.

Grain's own prefetching thread ends without a word at anything that is no `Exception` (a panic of a
library in Rust is none), and its reader then waits for ever, deaf to signals.
"""

from __future__ import annotations

import copy
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import grain

from lightning_jax.config.errors import UserError

# How long `close` waits for a batch that nobody wants any more; then its thread is left behind.
_CLOSE_SECONDS = 5.0
# How often `next` looks whether the thread is still there.
_POLL_SECONDS = 1.0
_PACKAGE = Path(__file__).parent.parent


class WorkerIterator(grain.DatasetIterator):
    """The batches of `parent`, made in a thread, up to `ahead` of them before they are asked for.

    The state is that after the last batch taken, whatever has been made ahead. An error of the
    thread is raised by the `next` that reaches it and by all later ones.

    Raises (`next`):
      UserError: whatever ended the thread.
    """

    def __init__(self, parent: grain.DatasetIterator, *, ahead: int) -> None:
        super().__init__(parent)
        self._ahead = ahead
        self._state = parent.get_state()
        self._worker: _Worker | None = None
        self._asked = False
        self._made: _Made | None = None

    def ready(self, seconds: float) -> bool:
        """Waits up to `seconds` until `next` would return or raise at once; returns whether so."""
        if self._closed:
            raise ValueError("a closed iterator has no batches")
        if self._worker is None:
            self._worker = _Worker(self._parent, self._ahead)
        if not self._asked:
            self._asked = True
            self._worker.permits.release()
        if self._made is None:
            self._made = self._worker.receive(seconds)
        return self._made is not None

    @property
    def error(self) -> UserError | StopIteration | None:
        """What `next` would raise, after `ready`."""
        return self._made.error if self._made else None

    def __next__(self) -> Any:
        while not self.ready(_POLL_SECONDS) or self._made is None:
            pass
        if self._made.error is not None:
            raise self._made.error
        made, self._made, self._asked = self._made, None, False
        self._state = made.state
        return made.batch

    def where(self) -> str:
        """Says in which line of this package the thread is, for a wait that is long."""
        return self._worker.where() if self._worker else "not started"

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._parent.set_state(state)
        self._state = self._parent.get_state()

    def start_prefetch(self) -> None:
        if self._ahead and self._worker is None:
            self._worker = _Worker(self._parent, self._ahead)

    def close(self) -> None:
        """Ends the thread; one that hangs is left behind."""
        self._closed = True
        if self._stop():
            self._parent.close()

    def _stop(self) -> bool:
        worker, self._worker, self._asked, self._made = self._worker, None, False, None
        return worker is None or worker.stop()


class _Made(NamedTuple):
    """A batch and the state after it, or the error instead of it."""

    batch: Any = None
    state: Any = None
    error: UserError | StopIteration | None = None


class _Worker:
    """The thread: one batch for each permit."""

    def __init__(self, parent: grain.DatasetIterator, ahead: int) -> None:
        self.permits = threading.Semaphore(ahead)
        self._parent = parent
        self._results: queue.SimpleQueue[_Made] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="data worker")
        self._thread.start()

    def _work(self) -> None:
        try:
            while self.permits.acquire() and not self._stopping:
                batch = next(self._parent)
                self._results.put(_Made(batch, copy.deepcopy(self._parent.get_state())))
        except StopIteration as end:
            self._results.put(_Made(error=end))
        except BaseException as error:  # SystemExit and panics too: the reader must hear of them
            self._results.put(_Made(error=_user_error(error)))

    def receive(self, seconds: float) -> _Made | None:
        """Waits up to `seconds` for a batch or an error."""
        alive = self._thread.is_alive()
        try:
            return self._results.get(timeout=seconds if alive else 0)
        except queue.Empty:
            return None if alive else _Made(error=UserError("the data worker died without a word"))

    def where(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        return _place(traceback.extract_stack(frame)) if frame else "ended"

    def stop(self) -> bool:
        """Returns whether the thread has ended."""
        self._stopping = True
        self.permits.release()
        self._thread.join(_CLOSE_SECONDS)
        return not self._thread.is_alive()


def _user_error(error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        place = _place(traceback.extract_tb(error.__traceback__))
        text = f"{in_words(error)} ({place})"
    made = UserError(text)
    made.__cause__ = error
    return made


def in_words(error: BaseException) -> str:
    """Returns type and first line of an error that was not meant for users."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _place(frames: traceback.StackSummary) -> str:
    """Names the innermost line of this package; that of a library would tell its user nothing."""
    ours = [frame for frame in frames if _PACKAGE in Path(frame.filename).parents]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
