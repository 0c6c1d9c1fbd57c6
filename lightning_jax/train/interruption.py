"""What ends the steps before the plan does: a signal, or data that does not come.

With several processes all leave after the same step: a batch is taken, or evaluated, only when none
has a reason to stop (`runtime.processes`).
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator

from lightning_jax.config.errors import UserError
from lightning_jax.data.batch import Batch
from lightning_jax.data.worker import WorkerIterator
from lightning_jax.runtime import processes
from lightning_jax.train.signals import StopRequest

logger = logging.getLogger(__name__)

# A file system in a network may need minutes. The log says so after the first time, after twice as
# long and so on; after the second time the run ends.
_WARNING_SECONDS, _LIMIT_SECONDS = 60.0, 1800.0
_POLL_SECONDS = 0.5
# Before an error in the words that processes exchange; a signal is its name.
_FAILED = "failed: "


class Stopped(SystemExit):
    """The run was stopped by a signal, and its state is saved. Exit status 128 + signal."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.signal = number


class Interrupted(Exception):
    """No further step is taken, in any process; `cause` is a `Stopped`, or an error."""

    def __init__(self, cause: Stopped | Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Watch:
    """Hears of all that ends the steps, here and in the other processes."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._called = ""
        self._has_taken = False

    def next_batch(self, batches: WorkerIterator) -> Batch:
        """Returns the next batch. It is taken only if all processes have one and go on.

        Raises:
          Interrupted: a signal, or an end of the data worker; the position is where it was.
        """
        # What follows the first batch may be a compilation, and no step yet.
        self._stop.has_work, self._has_taken = self._has_taken, True
        failure: Exception | None
        try:
            self._wait_for(batches)
            failure = batches.error
        except UserError as error:
            failure = error
        self.agree(failure)
        return next(batches)

    def _wait_for(self, batches: WorkerIterator) -> None:
        begun, warning = time.monotonic(), _WARNING_SECONDS
        while not self._heard and not batches.ready(_POLL_SECONDS):
            self._called = processes.called()
            waited = time.monotonic() - begun
            if waited > _LIMIT_SECONDS:
                place = batches.where()
                raise UserError(f"no batch for {waited:.0f} s: the data worker hangs in {place}")
            if waited > warning:
                warning *= 2
                logger.warning("no batch for %.0f s, still waiting (%s)", waited, batches.where())

    @property
    def _heard(self) -> str:
        """The name of a signal to this process, or of one that another called out in a wait."""
        return self._stop.signal.name if self._stop.signal else self._called

    def look(self) -> None:
        """Raises `Interrupted` if this process has a signal; costs nothing else."""
        if self._stop.signal:
            self.agree()

    def agree(self, failure: Exception | None = None) -> None:
        """Goes on in all processes, or raises `Interrupted` in all of them.

        Args:
          failure: why this process cannot go on.
        """
        word = self._heard if failure is None else f"{_FAILED}{failure}"
        words = processes.exchange(word, while_waiting=self._call_out)
        if failure is not None:
            raise Interrupted(failure)
        for process, said in enumerate(words):
            if said.startswith(_FAILED):
                message = f"process {process}: {said.removeprefix(_FAILED)}"
                raise Interrupted(UserError(message))
        for said in filter(None, words):
            raise Interrupted(Stopped(signal.Signals[said]))

    def _call_out(self) -> None:
        if self._stop.signal:
            processes.call_out(self._stop.signal.name)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block whose errors interrupt all processes."""
        try:
            yield
        except (Interrupted, processes.Left):
            raise
        except Exception as error:
            self.agree(error)
