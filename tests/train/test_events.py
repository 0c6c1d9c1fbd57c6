"""What readers of TensorBoard's files see of a run of several sessions: every step once."""

import json

import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

from lightning_jax.train import events
from lightning_jax.train.metrics import MetricsWriter

STEPS = 12


def write(writer, step, value):
    writer.write({"step": step, "loss": value, "eval": {"a": {"loss": value}}})
    writer.histogram("params/absmax", [value], step)
    writer.sample(f"{value}", step)


def session(workdir, first, last, value):
    """Steps `first` to `last` of a run, and its evaluation if it gets to the end."""
    with MetricsWriter(workdir, resume_step=first - 1, final_step=STEPS) as writer:
        for step in range(first, last + 1):
            write(writer, step, value)
        if last == STEPS:
            writer.sample(f"{value}", STEPS)
            writer.last_evaluation({"a": {"loss": value, "tokens": 9}}, STEPS)


def killed(workdir, first, last, value):
    """The same, killed after the last row: nothing is closed, and a record is cut."""
    writer = MetricsWriter(workdir, resume_step=first - 1, final_step=STEPS)
    for step in range(first, last + 1):
        write(writer, step, value)
    newest = max((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    writer._others[0]._writer._records.flush()
    newest.write_bytes(newest.read_bytes() + b"\x40\0\0\0\0\0\0\0cut")


# By reader: `EventAccumulator` of everybody's scripts, and TensorBoard's own.
@pytest.fixture(params=[event_accumulator, plugin_event_accumulator], ids=["scripts", "server"])
def read(request):
    def steps(workdir, name):
        everything = {"tensors": 0}
        found = request.param.EventAccumulator(str(workdir / "tensorboard"), everything)
        found.Reload()
        return [event.step for event in found.Tensors(name)]

    return steps


# Case F8
@pytest.mark.parametrize("stop", [session, killed])
def test_after_two_and_three_sessions_every_step_is_there_once(tmp_path, read, stop):
    stop(tmp_path, 1, 7, 1.0)
    stop(tmp_path, 5, 9, 2.0)
    assert read(tmp_path, "loss/train") == [*range(1, 10)]
    session(tmp_path, 9, STEPS - 1, 3.0)
    names = ("loss/train", "loss/eval/a", "params/absmax", "sample")
    assert {name: read(tmp_path, name) for name in names} == {
        name: [*range(1, STEPS)] for name in names
    }


# Case F8
def test_the_last_evaluation_is_there_once_however_often_the_command_is_called(tmp_path, read):
    session(tmp_path, 1, STEPS - 1, 1.0)
    for _ in range(3):
        with MetricsWriter(tmp_path, resume_step=STEPS, final_step=STEPS) as writer:
            writer.sample("text", STEPS)
            writer.last_evaluation({"a": {"loss": 2.0, "tokens": 9}}, STEPS)
    assert read(tmp_path, "loss/eval/a") == [*range(1, STEPS + 1)]
    assert read(tmp_path, "sample") == [*range(1, STEPS + 1)]
    assert read(tmp_path, "z_other/eval/tokens/a") == [STEPS]
    assert read(tmp_path, "config") == [STEPS]
    # evaluation.json has it; metrics.jsonl is of the training.
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, STEPS)]


# Case F8
def test_sessions_within_a_second_or_before_a_clock_that_jumps_back_keep_their_order(
    tmp_path, read, monkeypatch
):
    now = [2_000_000_000.0]
    monkeypatch.setattr(events.time, "time", lambda: now[0])
    for first in range(1, STEPS):
        session(tmp_path, first, first, 1.0)
        now[0] -= 7
    assert read(tmp_path, "loss/train") == [*range(1, STEPS)]


def test_files_that_need_no_cut_or_are_damaged_stay_as_they_are(tmp_path):
    session(tmp_path, 1, 3, 1.0)
    [path] = (tmp_path / "tensorboard").iterdir()
    whole = path.read_bytes()
    events.drop(tmp_path / "tensorboard", lambda step, name: step > 3)
    assert path.read_bytes() == whole
    for damaged in (b"", whole[:5], whole[:-3] + b"xyz", b"\xff" * 100, whole[:20] + b"\xff" * 50):
        path.write_bytes(damaged)
        events.drop(tmp_path / "tensorboard", lambda step, name: step > 3)
    events.drop(tmp_path / "none", lambda step, name: True)
