"""The reasons of failed runs. tests/ablation/test_sweep.py has the sweeps around them."""

import pytest

from lightning_jax.ablation import failures
from lightning_jax.config.errors import UserError


# Case F4
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("seed = -1: must be 0 or above"), "seed = -1: must be 0 or above"),
        (RuntimeError("two\n\n  lines"), "RuntimeError: two lines"),
        (MemoryError(), "MemoryError: no reason given"),
        (ValueError("x" * 1000), "ValueError: " + "x" * 300),
        (SystemExit(0), "SystemExit: 0"),
        (NotADirectoryError(20, "Not a directory", "/a/b"), "/a/b: Not a directory"),
    ],
)
def test_a_reason_is_one_line(error, reason):
    assert failures.reason(error) == reason


# Case F12
def test_a_failure_that_cannot_be_kept_is_no_failure_of_the_sweep(tmp_path, caplog):
    (tmp_path / "full").write_text("")
    failures.keep(tmp_path / "full" / "seed_0", "a reason\n")
    assert "is not kept" in caplog.text


@pytest.mark.parametrize(
    ("status", "words", "is_order"),
    [
        (-9, "its process was killed: out of memory?", False),
        (-11, "its process was ended by SIGSEGV", False),
        (-15, "stopped by SIGTERM; the same command resumes it", True),
        (138, "stopped by SIGUSR1; the same command resumes it", True),
        (130, "stopped by SIGINT; the same command resumes it", True),
        (1, "its process ended with status 1", False),
        (-200, "its process was ended by signal 200", False),
    ],
)
def test_a_status_becomes_a_line(status, words, is_order):
    assert failures.of_status(status) == words
    assert failures.is_order(status) is is_order


def test_what_is_forgotten_need_not_be_there(tmp_path):
    failures.keep(tmp_path, "a reason\n")
    for _ in range(2):
        failures.forget(tmp_path)
        assert not list(tmp_path.iterdir())
