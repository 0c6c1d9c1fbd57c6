"""A profiler trace of a few steps, past compilation."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

from lightning_jax.runtime import invocation
from lightning_jax.runtime.phases import phase

logger = logging.getLogger(__name__)

_FIRST, _END = 5, 8


class Trace:
    """Records steps 5 to 7 of a session in `folder`, for TensorBoard; nothing without a folder."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._steps = 0
        self._recording = False

    def __enter__(self) -> Trace:
        return self

    def before_step(self) -> None:
        """Counts a step that is about to begin."""
        self._steps += 1
        if self._folder is not None and self._steps == _FIRST:
            jax.profiler.start_trace(str(self._folder))
            self._recording = True
        if self._steps == _END:
            self._stop()

    def _stop(self) -> None:
        if self._recording:
            self._recording = False
            with phase("writing the trace"):
                jax.profiler.stop_trace()
            watch = invocation.tool("tensorboard", f"--logdir={self._folder}")
            logger.warning("trace of some steps: %s", watch)

    def __exit__(self, *_: object) -> None:
        self._stop()
