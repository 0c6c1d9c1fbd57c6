"""Long work is shown while it lasts: its name after some seconds, then how far it is."""

import io
import time

import pytest
from rich.console import Console

from lightning_jax.runtime import output, phases
from lightning_jax.runtime.phases import phase


@pytest.fixture
def clock(monkeypatch):
    """Time that stands until it is moved, and a heart that beats when it is asked to."""
    now = [100.0]
    monkeypatch.setattr(output, "_last_line", 100.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(phases, "_heart", phases._Heart())
    monkeypatch.setattr(phases._Heart, "_beat", lambda self: None)
    return now


def look_after(clock, seconds):
    clock[0] += seconds
    phases._heart.look()


def lines(capfd):
    return capfd.readouterr().err.splitlines()


def test_without_a_terminal_a_line_whenever_there_was_none_for_four_seconds(clock, capfd):
    clock[0] += 10
    with phase("reading"):
        look_after(clock, 0.5)
        assert lines(capfd) == []
    output.say("a line")
    with phase("training the tokenizer") as now:
        look_after(clock, 3)
        assert lines(capfd) == ["a line"]
        look_after(clock, 1)
        assert lines(capfd) == ["training the tokenizer ..."]
        now.detail = "3 of 16 MB"
        look_after(clock, 3)
        assert lines(capfd) == []
        look_after(clock, 1)
        assert lines(capfd) == ["training the tokenizer, 3 of 16 MB, 8 s"]
        output.say("another line")
        look_after(clock, 3)
        assert lines(capfd) == ["another line"]
        look_after(clock, 1)
        assert lines(capfd) == ["training the tokenizer, 3 of 16 MB, 12 s"]
    look_after(clock, 100)
    assert lines(capfd) == []


def test_the_innermost_phase_is_shown_and_the_outer_one_after_it(clock, capfd):
    phases.detail("of nothing")
    with phase("outer"):
        look_after(clock, 4)
        with phase("inner"):
            phases.detail("file 1 of 2")
            look_after(clock, 4)
            look_after(clock, 5)
        look_after(clock, 5)
    assert lines(capfd) == ["outer ...", "inner ...", "inner, file 1 of 2, 9 s", "outer, 9 s"]


def test_an_error_ends_a_phase(clock, capfd):
    with pytest.raises(RuntimeError), phase("work"):
        raise RuntimeError
    look_after(clock, 100)
    assert lines(capfd) == []


def test_a_silent_process_says_nothing(clock, capfd, monkeypatch):
    monkeypatch.setattr(output, "_silent", False)
    output.silence()
    with phase("work"):
        look_after(clock, 7)
        assert not phases._heart._thread
    output.say("a line")
    assert lines(capfd) == []


def test_on_a_terminal_a_spinner_that_leaves_nothing_behind_or_the_bar(clock, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(output, "console", lambda: console)
    with phase("indexing"):
        look_after(clock, 2)
        assert phases._heart._spinner is not None
        look_after(clock, 5)
    assert "indexing, 7 s" in screen.getvalue() and phases._heart._spinner is None
    shown = []
    with phases.shown_by(lambda now: shown.append(str(now))), phase("bar"), phase("eval"):
        look_after(clock, 3)
    assert shown == ["eval, 3 s", "bar, 0 s"] and phases._heart._spinner is None


def test_a_thread_shows_it_while_the_work_goes_on(capfd, monkeypatch):
    monkeypatch.setattr(phases, "_heart", phases._Heart())
    monkeypatch.setattr(phases, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(phases, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(phases, "_TICK_SECONDS", 0.01)
    said = ""
    with phase("work"):
        while "work ..." not in said:
            said += capfd.readouterr().err
            time.sleep(0.01)
