"""Why a run of a sweep failed: its `failure.txt`, also of one that took its process with it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_jax.ablation.results import FAILURE, Run, is_finished
from lightning_jax.config.errors import UserError
from lightning_jax.runtime.files import write_file
from lightning_jax.runtime.program import user_message

logger = logging.getLogger(__name__)

# Names the run that is being trained: where it is left behind, the process was killed.
_RUNNING = "running.txt"
_LONGEST = 300


def reason(error: BaseException) -> str:
    """One line: what a user can mend in plain words, anything else after its type."""
    known = user_message(error)
    words = " ".join(str(error).split())[:_LONGEST]
    return known or f"{type(error).__name__}: {words or 'no reason given'}"


def keep(folder: Path, text: str) -> None:
    """Writes `failure.txt` of a run, if that is possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / FAILURE, text)
    except (OSError, UserError) as error:
        logger.warning("%s: is not kept: %s", folder / FAILURE, error)


@contextlib.contextmanager
def marked(root: Path, run: Run) -> Iterator[None]:
    """While the block runs, the sweep's folder names the run that is being trained."""
    write_file(root / _RUNNING, str(run))
    try:
        yield
    finally:
        (root / _RUNNING).unlink(missing_ok=True)


def note_killed(runs: Sequence[Run], root: Path) -> None:
    """Records as failed the run during which the process of an earlier sweep was killed."""
    with contextlib.suppress(OSError):
        name = (root / _RUNNING).read_text(encoding="utf-8", errors="replace")
        (root / _RUNNING).unlink()
        for run in runs:
            if str(run) == name and not is_finished(run.folder(root)):
                keep(run.folder(root), "its process was killed: out of memory?\n")
