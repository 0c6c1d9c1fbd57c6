"""How programs are called where the user is: the commands that messages tell her to run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_jax.runtime import shipped

SCRIPT = "lightning-jax"


def command(program: str, *arguments: str) -> str:
    """Returns the shell command that runs a program with these arguments, quoted.

    It is `python -m experiments.PROGRAM` in the folder of a checkout, `lightning-jax PROGRAM` in
    other folders and for those who have called the latter.

    Args:
      program: its name, such as "train".
      arguments: flags, such as "--workdir=runs/a".
    """
    if _by_script():
        return tool(SCRIPT, program, *arguments)
    return shlex.join([*_module(_word("python", sys.executable), program), *arguments])


def tool(name: str, *arguments: str) -> str:
    """Returns the shell command that runs a tool of this environment, such as "tensorboard"."""
    return shlex.join([_word(name, _beside_python(name)), *arguments])


def install(extra: str) -> str:
    """Returns the shell command that adds the packages of an extra of setup.py."""
    return tool("pip", "install", f"lightning_jax[{extra}]")


def typed() -> str | None:
    """Returns the command that started this process, to be given again; None in a notebook."""
    match sys.orig_argv[1:]:
        case ["-m", module, *_] if module.endswith("kernel_launcher"):
            return None
        case ["-m", module, *arguments] if module.startswith(f"{shipped.PROGRAMS}."):
            return command(module.removeprefix(f"{shipped.PROGRAMS}."), *arguments)
        case [script, *arguments] if Path(script).name == SCRIPT:
            return tool(SCRIPT, *arguments)
    return shlex.join(sys.orig_argv)


def recorded(argv: Sequence[str]) -> str:
    """Returns the shell command with the `sys.argv` of a record, without paths of its machine."""
    program = Path(*argv[:1])
    if program.parent.name != shipped.PROGRAMS:
        return shlex.join(argv)
    in_wheel = program.parent.parent.name == shipped.IN_WHEEL
    words = [SCRIPT, program.stem] if in_wheel else _module("python", program.stem)
    return shlex.join([*words, *argv[1:]])


def as_called(text: str) -> str:
    """Returns a text with its `python -m experiments.PROGRAM` as users call programs here."""
    return re.sub(r"python -m experiments\.(\w+)", rf"{SCRIPT} \1", text) if _by_script() else text


def _module(python: str, program: str) -> list[str]:
    return [python, "-m", f"{shipped.PROGRAMS}.{program}"]


def _by_script() -> bool:
    called = Path(*sys.orig_argv[1:2]).name == SCRIPT
    return called or not shipped.is_here()


def _word(name: str, path: str) -> str:
    """The name, if a shell finds that file by it; else the path: `.venv` may not be activated."""
    found = shutil.which(name)
    if not os.path.exists(path) or (found and os.path.samefile(_folder(found), _folder(path))):
        return name
    inside = os.path.relpath(path)
    return path if inside.startswith(os.pardir) else inside


def _beside_python(name: str) -> str:
    return os.path.join(_folder(sys.executable), name)


def _folder(path: str) -> str:
    return os.path.dirname(path) or os.curdir
