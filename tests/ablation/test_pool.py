"""What kills a process of the pool is one task's reason; a signal stops all, and they save."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from lightning_jax.ablation import child, pool
from lightning_jax.ablation.results import FAILURE
from lightning_jax.ablation.tasks import Task
from lightning_jax.runtime.files import read_json
from lightning_jax.train.interruption import Stopped
from tests.ablation.fake_runs import small_sweep

CONFIG = small_sweep().config(small_sweep().runs()[0])


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Makes tasks by the names of their folders, for processes that do what these say."""
    stub = SimpleNamespace(__name__="tests.ablation.stub_child", Request=child.Request)
    monkeypatch.setattr(pool, "child", stub)
    return lambda *names: [Task(name, CONFIG, tmp_path / "runs" / name) for name in names]


def train(tmp_path, tasks, jobs=1):
    found = pool.Pool(tmp_path / "compiled", jobs).train(tasks)
    return {task.name: failure for task, failure in found}


# Case F4


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_task_has_its_own_end(tmp_path, tasks, jobs):
    names = ["ok", "fail", "kill_9", "kill_6", "kill_15", "exit_1", "last"]
    assert train(tmp_path, tasks(*names), jobs) == {
        "ok": None,
        "fail": "a reason",
        "kill_9": "its process was killed: out of memory?",
        "kill_6": "its process was ended by SIGABRT",
        "kill_15": "stopped by SIGTERM; the same command resumes it",
        "exit_1": "its process ended with status 1",
        "last": None,
    }
    kept = {path.parent.name for path in tmp_path.glob(f"runs/*/{FAILURE}")}
    # A process keeps the reasons that it knows; one that was stopped has not failed.
    assert kept == {"kill_9", "kill_6", "exit_1"}
    assert "killed" in (tmp_path / "runs" / "kill_9" / FAILURE).read_text()
    assert (tmp_path / "runs" / "kill_9" / pool.LOG).read_text() == "words of kill_9\n"


def test_several_run_at_once_and_have_cores_of_their_own(tmp_path, tasks, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert train(tmp_path, tasks("meet_a", "meet_b"), jobs=2) == {"meet_a": None, "meet_b": None}
    requests = [
        read_json(tmp_path / "runs" / name / "request.json") for name in ("meet_a", "meet_b")
    ]
    assert [request["cores"] for request in requests] == [[0, 1], [2, 3]]
    assert {request["compiled"] for request in requests} == {str(tmp_path / "compiled")}


@pytest.mark.parametrize(
    ("cores", "jobs", "parts"),
    [
        ({0, 1}, 1, [None]),
        ({0, 1}, 2, [[0], [1]]),
        ({3, 5, 8}, 2, [[3, 5], [8]]),
        ({0, 1}, 3, [[0], [1], [0]]),
    ],
)
def test_cores_are_divided(monkeypatch, cores, jobs, parts):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    assert pool.divide_cores(jobs) == parts


def test_a_signal_stops_all_and_they_save(tmp_path, tasks):
    def interrupt():
        while len(list(tmp_path.glob("runs/*/request.json"))) < 2:
            time.sleep(0.01)
        time.sleep(0.2)  # Until both have their handlers.
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Stopped) as stopped:
        train(tmp_path, tasks("stop_a", "stop_b", "never"), jobs=2)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert {path.parent.name for path in tmp_path.glob("runs/*/saved")} == {"stop_a", "stop_b"}
    assert not (tmp_path / "runs" / "never").exists()
    assert not list(tmp_path.glob(f"runs/*/{FAILURE}"))


def test_whoever_stops_to_listen_stops_the_processes(tmp_path, tasks):
    found = pool.Pool(tmp_path / "compiled", 2).train(tasks("ok", "stop"))
    assert next(found)[0].name == "ok"
    time.sleep(0.2)
    found.close()
    assert (tmp_path / "runs" / "stop" / "saved").exists()
