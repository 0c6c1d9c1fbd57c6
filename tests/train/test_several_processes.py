"""Several processes on this machine train what one does: one writes, all stop at the same step."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lightning_jax.checkpoint import all_steps, checkpoints_dir, load_run
from lightning_jax.train.metrics import read_rows
from tests.tiny import write_corpus
from tests.train.launch import SECONDS, end, error_lines, start, wait_for_step

ROOT = Path(__file__).parents[2]
TIMING = ("tokens_per_second", "seconds")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def rows_of(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def assert_close(workdir, other):
    """Rows of metrics and all parameters, up to rounding; what was read of the text, exactly."""
    for row, expected in zip(rows_of(workdir), rows_of(other), strict=True):
        assert row.get("data") == expected.get("data")
        assert row.get("loss") == pytest.approx(expected.get("loss"), abs=2e-6)
    pairs = load_run(workdir).params, load_run(other).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *pairs)


# Case F9
def test_one_hears_a_signal_and_both_stop_after_the_same_step_and_go_on(corpus, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    statuses, errors = end(start(corpus, whole))
    assert statuses == [0, 0], errors
    assert errors[1].count("step") == 0 and "step 1/10" in errors[0]
    assert "text of 2 times its rows; in a new run, data.streams = 2 would" in errors[0]
    assert "data.streams" not in errors[1]

    started = start(corpus, stopped)
    wait_for_step(stopped, 2)
    started[1].send_signal(signal.SIGTERM)
    statuses, errors = end(started)
    assert statuses == [128 + signal.SIGTERM] * 2, errors
    step = max(all_steps(checkpoints_dir(stopped)))
    assert step < 10 and f"SIGTERM: saved step {step}; the same command resumes" in errors[0]
    assert [row["step"] for row in rows_of(stopped)] == [*range(1, step + 1)]

    statuses, errors = end(start(corpus, stopped))
    assert statuses == [0, 0], errors
    assert rows_of(stopped) == rows_of(whole)
    one, other = load_run(whole), load_run(stopped)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


# Case F9
def test_four_one_and_two_processes_go_on_with_one_run_as_if_it_were_one(corpus, tmp_path):
    alone, passed_on = tmp_path / "alone", tmp_path / "passed_on"
    statuses, errors = end(start(corpus, alone, "data__streams=4", count=1))
    assert statuses == [0], errors
    steps = 0
    for count, taken in ((4, 3), (1, 4), (2, 3)):
        faults = ["", "", "", ""]
        faults[count - 1] = "" if steps + taken == 10 else f"SIGTERM{taken}"
        statuses, errors = end(
            start(corpus, passed_on, "data__streams=4", count=count, faults=faults)
        )
        steps += taken
        assert statuses == [0 if steps == 10 else 128 + signal.SIGTERM] * count, errors
        assert max(all_steps(checkpoints_dir(passed_on))) == steps
        assert "data.streams" not in errors[0]
    assert_close(passed_on, alone)


# Case F9
@pytest.mark.parametrize("index", [0, 1])
def test_one_that_is_killed_ends_the_other_with_a_line(corpus, tmp_path, index):
    faults = ["SIGKILL8" if i == index else "" for i in range(2)]
    begun = time.monotonic()
    statuses, errors = end(start(corpus, tmp_path, faults=faults))
    assert time.monotonic() < begun + 60
    assert statuses[index] == -signal.SIGKILL and statuses[1 - index] == 2, errors
    [line] = error_lines(errors)[1 - index]
    assert line.startswith("error: this process was ended by jax, most often because another one")
    newest = max(all_steps(checkpoints_dir(tmp_path)))
    assert newest in (3, 6) and line.endswith(f"; the run goes on from checkpoint {newest}")


# Case F9
def test_lost_data_of_one_saves_the_state_of_all(corpus, tmp_path):
    index = 1  # not the one that writes
    faults = ["", "panic7"]
    statuses, errors = end(start(corpus, tmp_path, "checkpoint_every=100", faults=faults))
    assert statuses == [2, 2], errors
    step = max(all_steps(checkpoints_dir(tmp_path)))
    for process, [line] in enumerate(error_lines(errors)):
        by = "" if process == index else f"process {index}: "
        assert line.startswith(f"error: {by}corpus.jsonl:"), line
        assert "PanicException: unwrap on None" in line
        assert line.endswith(f"the state before it is checkpoint {step}")


# Case F9
@pytest.mark.parametrize("index", [0, 1])
def test_one_that_is_refused_ends_the_other(corpus, tmp_path, index):
    faults = ["refused" if i == index else "" for i in range(2)]
    statuses, errors = end(start(corpus, tmp_path, faults=faults))
    assert statuses == [2, 2], errors
    lines = error_lines(errors)
    assert lines[index] == ["error: corpus: is not on this host"]
    assert lines[1 - index] == [f"error: process {index}: corpus: is not on this host"]


# Case F9
def test_processes_with_other_configs_are_refused_and_leave_no_trace(corpus, tmp_path):
    statuses, errors = end(start(corpus, tmp_path / "run", faults=("", "seed")))
    assert statuses == [2, 2], errors
    for [line] in error_lines(errors):
        assert line == "error: process 1 has another config than process 0"
    assert not (tmp_path / "run").exists()


# Case F9
def test_a_loss_that_is_not_finite_stops_both(corpus, tmp_path):
    statuses, errors = end(start(corpus, tmp_path, faults=("", "poison")))
    assert statuses == [2, 2], errors
    for [line] in error_lines(errors):
        assert "loss is not finite at step 3" in line
    assert load_run(tmp_path).meta.step == 3


def test_make_multiprocess_trains_a_run(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    flags = {
        "model.unit": "G",
        "model.moe.num_experts": 0,
        "stages.stable.tokens": 6000,
        "stages.decay.tokens": 2000,
        "stages.decay.decay_tokens": 2000,
        "final_eval_tokens": 500,
        "sample_tokens": 0,
    }
    given = " ".join(f"--config.{name}={value}" for name, value in flags.items())
    command = ["make", "multiprocess", f"VENV={tmp_path}/venv", f"WORKDIR={tmp_path}/run"]
    done = subprocess.run(
        [*command, f"FLAGS={given}"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("[process 0] ")]
    assert '"bits_per_byte"' in done.stdout and "data.streams =" not in done.stdout
    assert said and not [line for line in done.stdout.splitlines() if "rror" in line]
    assert load_run(tmp_path / "run").meta.step == 8
