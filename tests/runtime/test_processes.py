"""Words between processes: all hear all of them, and an error of one ends the others."""

import json
import logging
import socket
import subprocess
import sys
import threading

import jax
import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.runtime import processes


class Client:
    """What jax's coordination service keeps."""

    def __init__(self):
        self.values, self.waits = {}, 0

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]

    def blocking_key_value_get(self, key, milliseconds):
        if key not in self.values:
            self.waits += 1
            assert self.waits < 100, "waits for ever"
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no such key")
        return self.values[key]

    def key_value_delete(self, key):
        self.values = {k: v for k, v in self.values.items() if not k.startswith(key)}


@pytest.fixture
def several(monkeypatch):
    """Makes this process one of three."""

    def make(index):
        client = Client()
        monkeypatch.setattr(processes, "count", lambda: 3)
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(processes, "_client", lambda: client)
        monkeypatch.setattr(processes, "_turns", iter(range(1000)))
        monkeypatch.setattr(processes, "_apart", False)
        return client

    return make


def others_say(client, turn, *words):
    client.values |= {f"words/{turn}/{index}": word for index, word in enumerate(words, 1)}


def all_say(client, turn, *words):
    client.values[f"words/{turn}/all"] = json.dumps(words)


def test_one_process_talks_to_nobody(monkeypatch):
    monkeypatch.setattr(processes, "_client", lambda: pytest.fail("asked"))
    assert processes.is_writer() and processes.exchange("word") == ["word"]
    assert processes.called() == ""
    processes.require_same({"config": "a"})
    with pytest.raises(ZeroDivisionError), processes.together():
        raise ZeroDivisionError


def test_the_first_gathers_the_words_and_keeps_nothing(several):
    client = several(0)
    for turn in range(5):
        others_say(client, turn, "b", "c")
        assert processes.exchange("a") == ["a", "b", "c"]
        assert json.loads(client.values[f"words/{turn}/all"]) == ["a", "b", "c"]
        assert {key.split("/")[1] for key in client.values} == {str(turn)}
    assert processes.is_writer()


def test_another_says_its_word_and_reads_all(several):
    client = several(1)
    all_say(client, 0, "a", "b", "c")
    assert processes.exchange("b") == ["a", "b", "c"] and client.values["words/0/1"] == "b"
    assert not processes.is_writer()


def test_while_it_waits_it_does_something_else(several):
    client, waits = several(1), []

    def wait():
        waits.append(0)
        if len(waits) == 3:
            all_say(client, 0, "", "", "")

    assert processes.exchange("", wait) == ["", "", ""] and len(waits) == 3


# Case F9
@pytest.mark.parametrize("index", [0, 1])
def test_an_error_of_one_is_said_once_and_then_it_waits_for_nobody(several, index):
    client = several(index)
    if index:
        all_say(client, 0, "", "leaves: mine", "")
    else:
        others_say(client, 0, "", "")
    with pytest.raises(UserError, match="^mine$"), processes.together(), processes.together():
        raise UserError("mine")
    assert client.values[f"words/0/{index}"] == "leaves: mine" and not client.waits


def test_an_error_of_another_is_raised_here(several):
    client = several(0)
    others_say(client, 0, "", "leaves: a.txt: is gone")
    with pytest.raises(UserError, match="^process 2: a.txt: is gone$"), processes.together():
        processes.exchange("")
    # The others have ended too: nothing more is waited for.
    assert processes.exchange("") == ["", "", ""] and not client.waits


def test_an_error_at_the_end_of_a_block_is_heard_there(several):
    client = several(0)
    others_say(client, 0, "leaves: full disk", "")
    with pytest.raises(UserError, match="^process 1: full disk$"), processes.together():
        pass


# Case F9
def test_other_configs_and_data_are_refused(several):
    client = several(0)
    same, other = ({"config": "a", "data": data} for data in ("b", "x"))
    others_say(client, 0, json.dumps(same), json.dumps(same))
    processes.require_same(same)
    others_say(client, 1, json.dumps(same), json.dumps(other))
    with pytest.raises(UserError, match="^process 2 has another data than process 0$"):
        processes.require_same(same)


def test_calls_are_heard_between_exchanges(several):
    several(2)
    assert processes.called() == ""
    processes.call_out("SIGTERM")
    processes.call_out("SIGTERM")
    assert processes.called() == "SIGTERM"


def test_processes_that_are_gone_are_a_line(several, monkeypatch):
    client = several(1)

    def unavailable(*_):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect\nmore")

    client.blocking_key_value_get = unavailable
    with pytest.raises(UserError, match="^the other processes do not answer: UNAVAILABLE: failed"):
        processes.exchange("")


# Case F9
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((False, "a:1", None, None), "--coordinator_address = 'a:1': must be given with --distr"),
        ((False, None, None, 0), "--process_id = 0: must be given with --distributed"),
        ((True, "host", 2, 0), "--coordinator_address = 'host': must be HOST:PORT"),
        ((True, "host:x", 2, 0), "--coordinator_address = 'host:x': must be HOST:PORT"),
        ((True, "host:1", 0, 0), "--num_processes = 0: must be 1 or more"),
        ((True, "host:1", 2, 2), "--process_id = 2: must be in 0 to 1"),
        ((True, "host:1", None, -1), "--process_id = -1: must be 0 or more"),
        ((True, "no.such.host.invalid:1", 2, 1), "process 0 does not answer"),
        (
            (True, None, None, None),
            "--distributed: this process belongs to no cluster that jax knows (TPU pod slice, "
            "Slurm's srun, Open MPI's mpirun, Kubernetes): give --coordinator_address, "
            "--num_processes, --process_id, or leave --distributed out for one process",
        ),
        ((True, "127.0.0.1:1", None, 0), "Kubernetes): give --num_processes, or leave"),
    ],
    ids=str,
)
def test_flags_that_make_no_cluster_are_one_line(given, message, monkeypatch):
    monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(processes.jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(processes, "_ANSWER_SECONDS", 0.0)
    with pytest.raises(UserError) as refused:
        processes.start(*given)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not jax.distributed.is_initialized()


def test_the_first_process_may_be_late(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        threading.Timer(0.2, listener.listen).start()
        processes._wait_for(f"127.0.0.1:{listener.getsockname()[1]}")


# Case F9
def test_an_abort_in_any_thread_is_a_line():
    program = """
import os, threading, time
from lightning_jax.runtime import processes

processes._explain_aborts()
with processes.if_lost(lambda: "over"), processes.if_lost(lambda: "go on from 3"):
    threading.Thread(target=os.abort).start()
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: this process was ended by jax, most often because another one has died (see above);"
        " go on from 3"
    ]


def test_nothing_is_started_alone(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("started"))
    processes.start(False, None, None, None)
    assert logging.getLogger("lightning_jax").level != logging.CRITICAL
