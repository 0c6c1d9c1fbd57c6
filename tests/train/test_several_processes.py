"""Two processes on this machine train one run: one writes, both stop after the same step."""

import shutil
import signal

import jax
import numpy as np
import pytest

from lightning_jax.checkpoint import all_steps, checkpoints_dir, load_run
from lightning_jax.train.metrics import read_rows
from tests.tiny import write_corpus
from tests.train.launch import end, error_lines, start, wait_for_step

TIMING = ("tokens_per_second", "seconds")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def rows_of(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


# Case F9
def test_one_hears_a_signal_and_both_stop_after_the_same_step_and_go_on(corpus, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    statuses, errors = end(start(corpus, whole))
    assert statuses == [0, 0], errors
    assert errors[1].count("step") == 0 and "step 1/10" in errors[0]

    started = start(corpus, stopped)
    wait_for_step(stopped, 2)
    started[1].send_signal(signal.SIGTERM)
    statuses, errors = end(started)
    assert statuses == [128 + signal.SIGTERM] * 2, errors
    step = max(all_steps(checkpoints_dir(stopped)))
    assert step < 10 and f"SIGTERM: saved step {step}; the same command resumes" in errors[0]
    assert [row["step"] for row in rows_of(stopped)] == [*range(1, step + 1)]

    alone = shutil.copytree(stopped, tmp_path / "alone")
    statuses, errors = end(start(corpus, stopped))
    assert statuses == [0, 0], errors
    assert rows_of(stopped) == rows_of(whole)
    one, other = load_run(whole), load_run(stopped)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)

    # One process goes on with the documents that the two have left, so with other batches.
    statuses, errors = end(start(corpus, alone, count=1))
    assert statuses == [0], errors
    rows = rows_of(alone)
    assert rows[:step] == rows_of(stopped)[:step] and [row["step"] for row in rows][-1] == 10
    assert load_run(alone).meta.tokens == one.meta.tokens


# Case F9
@pytest.mark.parametrize("index", [0, 1])
def test_lost_data_of_one_saves_the_state_of_all(corpus, tmp_path, index):
    faults = ["panic3" if i == index else "" for i in range(2)]
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
