"""The folder of a run: what it was asked for, with what, and whether it may be resumed."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_jax.checkpoint import write_json
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import first_change, to_dict

# What a resumed run may change: how often it reports, where it runs. All else would make another
# run of it; `stages` may change where they have not begun (see `_stage_change`).
_FREE = {
    "log_every",
    "histogram_every",
    "eval_every",
    "eval_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_prompt",
    "sample_tokens",
    "mesh",
    "stages",
}
# Items of checkpoint 0: weights from elsewhere, before the first step.
START_ITEMS = ("params", "router")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def prepare(workdir: str | os.PathLike[str]) -> Path:
    """Creates the folder and makes sure that it can be written.

    Raises:
      UserError: it cannot be made or written.
    """
    path = Path(workdir).absolute()
    probe = path / ".write_test"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(f"workdir = {str(path)!r}: cannot be written ({reason})") from error
    return path


def record(workdir: Path, config: RunConfig, extra: dict[str, Any]) -> None:
    """Writes `config.json` and `run.json` (versions, commit, command, and `extra`)."""
    write_json(workdir / "config.json", to_dict(config))
    about = {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        **extra,
    }
    write_json(workdir / "run.json", about)


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def check_resumable(
    workdir: Path, config: RunConfig, *, stage_index: int, only_weights: bool = False
) -> None:
    """Raises UserError naming the first field in which `config` is another run than the folder's.

    Stages after `stage_index` (the one that the run would resume in) may change freely; all but
    model and tokenizer may where the folder has `only_weights` that no step has changed.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), to_dict(config)
    if only_weights:
        stage_index = -1
        before, now = (
            {"model": run["model"], "data": {"tokenizer": run["data"]["tokenizer"]}, "stages": {}}
            for run in (before, now)
        )
    changed = first_change(
        {key: value for key, value in before.items() if key not in _FREE},
        {key: value for key, value in now.items() if key not in _FREE},
    ) or _stage_change(before["stages"], now["stages"], stage_index)
    if changed:
        field, old, new = changed
        raise UserError(
            f"{field} = {new!r}: this workdir's run has {old!r}; use another --workdir "
            "or the run's own value"
        )


def _stage_change(
    old: dict[str, Any], new: dict[str, Any], stage_index: int
) -> tuple[str, Any, Any] | None:
    for (old_name, old_stage), (new_name, new_stage) in list(
        zip(old.items(), new.items(), strict=False)
    )[: stage_index + 1]:
        if old_name != new_name:
            return "stages", old_name, new_name
        found = first_change(old_stage, new_stage, f"stages.{old_name}")
        if found:
            return found
    return None
