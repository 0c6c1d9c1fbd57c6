"""Orbax, imported when it is needed and silenced: what matters it raises besides.

Where a write fails, TensorStore goes on with the others and reports their ends to the event loop
of Orbax, which is closed by then: one traceback for each, beside the error that is raised.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import sys
from pathlib import Path
from typing import Any

from lightning_jax.checkpoint import folders

_FOREIGN = re.compile(r"\borbax\b|\btensorstore\b")


@functools.cache
def orbax() -> Any:
    """Imports Orbax and silences its logs, and those of asyncio about its tasks."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
    logging.getLogger("asyncio").addFilter(lambda r: not _FOREIGN.search(r.getMessage()))
    sys.unraisablehook = functools.partial(_unless_of_closed_loop, sys.unraisablehook)
    return ocp


def _unless_of_closed_loop(hook: Any, unraisable: Any) -> None:
    """Calls `hook`, but for the errors that TensorStore's threads get from a closed loop."""
    loop_closed = isinstance(unraisable.exc_value, RuntimeError) and _raised_by_closed_loop(
        unraisable.exc_traceback
    )
    # No object and no message: raised in a call from C++, which has no frames of Python.
    if not (loop_closed and unraisable.object is None and unraisable.err_msg is None):
        hook(unraisable)


def _raised_by_closed_loop(traceback: Any) -> bool:
    """Whether the outermost frame is asyncio's own `call_soon_threadsafe`."""
    code = asyncio.BaseEventLoop.call_soon_threadsafe.__code__
    return traceback is not None and traceback.tb_frame.f_code is code


@functools.cache
def sealed_path() -> type:
    """Returns the class by which Orbax gives a checkpoint its number: sealed and synced first."""
    base = orbax().path.atomicity.AtomicRenameTemporaryPath

    class SealedPath(base):  # type: ignore[misc, valid-type]
        async def finalize(self) -> None:
            # Items get their names in the same way; only a step has metadata beside its items.
            if self._checkpoint_metadata_store is None:
                return await super().finalize()
            # They are written in another thread.
            self._checkpoint_metadata_store.wait_until_finished()
            folder = Path(self.get())
            folders.seal(folder)
            folders.publish(folder, Path(self.get_final()))

    return SealedPath
