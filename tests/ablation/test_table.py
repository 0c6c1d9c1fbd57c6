"""Running tasks are a table on a terminal, and lines elsewhere."""

import io

import pytest
from rich.console import Console

from lightning_jax.ablation import table
from lightning_jax.ablation.tasks import Task
from lightning_jax.runtime import output
from tests.ablation.fake_runs import small_sweep, write_rows

SWEEP = small_sweep()


class Clock:
    """Stands in for `time`."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def screen(tmp_path, monkeypatch):
    """Makes a screen of three tasks, two at once, on a terminal or not: (screen, tasks, clock)."""
    clock = Clock()
    monkeypatch.setattr(table, "time", clock)

    def make(is_terminal):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=80)
        monkeypatch.setattr(output, "console", lambda: console)
        tasks = [
            Task(str(run), SWEEP.config(run), run.folder(tmp_path)) for run in SWEEP.runs()[:3]
        ]
        write_rows(tasks[1].folder, 7)
        return table.Screen(tasks, 2), tasks, clock, file

    return make


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_runs_and_what_has_ended_is_shown(screen, monkeypatch, is_terminal):
    monkeypatch.setattr(output, "seconds_since_a_line", lambda: 60.0)
    shown, tasks, clock, file = screen(is_terminal)
    with shown:
        shown.begin(tasks[0])
        shown.begin(tasks[1])
        clock.now = 40.0
        shown.look()
        running = file.getvalue()
        shown.end(tasks[0], None)
        shown.begin(tasks[2])
        clock.now = 70.0
        shown.end(tasks[2], "out of memory")
    text = file.getvalue()
    assert "run 3 of 3: hybrid seed 0" in text
    assert "full seed 0: 40 s  (1 of 3 runs ended, about" in text
    assert "hybrid seed 0: failed: out of memory  (2 of 3 runs ended, 1 failed, about" in text
    steps = f"7/{table.Progress.of(tasks[1]).steps}"
    if is_terminal:
        assert "0 of 3 runs ended" in running and "tok/s" in running and steps in running
    else:
        assert "full seed 0: starting" in running and f"shared seed 0: step {steps}" in running


def test_lines_wait_until_nothing_was_said_for_some_time(screen, monkeypatch):
    monkeypatch.setattr(output, "seconds_since_a_line", lambda: 1.0)
    shown, tasks, clock, file = screen(False)
    with shown:
        shown.begin(tasks[0])
        before = file.getvalue()
        clock.now = 60.0
        shown.look()
        assert file.getvalue() == before


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (7200, "2.0 h")]
)
def test_durations(seconds, text):
    assert table.duration(seconds) == text
