"""The folder of a run: one process has it at a time, and what it holds of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_jax.checkpoint import all_steps, checkpoints_dir, read_meta
from lightning_jax.config import CheckpointMeta, RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, require, to_dict
from lightning_jax.runtime import lock, processes
from lightning_jax.runtime.files import read_json
from lightning_jax.train.record import Record

CONFIG, METRICS, EVALUATION, LOCK = "config.json", "metrics.jsonl", "evaluation.json", "lock"
# Items of checkpoint 0: imported weights, before the first step.
START_ITEMS = ("params", "router")
_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Claim:
    """A folder that no other process changes.

    Attributes:
      path: absolute path of the folder.
      writes: whether this process writes there; of several processes of one run the first does.
    """

    path: Path
    writes: bool


@contextlib.contextmanager
def claim(workdir: str | os.PathLike[str] | Claim) -> Iterator[Claim]:
    """Locks a folder for the block, and makes it where it does not exist.

    Folders that were made and are empty at the end are removed again: a command that is refused
    leaves no trace. A claim in place of a path is that claim.

    Raises:
      UserError: the folder is in use by another process, or cannot be made or written.
    """
    if isinstance(workdir, Claim):
        yield workdir
        return
    require(str(workdir) != "", "workdir", workdir, "a folder")
    claimed = Claim(checkpoints_dir(workdir).parent, writes=processes.is_writer())
    with contextlib.ExitStack() as stack:
        if claimed.writes:
            stack.enter_context(_held(claimed.path))
        yield claimed


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    what = f"workdir = {str(path)!r}"
    made: list[Path] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        try:
            _lock(path, what, made, stack)
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise UserError(f"{what}: cannot be written ({reason})") from error
        yield


def _lock(path: Path, what: str, made: list[Path], stack: contextlib.ExitStack) -> None:
    """Makes the folder and holds its lock; adds the folders that were not there to `made`."""
    for attempt in range(_ATTEMPTS):
        try:
            for folder in (*reversed(path.parents), path):
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    made += [folder] * (folder not in made)
            stack.enter_context(lock.hold(path / LOCK, what))
            return
        except FileNotFoundError:
            # Perhaps another command was refused, and has removed the folder that it had made.
            if attempt == _ATTEMPTS - 1:
                raise


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # Not empty.
        for folder in reversed(folders):
            folder.rmdir()


@dataclasses.dataclass(frozen=True)
class Past:
    """What a folder holds of a run.

    Attributes:
      saved: description of the newest checkpoint; None without one.
      config: of that checkpoint, as a nested dict; without one, of the run whose steps are logged
        there; None if nothing has begun in the folder, which then takes any run.
      record: its `run.json`.
    """

    saved: CheckpointMeta | None
    config: dict[str, Any] | None
    record: Record

    @property
    def steps(self) -> int:
        """Optimizer steps that the run goes on from."""
        return self.saved.step if self.saved else 0

    @property
    def has_trained(self) -> bool:
        """Whether steps were taken here, saved or not: on some text, with some config."""
        return self.config is not None and (self.saved is None or self.saved.step > 0)

    @classmethod
    def read(cls, path: Path) -> Past:
        """Reads a folder, and writes nothing.

        Raises:
          UserError: a damaged file, or files of something else than a run.
        """
        config = _read_config(path)
        saved = read_meta(path, whole=True) if all_steps(checkpoints_dir(path)) else None
        record = Record.read(path)
        if saved is not None:
            return cls(saved, to_dict(saved.config), record)
        log = path / METRICS
        if not log.exists() or not log.stat().st_size:
            return cls(None, None, record)
        if config is None:
            raise UserError(
                f"{log}: belongs to no checkpoint and no {CONFIG}; use another --workdir, or move "
                "the file away"
            )
        try:
            return cls(None, to_dict(build(RunConfig, config)), record)
        except UserError as error:
            raise UserError(f"{path / CONFIG}: {error}") from error


def _read_config(path: Path) -> dict[str, Any] | None:
    file = path / CONFIG
    advice = "use another --workdir, or move the file away"
    try:
        values = read_json(file, missing_ok=True)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from error
    if not values and not file.exists():
        return None
    if "stages" not in values:
        raise UserError(f"{file}: is not the config of a run; {advice}")
    return values
