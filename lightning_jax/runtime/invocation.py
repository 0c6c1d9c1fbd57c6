"""How the programs of `experiments/` are called: the commands that messages tell users to run."""

from __future__ import annotations

import shlex


def command(program: str, *arguments: str) -> str:
    """Returns the shell command that runs a program with these arguments, quoted.

    Args:
      program: its name, such as "train".
      arguments: flags, such as "--workdir=runs/a".
    """
    return shlex.join(["python", "-m", f"experiments.{program}", *arguments])
