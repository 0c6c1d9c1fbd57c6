"""Runs many command lines of the programs in `experiments/` for the price of one start of Python.

One process imports what they need and forks a child for each command line. The children import the
program's own module, so that its flags are defined afresh, and write to real descriptors.

A command line is `[program, flag, ...]`, after settings such as `XLA_FLAGS=...` of its environment.
A program with a dot in its name is a module; `-c` and a text run Python.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Imported once: what takes long, and starts no threads.
_HEAVY = (
    "benchmarks.report",
    "lightning_jax.ablation.report",
    "lightning_jax.infer.text",
    "lightning_jax.interop.convert",
    "lightning_jax.interop.upcycle_run",
    "lightning_jax.train.loop",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command line did."""

    status: int
    stdout: str
    stderr: str


def call_all(
    command_lines: Sequence[Sequence[str]],
    *,
    timeout: float = 300,
    seconds: int = 20,
    environment: Mapping[str, str] = types.MappingProxyType({}),
) -> list[Result]:
    """Runs command lines in turn, in the folder of the checkout.

    One that takes longer than `seconds` is ended by SIGALRM: status -14.
    """
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([seconds, *map(list, command_lines)]),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=True,
    )
    return [Result(**found) for found in json.loads(done.stdout)]


def _main() -> None:
    seconds, *lines = json.load(sys.stdin)
    for module in _HEAVY:
        __import__(module)
    json.dump([_forked(seconds, *line) for line in lines], sys.stdout)


def _forked(seconds: int, *words: str) -> dict[str, object]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            signal.alarm(seconds)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_run(words))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return {"status": status, "stdout": texts[0], "stderr": texts[1]}


def _run(words: Sequence[str]) -> int:
    while re.match("[A-Z_]+=", words[0]):
        name, _, os.environ[name] = words[0].partition("=")
        words = words[1:]
    program, *flags = sys.argv = list(words)
    try:
        if program == "-c":
            exec(compile(flags[0], "<text>", "exec"), {"__name__": "__main__"})
        else:
            module = program if "." in program else f"experiments.{program}"
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    _main()
