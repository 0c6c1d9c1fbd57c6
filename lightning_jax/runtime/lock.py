"""A lock on a folder, so that one process at a time changes it.

The kernel holds the lock (`flock` on a file), so it ends with its process, however that dies: what
a killed process leaves is an empty claim, which the next one takes over. Whoever only reads the
folder asks for no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lightning_jax.config.errors import UserError
from lightning_jax.runtime.files import parse_json

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# A process writes who it is right after it has the lock.
_WRITING_SECONDS = 0.1
_LONGEST_COMMAND, _LONGEST_NOTE = 200, 4096


class InUse(UserError):
    """Another process, or another block of this one, holds the lock."""


@contextlib.contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file `path` inside the block, and removes it afterwards.

    The file names its holder. On a disk without locks the block runs after a warning.

    Raises:
      InUse: `what` is in use by another process (or by another block of this one).
      OSError: the file cannot be written.
    """
    descriptor = _acquire(path, what)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _note(), 0)
        yield
    finally:
        # Removed while it is held: whoever opened it before finds that it is no longer the file.
        with contextlib.suppress(OSError):
            if _is_file(descriptor, path):
                path.unlink()
        os.close(descriptor)


def _acquire(path: Path, what: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            time.sleep(_WRITING_SECONDS)
            holder = _holder(descriptor)
            os.close(descriptor)
            raise InUse(f"{what}: in use by {holder}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            logger.warning(
                "%s: its disk has no locks (%s); start no second process there",
                what,
                error.strerror,
            )
            return descriptor
        if _is_file(descriptor, path):
            return descriptor
        os.close(descriptor)  # Its last holder has just removed it.


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _note() -> bytes:
    command = repr(shlex.join(sys.argv))[1:-1][:_LONGEST_COMMAND]
    note = {"pid": os.getpid(), "host": socket.gethostname(), "command": command}
    return (json.dumps(note) + "\n").encode()


def _holder(descriptor: int) -> str:
    """Returns `process N on HOST (command)`, from whatever the lock file holds."""
    try:
        note = parse_json(os.pread(descriptor, _LONGEST_NOTE, 0), "lock")
        return f"process {note['pid']} on {note['host']} ({note['command']})"
    except (UserError, OSError, KeyError, TypeError):
        return "another process"
