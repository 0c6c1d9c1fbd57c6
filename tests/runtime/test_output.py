"""Standard error that goes away, with real processes: the work goes on, and says so."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_jax.runtime import output
from lightning_jax.train.metrics import MetricsWriter, read_rows

ROOT = Path(__file__).parents[2]

# Everything that writes to standard error, in turn, again and again.
PROGRAM = """
import logging, os, subprocess, sys, time, warnings
from lightning_jax.runtime import output, program, tables
from lightning_jax.train import progress


def main():
    print("begun", file=sys.stderr)
    sys.stdin and sys.stdin.readline()  # Until the other end of standard error is closed.
    with progress.Progress(total_steps=40, start=0) as shown:
        for step in range(1, 41):
            shown.advance(step, 2.0, 100.0)
            shown.note("a note")
            print("noise")
            warnings.warn(f"warning {step}")
            logging.getLogger("lightning_jax.x").warning("a log line")
            tables.print_table([("name",), ("row",)], "a table")
            if output.lost() and "space" not in output.lost():
                os.write(2, b"from a library")
            # A child process with the default action of SIGPIPE, which would end it.
            child = "import os, signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL); "
            step == 20 and subprocess.run([sys.executable, "-SEc", child + "os.write(2, b'x')"])
            time.sleep(0.005)
    program.emit_json({"step": step, "lost": output.lost()})


if __name__ == "__main__":
    program.run(main, huge_pages=False)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


def start(script, redirection="", **options):
    return subprocess.Popen(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def answer(process):
    out, _ = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    found = json.loads(out)
    assert found["step"] == 40
    return found["lost"]


# Case F1
def test_a_reader_of_standard_error_that_goes_away_stops_nothing(script):
    process = start(script, stderr=subprocess.PIPE)
    assert process.stderr.readline() == "begun\n"
    process.stderr.close()
    process.stderr = None
    assert answer(process) == "standard error: Broken pipe"


# Case F1
def test_a_full_disk_behind_standard_error_stops_nothing(script):
    with open("/dev/full", "w") as full:
        process = start(script, stderr=full)
        assert answer(process) == "standard error: No space left on device"


# Case F1
def test_a_terminal_that_closes_stops_nothing(script):
    ours, theirs = pty.openpty()
    process = start(script, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 5) == b"begun"
    os.close(ours)
    assert answer(process) == "standard error: Input/output error"


# Case F1
def test_a_standard_error_that_was_never_open_stops_nothing(script):
    process = start(script, "2>&-")
    assert answer(process) == "standard error: closed"


# Case F1
def test_without_any_standard_stream_the_status_still_says_that_the_answer_is_lost(script):
    process = start(script, "<&- >&- 2>&-")
    assert process.wait(timeout=60) == 2


def test_output_that_arrives_is_not_called_lost(script):
    process = start(script, stderr=subprocess.PIPE)
    out, noise = process.communicate("go on\n", timeout=60)
    assert json.loads(out) == {"step": 40, "lost": None}
    assert all(text in noise for text in ("a note", "noise", "warning 7", "a log line", "a table"))


# Case F1
def test_the_metrics_say_once_that_output_was_lost(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write({"step": 1, "loss": 2.0})
        monkeypatch.setattr(output, "_lost", "standard error: Broken pipe")
        writer.write({"step": 2, "loss": 2.0})
        writer.write({"step": 3, "loss": 2.0})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row.get("output_lost") for row in rows] == [None, "standard error: Broken pipe", None]


def test_the_streams_of_a_notebook_or_a_test_are_left_alone(monkeypatch):
    before = sys.stderr
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("a handler was set"))
    output.guard()
    assert sys.stderr is before
