"""Sweeps with real processes: killed at any moment they end with the numbers of one left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_jax.ablation import report
from tests.conftest import QUICK
from tests.tiny import write_corpus

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """from configs import base
from tests.tiny import tiny_config


def get_sweep():
    config = tiny_config(checkpoint_every=40, model__moe__num_experts=0, model__num_units=1)
    config.data.sources = base.named(a=base.source({corpus!r}))
    config.stages = base.named(all=base.stage(tokens=4 * 32 * {steps}, batch_size=4, seq_len=32))
    return dict(
        question="Does sharing hurt?",
        base=config,
        baseline="full",
        arms={{"full": {{"model.unit": "GG"}}, "shared": {{"model.unit": "Gg"}}}},
        seeds=(0,),
    )
"""
ARMS, STEPS = ("full", "shared"), 400
pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    """Starts a sweep of two arms in a folder of tmp_path."""
    (tmp_path / "sweep.py").write_text(
        SWEEP.format(steps=STEPS, corpus=write_corpus(tmp_path / "text"))
    )

    def started(folder, how="--jobs=2"):
        flags = [f"--sweep={tmp_path / 'sweep.py'}", f"--workdir={tmp_path / folder}", how]
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.sweep", *flags],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": QUICK},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return started


def wait_for(path, lines=1):
    """Until a file has so many lines."""
    deadline = time.monotonic() + 200
    while not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)


def end(process, status=0):
    """Waits for the end of a sweep; returns its answer and what it said."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return (json.loads(out) if out else None), err


def numbers(rows):
    """What does not depend on the clock."""
    clock = ("tokens_per_second", "seconds")
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


def read(root, arm, name):
    return (root / arm / "seed_0" / name).read_text()


def losses(root, arm):
    return [json.loads(line)["loss"] for line in read(root, arm, "metrics.jsonl").splitlines()]


# Cases A2, F4


def test_a_killed_sweep_ends_with_the_numbers_of_one_left_alone(tmp_path, start):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    left_alone, _ = end(start("whole"))
    killed = start("cut")
    wait_for(cut / "lock")
    _, err = end(start("cut"), status=2)
    assert "cut': in use by process" in err
    for arm in ARMS:
        wait_for(cut / arm / "seed_0" / "metrics.jsonl", 50)
    killed.kill()
    killed.communicate()
    assert not list(cut.glob("*/*/evaluation.json"))

    for lock in cut.glob("*/*/lock"):  # What kills leave behind, and no process holds.
        lock.unlink()
    stopped = start("cut")
    for arm in ARMS:
        wait_for(cut / arm / "seed_0" / "lock")
    os.kill(json.loads(read(cut, "full", "lock"))["pid"], signal.SIGKILL)
    wait_for(cut / "full" / "seed_0" / "failure.txt")
    stopped.terminate()
    end(stopped, status=128 + signal.SIGTERM)
    reason = "its process was killed: out of memory?"
    assert read(cut, "full", "failure.txt").splitlines()[0] == reason
    assert not (cut / "shared" / "seed_0" / "failure.txt").exists()

    # By its number, as a scheduler would do it.
    first, _ = end(start("cut", "--task=0"))
    assert [row["arm"] for row in first["finished"]] == ["full"]
    found, _ = end(start("cut"))
    assert not found["failed"] and numbers(found["finished"]) == numbers(left_alone["finished"])
    for arm in ARMS:
        assert losses(cut, arm) == losses(whole, arm) and len(losses(cut, arm)) == STEPS
        assert read(cut, arm, "evaluation.json") == read(whole, arm, "evaluation.json")
        sessions = json.loads(read(cut, arm, "run.json"))["sessions"]
        assert len(sessions) >= 2 and "experiments/sweep.py" in sessions[0]["command"][0]
    assert not list(cut.glob("*/*/failure.txt"))
    assert [arm["seeds"] for arm in report.write_report(cut)["arms"]] == [[0], [0]]
