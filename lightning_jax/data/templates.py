"""Renders chat templates in a process of their own, within limits of time, memory and size."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lightning_jax.config.errors import UserError
from lightning_jax.runtime.invocation import install

SECONDS = 10.0
CHARACTERS = 2**24


def render(source: str, values: Mapping[str, Any]) -> str:
    """Returns the text that a template makes of JSON values.

    The first call starts the process, which later calls share; it takes about a tenth of a second.

    Raises:
      UserError: a syntax error, whatever the template raises, values that are no JSON, more than
        `SECONDS` seconds or `CHARACTERS` characters, or no `jinja2`.
    """
    limits = {"seconds": SECONDS, "characters": CHARACTERS}
    try:
        request = json.dumps({"source": source, "values": dict(values), **limits})
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"chat template: messages must be JSON values ({error})") from error
    answer = _worker.ask(request)
    if "text" in answer:
        return answer["text"]
    line = f", line {answer['line']}" if "line" in answer else ""
    raise UserError(f"chat template{line}: {' '.join(answer['error'].split())[:500]}")


class _Worker:
    """One process for all templates; it is started when needed, and again after it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: str) -> dict[str, Any]:
        with self._lock:
            process = self._running()
            stdin, stdout = _pipes(process)
            try:
                stdin.write(request.encode("ascii") + b"\n")
                stdin.flush()
                line = stdout.readline()
            except BrokenPipeError:
                line = b""
            except BaseException:
                self.close()  # Its answer would be taken for that of the next request.
                raise
            if line.endswith(b"\n"):
                return json.loads(line)
            code = process.wait()
            self.close()
        if code == -signal.SIGALRM:
            return {"error": f"takes more than {SECONDS:g} seconds"}
        return {"error": f"the process that ran it ended with status {code}"}

    def _running(self) -> subprocess.Popen[bytes]:
        # A process that was forked from this one must not share its pipes.
        if self._owner != os.getpid():
            self._process = None
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process, self._owner = _start(), os.getpid()
        return self._process

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in _pipes(process):
                pipe.close()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin and process.stdout  # `_start` asks for both
    return process.stdin, process.stdout


def _start() -> subprocess.Popen[bytes]:
    if importlib.util.find_spec("jinja2") is None:
        raise UserError(
            f"package jinja2, which chat templates need, is missing: {install('interop')}"
        )
    script = Path(__file__).with_name("template_worker.py")
    return subprocess.Popen(
        # -P: the modules beside the script are no top-level ones.
        [sys.executable, "-P", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


_worker = _Worker()
atexit.register(_worker.close)
