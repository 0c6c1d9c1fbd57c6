"""Ctrl-C ends real programs with one line, whatever they are doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import ctypes, signal, sys, time
from lightning_jax.runtime import interrupts, program
from lightning_jax.train.signals import StopRequest

interrupts.SAME_SECONDS = interrupts._PATIENCE_SECONDS = 0.4

# A shell that starts tests in the background has interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


# As when XLA compiles: in C, where no Python handler runs.
def wait_in_c(seconds):
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_timedlock(mutex, (ctypes.c_long * 2)(int(time.time() + seconds), 0))


def main():
    kind = sys.argv_kind
    print("ready", file=sys.stderr)
    if kind == "python":
        time.sleep(60)
    elif kind == "c":
        wait_in_c(60)
    elif kind == "imports":
        with program.loading():
            try:
                time.sleep(60)
            except BaseException:
                raise ImportError("initialization failed") from None
    elif kind == "before the first step":
        with StopRequest():
            wait_in_c(60)
    elif kind == "orderly":
        with StopRequest() as stop:
            stop.has_work = True
            wait_in_c(2)
        sys.exit(128 + stop.signal)


sys.argv_kind = sys.argv.pop()
program.run(main, huge_pages=False)
"""


def start(tmp_path, kind):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, script, kind],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline() == "ready\n"
    time.sleep(0.1)
    return process


def end(process, begun, seconds):
    said = process.stderr.read()
    status = process.wait(timeout=60)
    assert time.monotonic() - begun < seconds
    return status, said.splitlines()


@pytest.mark.parametrize("kind", ["python", "c", "imports", "before the first step"])
def test_one_interrupt_ends_a_program_with_one_line(tmp_path, kind):
    process, begun = start(tmp_path, kind), time.monotonic()
    process.send_signal(signal.SIGINT)
    assert end(process, begun, 15) == (130, ["error: interrupted"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_order_ends_what_saves_its_state(tmp_path, number):
    process, begun = start(tmp_path, "orderly"), time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("stopping: the step at hand is saved first")
    process.send_signal(number)
    assert end(process, begun, 5) == (128 + number, [f"{number.name} again: ended at once"])


def test_what_saves_its_state_gets_the_time_that_it_needs(tmp_path):
    process, begun = start(tmp_path, "orderly"), time.monotonic()
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    status, [said] = end(process, begun, 30)
    assert status == 130 and said.startswith("stopping: ") and time.monotonic() > begun + 0.9


def test_before_a_program_runs_it_ends_without_a_word():
    code = (
        "import signal, sys; signal.signal(2, signal.default_int_handler); sys.argv[0] = '-m'; "
        "import experiments; signal.raise_signal(2)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
