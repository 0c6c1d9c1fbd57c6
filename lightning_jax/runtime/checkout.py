"""The checkout of this project, where there is one: which commit of it runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_GIT_SECONDS = 10


def git_commit(root: Path = ROOT) -> tuple[str | None, str | None]:
    """Returns the commit of a checkout (`-dirty` if changed); or None and why it is not known."""
    if not (root / ".git").exists():
        return None, f"{root} is not a git checkout"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    # A hook of another repository would have told git where that one is.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_SECONDS,
            env={**environment, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        return None, "git is not installed"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"git failed: {error}"
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"git failed ({result.returncode})"]
        return None, lines[0]
    return result.stdout.strip(), None
