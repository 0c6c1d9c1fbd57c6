"""The speed that is measured, and the lines and the bar that show it."""

import io
import math

import pytest
from rich.console import Console

from lightning_jax.runtime import output, phases
from lightning_jax.train import progress
from lightning_jax.train.plan import Plan
from lightning_jax.train.progress import Progress, Throughput
from tests.tiny import tiny_run

FIRST, SECOND = Plan.of(tiny_run("unread")).segments


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved: `clock[0] += seconds`."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(output, "_last_line", now[0])
    monkeypatch.setattr(phases, "_heart", phases._Heart())
    monkeypatch.setattr(phases._Heart, "_beat", lambda self: None)
    return now


def test_throughput_is_that_of_the_lap(clock):
    throughput = Throughput()
    clock[0] += 2
    throughput.count(300)
    throughput.count(100)
    assert throughput.tokens_per_second == 200
    assert throughput.end_lap() == {"tokens_per_second": 200, "seconds": 2}
    clock[0] += 1
    throughput.count(50)
    assert throughput.end_lap() == {"tokens_per_second": 50, "seconds": 3}
    # No time at all is no division by zero.
    assert throughput.tokens_per_second == 0


def test_without_a_terminal_a_line_now_and_then(clock, capfd):
    with Progress(total_steps=100, start=40) as shown:
        shown.begin(FIRST)
        shown.advance(41, 2.0, 1234.0)
        shown.advance(42, 2.0, 1234.0)
        clock[0] += 16
        shown.advance(43, 4.0, 5678.0)
        shown.note("held out: [a] 1.000 bits/byte " + "x" * 200)
    out, err = capfd.readouterr()
    first, second, note = err.strip().splitlines()
    assert out == "" and first.startswith("step 41/100  loss 2.000  1,234 tok/s")
    # Smoothed over steps: 0.95 of what it was.
    assert second.startswith("step 43/100  loss 2.100  5,678 tok/s")
    # Not wrapped, and brackets are no markup.
    assert note.startswith("held out: [a] 1.000") and note.endswith("x" * 200)


# Case F7
def test_without_a_terminal_lines_from_the_start_to_the_last_step(clock, capfd):
    with Progress(total_steps=3, start=0) as shown:
        shown.begin(FIRST)
        for _ in range(2):
            clock[0] += 6
            phases._heart.look()
        for step in (1, 2, 3):
            clock[0] += 0.1
            shown.advance(step, 2.0, 1234.0)
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[0] == "compiling a step of 4 x 32 tokens ..."
    assert lines[1] == "compiling a step of 4 x 32 tokens, 12 s"
    assert lines[2].startswith("step 1/3  loss 2.000") and "first step after 12 s" in lines[2]
    assert lines[3].startswith("step 3/3") and "first" not in lines[3] and len(lines) == 4


def test_without_a_terminal_nothing_is_silent_for_more_than_five_seconds(clock, capfd):
    said = [clock[0]]
    with Progress(total_steps=9, start=0) as shown:
        shown.begin(FIRST)
        for step, seconds in enumerate([12, 2, 2, 2, 3, 3, 3, 0.25, 0.25, 7, 1], 1):
            for _ in range(int(4 * seconds)):
                clock[0] += 0.25
                phases._heart.look()
                said += [clock[0]] * bool(capfd.readouterr().err)
            shown.advance(step, 2.0, 1.0)
            said += [clock[0]] * bool(capfd.readouterr().err)
    assert max(b - a for a, b in zip(said, said[1:], strict=False)) <= 5


def test_only_a_new_shape_of_batch_is_compiled(clock, capfd):
    with Progress(total_steps=9, start=0) as shown:
        for segment in (FIRST, FIRST, SECOND):
            shown.begin(segment)
            clock[0] += 6
            phases._heart.look()
            shown.advance(1, 2.0, 1.0)
        text = capfd.readouterr().err
    assert text.count("compiling") == 2


# Case D2, case F7
def test_losses_that_are_not_finite_are_left_out(clock, capfd):
    with Progress(total_steps=9, start=0) as shown:
        for step, loss in enumerate([math.nan, 2.0, math.nan, math.inf, 4.0], 1):
            shown.advance(step, loss, 1.0)
            clock[0] += 16
    lines = capfd.readouterr().err.strip().splitlines()
    losses = [line.split("loss ")[1].split("  ")[0] for line in lines]
    assert losses == ["not finite", "2.000", "2.000", "2.000", "2.100"]


@pytest.fixture
def terminal(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(output, "console", lambda: console)
    return screen


# Case F7
def test_the_bar_shows_no_loss_before_there_is_one(terminal, clock):
    with Progress(total_steps=79, start=0) as shown:
        shown.begin(FIRST)
        clock[0] += 3
        phases._heart.look()
    text = terminal.getvalue()
    assert "0/79" in text and "compiling a step of 4 x 32 tokens, 3 s" in text
    assert not any(word in text for word in ("nan", "loss", "tok/s"))


def test_on_a_terminal_a_bar_that_shows_phases_too(terminal, clock):
    with Progress(total_steps=3, start=0) as shown:
        shown.begin(SECOND)
        for step in (1, 2, 3):
            shown.advance(step, 1.5, 99.0)
        with phases.phase("evaluating a"):
            clock[0] += 3
            phases._heart.look()
            shown._bar.refresh()
            assert "evaluating a, 3 s" in terminal.getvalue()
        shown._bar.refresh()
    text = terminal.getvalue()
    assert "decay" in text and "3/3" in text and "loss 1.500" in text and "99 tok/s" in text
    assert text.rindex("loss 1.500") > text.index("evaluating a, 3 s")
    assert "step 1/3" not in text
