"""Starts trainings in processes of their own, alone or several of one run."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from lightning_jax.train.metrics import read_rows

SCRIPT = Path(__file__).with_name("one_of_several.py")
SECONDS = 150
# Compiles in seconds.
QUICK = ("model__unit='G'", "model__moe__num_experts=0")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(corpus, workdir, *changes, count=2, devices=1, faults=("",) * 4):
    """Starts `count` processes that train `tiny_run(corpus, **changes)`; faults are by process."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        # As `compiler.cache_in` says: a program on several devices is not to come from a file.
        "JAX_ENABLE_COMPILATION_CACHE": str(count * devices == 1).lower(),
    }
    port, changes = str(free_port()), (*QUICK, *changes)
    return [
        subprocess.Popen(
            [
                sys.executable,
                SCRIPT,
                corpus,
                workdir,
                port,
                str(count),
                str(index),
                fault,
                *changes,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, fault in enumerate(faults[:count])
    ]


def end(started):
    """Returns exit statuses and what was written to stderr."""
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors


def error_lines(errors):
    assert not any("Traceback" in error for error in errors), errors
    return [[line for line in e.splitlines() if line.startswith("error:")] for e in errors]


def wait_for_step(workdir, step):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        rows = read_rows(workdir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(f"step {step} was not reached")
