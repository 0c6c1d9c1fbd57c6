"""Three steps past compilation are traced, once, and a trace is always ended."""

import jax
import pytest

from lightning_jax.train.trace import Trace


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


def take(steps, folder):
    with Trace(folder) as trace:
        for _ in range(steps):
            trace.before_step()


def test_steps_five_to_seven_are_traced(calls, tmp_path):
    with Trace(tmp_path) as trace:
        for step in range(1, 20):
            trace.before_step()
            inside = 5 <= step < 8
            assert calls == [str(tmp_path)] * (step >= 5) + ["stop"] * (step >= 5 and not inside)


def test_a_short_session_ends_its_trace(calls, tmp_path):
    take(6, tmp_path)
    assert calls == [str(tmp_path), "stop"]


@pytest.mark.parametrize(("steps", "folder"), [(4, "trace"), (20, None)])
def test_nothing_is_traced_before_step_five_or_without_a_folder(calls, steps, folder):
    take(steps, folder)
    assert not calls
