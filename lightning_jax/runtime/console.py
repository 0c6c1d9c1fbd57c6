"""The console script `lightning-jax`, also `python -m experiments`: lists programs, runs one.

A program runs as `__main__`, as `python -m experiments.PROGRAM` would run it.
"""

from __future__ import annotations

import runpy
import sys

from lightning_jax.config.errors import UserError, suggest
from lightning_jax.runtime import invocation, program, shipped

_HELP = ("-h", "-help", "--help", "help")
# Their code is in a checkout alone.
_OF_A_CHECKOUT = {"benchmark": "benchmarks"}


def main() -> None:
    """Does what the command line says; exits with the program's status, 2 if it is unknown."""
    name, *arguments = sys.argv[1:] or ["--help"]
    try:
        if name in _HELP:
            program.emit_text(_overview())
        elif name == "--version":
            program.emit_text(f"lightning_jax {shipped.version()}")
        else:
            _run(name, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(name: str, arguments: list[str]) -> None:
    if name in _OF_A_CHECKOUT and not (shipped.root() / _OF_A_CHECKOUT[name]).is_dir():
        raise UserError(
            f"{name} needs a checkout of the project, whose folder {_OF_A_CHECKOUT[name]}/ it runs"
        )
    known = shipped.programs()
    if name not in known:
        raise UserError(f"program {name!r}: must be {suggest(name, known)}")
    shipped.expose()
    sys.argv[1:] = arguments
    runpy.run_module(f"{shipped.PROGRAMS}.{name}", run_name="__main__", alter_sys=True)


def _overview() -> str:
    call = invocation.command("PROGRAM")
    programs = shipped.programs()
    width = max(map(len, programs))
    return "\n".join(
        [
            f"{call} --flag=value ...    ({call} --help lists its flags)",
            "",
            *(f"  {name:<{width}}  {text}" for name, text in programs.items()),
            "",
            f"--config takes a file, or one of {', '.join(shipped.names(shipped.CONFIGS))};",
            f"--sweep takes a file, or one of {', '.join(shipped.names(shipped.SWEEPS))}.",
        ]
    )
