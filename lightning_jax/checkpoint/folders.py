"""The folders of checkpoints: their numbers, what seals them, and which of them are good.

`sha256.json` in a checkpoint lists the digests of all its other files. It is written last, and the
checkpoint gets its number when list and files are synced, so a number promises the whole state,
also after a loss of power. Nothing of a checkpoint is parsed before it is compared with the list.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning_jax.config import kinds
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.runtime.files import StrPath, read_json, replacing, sync_folder

META_ITEM = "meta"
_META_FILE = "metadata"  # as Orbax names the file of an item of JSON
_DIGESTS = "sha256.json"
_NUMBER = re.compile(r"0|[1-9][0-9]*")


class Damaged(UserError):
    """The files of a checkpoint are not those that were saved under its number."""


def checkpoints_dir(workdir: StrPath) -> Path:
    """Returns the absolute folder of a run's checkpoints; nothing is made."""
    require("://" not in str(workdir), "workdir", str(workdir), "a local or mounted folder")
    return Path(workdir).absolute() / "checkpoints"


def all_steps(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `directory`, ascending."""
    names = [path.name for path in directory.glob("*")]
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name))


def seal(folder: Path) -> None:
    """Writes the digest of every other file, and waits until all of the folder is on disk.

    Raises:
      OSError: the disk is full or fails.
    """
    digests = {}
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in names):
            digests[path.relative_to(folder).as_posix()] = _digest(path, sync=True)
        sync_folder(parent)
    digests.pop(_DIGESTS, None)
    with replacing(folder / _DIGESTS) as file:
        file.write(json.dumps(dict(sorted(digests.items())), indent=2).encode())


def publish(folder: Path, number: Path) -> None:
    """Gives a sealed folder its number; on disk when this returns. Raises OSError."""
    os.rename(folder, number)
    sync_folder(number.parent)


def verify(folder: Path, items: Collection[str]) -> None:
    """Compares the files of some items with their digests.

    Orbax would read flipped bits as other numbers.

    Raises:
      Damaged: the list or a file is missing, damaged, or of another checkpoint.
      UserError: an item was not saved.
      OSError: a file cannot be read.
    """
    digests = _digests(folder)
    # Orbax reads what lies beside the items with each of them.
    listed = {name for name in digests if "/" not in name}
    there = {name for name in listed if (folder / name).is_file()}
    for item in items:
        of_item = {name for name in digests if name.startswith(f"{item}/")}
        if not of_item:
            raise UserError(f"it lacks {item}")
        listed |= of_item
        paths = [path for path in (folder / item).rglob("*") if not path.is_dir()]
        there |= {path.relative_to(folder).as_posix() for path in paths}
    for name in sorted(listed - there):
        raise Damaged(f"{name} is missing")
    for name in sorted(there - listed):
        raise Damaged(f"{name} is not in its {_DIGESTS}")
    for name in sorted(listed):
        if _digest(folder / name) != digests[name]:
            raise Damaged(f"{name} is damaged")


def stored_items(folder: Path) -> set[str]:
    """Returns the names of the items that were saved. Raises Damaged without their list."""
    return {name.split("/")[0] for name in _digests(folder) if "/" in name}


def meta_values(folder: Path) -> dict[str, Any]:
    """Returns the meta of a checkpoint, compared with its digest. Raises as `verify` does."""
    verify(folder, [META_ITEM])
    return read_json(folder / META_ITEM / _META_FILE)


def check_number(folder: Path, values: dict[str, Any]) -> None:
    """Raises Damaged unless the step in a checkpoint's meta is the number of its folder."""
    kinds.check(values, {"step": kinds.integer(0)}, META_ITEM, required=["step"])
    if str(values["step"]) != folder.name:
        raise Damaged(f"by its meta it is step {values['step']}: the folder was renamed or copied")


def newest_good(directory: Path) -> int | None:
    """Returns the newest step all of whose files are those that were saved; None without one."""
    return next((s for s in reversed(all_steps(directory)) if _is_good(directory / str(s))), None)


def _is_good(folder: Path) -> bool:
    try:
        verify(folder, stored_items(folder))
        check_number(folder, meta_values(folder))
    except (UserError, OSError):
        return False
    return True


def _digests(folder: Path) -> dict[str, str]:
    try:
        digests = read_json(folder / _DIGESTS)
    except UserError as error:
        raise Damaged(str(error)) from error
    if not kinds.map_of(kinds.TEXT).accepts(digests):
        raise Damaged(f"{_DIGESTS} is damaged")
    return digests


def _digest(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
