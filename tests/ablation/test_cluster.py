"""Unfinished runs become jobs of a scheduler, and a job trains the run of its number."""

import os
import pickle
import signal

import pytest

from lightning_jax.ablation import cluster, runner
from lightning_jax.config.errors import UserError
from lightning_jax.train.interruption import Stopped
from tests.ablation.fake_runs import small_sweep, write_run

submitit = pytest.importorskip("submitit")

SBATCH = """#!/bin/sh
cp "$1" {folder}/script.sh
echo Submitted batch job 42
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm that keeps the script of what is submitted; returns its path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH.format(folder=folder)), ("srun", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "script.sh"


def test_every_run_that_has_not_finished_is_a_job_of_an_array(tmp_path, slurm):
    sweep, root = small_sweep(), tmp_path / "s"
    done = sweep.runs()[1]
    write_run(sweep.config(done), done.folder(root))
    given = {"timeout_min": 90, "slurm_partition": "cpu", "cpus_per_task": 4}
    jobs = cluster.submit(sweep, root, "slurm", given, seeds=[0, 1])
    assert jobs == {
        "full seed 0": "42_0",
        "hybrid seed 0": "42_1",
        "full seed 1": "42_2",
        "shared seed 1": "42_3",
        "hybrid seed 1": "42_4",
    }
    script = slurm.read_text()
    for line in ("--partition=cpu", "--time=90", "--cpus-per-task=4", "--array=0-4"):
        assert f"#SBATCH {line}" in script
    found = [pickle.loads(path.read_bytes()) for path in (root / "submitit").glob("*submitted.pkl")]
    assert sorted(submission.args[0] for submission in found) == [0, 2, 3, 4, 5]
    assert found[0].function == cluster.Job(sweep, str(root), False)


def test_nothing_is_submitted_where_all_has_finished(tmp_path, slurm):
    sweep, root = small_sweep(), tmp_path / "s"
    for run in sweep.runs():
        write_run(sweep.config(run), run.folder(root))
    assert cluster.submit(sweep, root, "slurm", {"timeout_min": 90}) == {}
    assert not slurm.exists()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("sge", {"timeout_min": 9}, "submit = 'sge': must be one of slurm, local"),
        ("local", {}, "executor = {}: must be with timeout_min"),
        ("local", {"timeout_min": 9, "nope": 1}, "submit = 'local': Parameter 'nope'"),
        ("local", {"timeout_min": "x"}, "submit = 'local': Parameter \"timeout_min\""),
        ("slurm", {"timeout_min": 9}, "submit = 'slurm': Could not detect"),
    ],
)
def test_what_is_refused_leaves_no_trace(tmp_path, name, parameters, message):
    with pytest.raises(UserError, match=message) as error:
        cluster.submit(small_sweep(), tmp_path / "s", name, parameters)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_prepared_first(tmp_path):
    sweep = small_sweep(search={"trials": 3})
    with pytest.raises(UserError, match="has not been searched"):
        cluster.submit(sweep, tmp_path / "s", "local", {"timeout_min": 9})
    assert not list(tmp_path.iterdir())


def test_a_job_that_is_stopped_tells_submitit_once_its_run_is_saved(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise Stopped(signal.SIGUSR2)

    told = []
    before = signal.signal(signal.SIGUSR2, lambda *_: told.append(1))
    monkeypatch.setattr(runner, "run_task", stopped)
    job = cluster.Job(small_sweep(), str(tmp_path), False)
    try:
        with pytest.raises(Stopped):
            job(3)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert told
    again = job.checkpoint(3)
    assert (again.function, again.args) == (job, (3,))


def test_a_job_whose_run_failed_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_task", lambda *_, **__: ([], {"full seed 0": "a reason"}))
    with pytest.raises(UserError, match="full seed 0 failed: a reason"):
        cluster.Job(small_sweep(), str(tmp_path), False)(0)
