"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from lightning_jax.config.errors import UserError
from lightning_jax.runtime.files import StrPath, disk_errors, is_another, sync_folder

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def new_folder(path: StrPath, field: str) -> Iterator[Path]:
    """Makes the folder `path`; yields where to write its files until the block ends.

    They are written beside `path`. When the block ends they are on disk and take its name; if it
    raises, nothing is left. What a killed process left is removed by the next try.

    Args:
      path: it must not exist, or be an empty folder.
      field: what errors call it.

    Raises:
      UserError: it is something else, or the disk refuses.
    """
    final = Path(os.path.realpath(path))
    temporary = final.parent / f".{final.name}.{os.getpid()}@{socket.gethostname()}.partial"
    task = f"{field} = {str(path)!r}: cannot be written"
    with disk_errors(task):
        if final.exists() and any(final.iterdir()):
            raise UserError(f"{field} = {str(path)!r}: is not empty; give a new folder")
        missing = [folder for folder in final.parents if not folder.exists()]
    try:
        with disk_errors(task):
            final.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(final)
            temporary.mkdir()
        yield temporary
        with disk_errors(task):
            _sync(temporary)
            os.rename(temporary, final)
            sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # in use by another process by now
                folder.rmdir()
        raise


def _remove_leftovers(final: Path) -> None:
    """Removes what processes of this machine that are gone left of earlier tries."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(\d+)@(.+)\.partial")
    for found in filter(None, (pattern.fullmatch(path.name) for path in final.parent.iterdir())):
        pid, host = found.groups()
        left = final.parent / found[0]
        if host == socket.gethostname() and not is_another(int(pid)):
            shutil.rmtree(left)
        else:
            logger.warning("%s: process %s on %s writes it, or was killed", left, pid, host)


def _sync(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            number = os.open(Path(root, name), os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)
        sync_folder(root)
