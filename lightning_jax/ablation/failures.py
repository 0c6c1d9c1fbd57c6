"""Why a run of a sweep failed: its `failure.txt`, also of one whose process was killed."""

from __future__ import annotations

import contextlib
import logging
import signal
from pathlib import Path

from lightning_jax.ablation.results import FAILURE
from lightning_jax.config.errors import UserError
from lightning_jax.runtime.files import write_file
from lightning_jax.runtime.program import user_message

logger = logging.getLogger(__name__)

_LONGEST = 300
# Signals that ask a run to stop, see `train.signals`.
_ORDERS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


def reason(error: BaseException) -> str:
    """One line: what a user can mend in plain words, anything else after its type."""
    known = user_message(error)
    words = " ".join(str(error).split())[:_LONGEST]
    return known or f"{type(error).__name__}: {words or 'no reason given'}"


def of_status(status: int) -> str:
    """One line: why a process ended that left nothing but a status, negative for a signal."""
    if status == -signal.SIGKILL:
        return "its process was killed: out of memory?"
    if is_order(status):
        return f"stopped by {_name(status)}; the same command resumes it"
    if status < 0:
        return f"its process was ended by {_name(status)}"
    return f"its process ended with status {status}"


def is_order(status: int) -> bool:
    """Whether a process with this status was asked to stop, and has perhaps saved its state."""
    return _number(status) in _ORDERS


def _number(status: int) -> int:
    return -status if status < 0 else status - 128


def _name(status: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(_number(status)).name
    return f"signal {_number(status)}"


def keep(folder: Path, text: str) -> None:
    """Writes `failure.txt` of a run, if that is possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / FAILURE, text)
    except (OSError, UserError) as error:
        logger.warning("%s: is not kept: %s", folder / FAILURE, error)


def forget(folder: Path) -> None:
    """Removes the `failure.txt` of a run that has finished, if that is possible."""
    with contextlib.suppress(OSError):
        (folder / FAILURE).unlink(missing_ok=True)
