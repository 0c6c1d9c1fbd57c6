"""The reasons of failed runs. tests/ablation/test_sweep.py has the sweeps around them."""

import pytest

from lightning_jax.ablation import failures
from lightning_jax.ablation.results import FAILURE
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import small_sweep, write_run


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


# Case F4
def test_only_an_unfinished_run_is_recorded_as_killed(tmp_path):
    sweep = small_sweep()
    finished, killed = sweep.runs()[:2]
    write_run(sweep.config(finished), finished.folder(tmp_path))
    for name in (str(finished), str(killed), "of another sweep", ""):
        (tmp_path / "running.txt").write_text(name)
        failures.note_killed(sweep.runs(), tmp_path)
        assert not (tmp_path / "running.txt").exists()
    failures.note_killed(sweep.runs(), tmp_path)
    assert [path.parent for path in tmp_path.glob(f"*/*/{FAILURE}")] == [killed.folder(tmp_path)]
