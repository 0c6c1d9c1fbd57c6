"""The folder of a run: its config, what it runs on, and whether it may be resumed."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_jax.checkpoint import all_steps, checkpoints_dir, read_meta
from lightning_jax.config import CheckpointMeta, RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import first_change, to_dict
from lightning_jax.runtime.files import read_json, write_json

# Fields that a resumed run may change: how often it reports, and on which devices it runs. Any
# other field would make it another run; `stages` may change until they begin (`check_resumable`).
_FREE = {
    "log_every",
    "histogram_every",
    "eval_every",
    "eval_tokens",
    "final_eval_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_prompt",
    "sample_tokens",
    "mesh",
    "stages",
}
# Items of checkpoint 0: imported weights, before the first step.
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


def newest_checkpoint(workdir: Path) -> CheckpointMeta | None:
    """Returns the description of the folder's newest checkpoint; None without one."""
    return read_meta(workdir) if all_steps(checkpoints_dir(workdir)) else None


def check_resumable(workdir: Path, config: RunConfig, saved: CheckpointMeta | None) -> None:
    """Raises UserError naming the first field in which `config` is another run than the folder's.

    Args:
      workdir: folder of the run; without `config.json` it takes any config.
      config: the run to resume or start there.
      saved: description of the newest checkpoint; None without one. Stages after that of the
        checkpoint have not begun and may change freely. Before the first step (checkpoint 0 of
        imported weights) everything but model and tokenizer may change.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    before, now = read_json(path), to_dict(config)
    if saved and saved.step == 0:
        changed = first_change(*(_read_by_weights(run) for run in (before, now)))
    else:
        last = saved.stage if saved else next(iter(before["stages"]))
        changed = first_change(*(_fixed(run) for run in (before, now)))
        changed = changed or _stage_change(before["stages"], now["stages"], last)
    if changed:
        field, old, new = changed
        raise UserError(
            f"{field} = {new!r}: this workdir's run has {old!r}; use another --workdir "
            "or the run's own value"
        )


def _read_by_weights(run: dict[str, Any]) -> dict[str, Any]:
    return {"model": run["model"], "data": {"tokenizer": run["data"]["tokenizer"]}}


def _fixed(run: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in run.items() if field not in _FREE}


def _stage_change(
    old: dict[str, Any], new: dict[str, Any], last: str
) -> tuple[str, Any, Any] | None:
    """Returns the first difference among the stages up to `last`."""
    begun = [*old][: [*old].index(last) + 1]
    if [*new][: len(begun)] != begun:
        return "stages", begun, [*new][: len(begun)]
    changes = (first_change(old[name], new[name], f"stages.{name}") for name in begun)
    return next((change for change in changes if change), None)
