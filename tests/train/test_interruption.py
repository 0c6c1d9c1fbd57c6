"""Signals and lost data end the steps, at once, and never take a batch that is not trained on."""

import logging
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.data.worker import WorkerIterator
from lightning_jax.runtime import processes
from lightning_jax.train import interruption
from lightning_jax.train.interruption import Interrupted, Stopped, Watch
from tests.data.test_worker import Counter, PanicException, raising


@pytest.fixture
def stop():
    return SimpleNamespace(signal=None)


@pytest.fixture
def batches_of():
    made = []

    def make(*args):
        made.append(WorkerIterator(Counter(*args), ahead=1))
        return made[-1]

    yield make
    for batches in made:
        batches.close()


def hanging(at):
    """Makes the worker hang before batch `at`, until the event is set."""
    go_on = threading.Event()
    return go_on, lambda number: number < at or go_on.wait()


def test_batches_come_in_order(stop, batches_of):
    watch, batches = Watch(stop), batches_of()
    assert watch.next_batch(batches) == 0 and not stop.has_work
    assert [watch.next_batch(batches) for _ in range(2)] == [1, 2] and stop.has_work


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_no_batch(number, stop, batches_of):
    watch, batches = Watch(stop), batches_of()
    watch.next_batch(batches)
    stop.signal = number
    with pytest.raises(Interrupted) as ended:
        watch.next_batch(batches)
    assert isinstance(ended.value.cause, Stopped) and ended.value.cause.signal is number
    assert ended.value.cause.code == 128 + number and batches.get_state() == {"next": 1}


# Case F10
def test_a_signal_is_heard_while_data_is_waited_for(stop, batches_of):
    go_on, before = hanging(at=1)
    watch, batches = Watch(stop), batches_of(before)
    watch.next_batch(batches)
    threading.Timer(0.1, lambda: setattr(stop, "signal", signal.SIGTERM)).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        watch.next_batch(batches)
    assert time.monotonic() < begun + 5 and batches.get_state() == {"next": 1}
    go_on.set()


# Case F10
@pytest.mark.parametrize("error", [OSError(116, "Stale file handle", "a"), PanicException("panic")])
def test_an_end_of_the_worker_ends_the_steps_where_they_are(error, stop, batches_of):
    watch, batches = Watch(stop), batches_of(raising(error, at=2))
    assert [watch.next_batch(batches) for _ in range(2)] == [0, 1]
    with pytest.raises(Interrupted, match="Stale file handle|panic") as ended:
        watch.next_batch(batches)
    assert isinstance(ended.value.cause, UserError) and batches.get_state() == {"next": 2}


# Case F10
def test_a_worker_that_hangs_is_warned_of_and_ends_the_steps(stop, batches_of, monkeypatch, caplog):
    monkeypatch.setattr(interruption, "_WARNING_SECONDS", 0.02)
    monkeypatch.setattr(interruption, "_LIMIT_SECONDS", 0.2)
    monkeypatch.setattr(interruption, "_POLL_SECONDS", 0.01)
    go_on, before = hanging(at=1)
    watch, batches = Watch(stop), batches_of(before)
    watch.next_batch(batches)
    with caplog.at_level(logging.WARNING), pytest.raises(Interrupted) as ended:
        watch.next_batch(batches)
    assert "no batch for 0 s: the data worker hangs in worker.py:" in str(ended.value.cause)
    warned = [message for message in caplog.messages if "still waiting (worker.py:" in message]
    assert 2 <= len(warned) <= 5  # at 0.02 s, 0.04 s, 0.08 s, 0.16 s
    go_on.set()


def test_errors_of_a_block_interrupt_and_signals_in_it_stay_what_they_are(stop):
    watch = Watch(stop)
    fault = UserError("b.txt: is gone")
    with pytest.raises(Interrupted) as ended, watch.interrupting():
        raise fault
    assert ended.value.cause is fault
    gone = processes.Left("process 1: a.txt: is gone")
    with pytest.raises(processes.Left), watch.interrupting():
        raise gone  # Without it nothing can be saved.
    watch.look()
    stop.signal = signal.SIGINT
    with pytest.raises(Interrupted) as ended, watch.interrupting():
        watch.look()
    assert isinstance(ended.value.cause, Stopped)


@pytest.mark.parametrize(
    ("words", "cause", "message"),
    [
        (["", "SIGUSR1"], Stopped, "138"),
        (["SIGTERM", "failed: a.txt: is gone"], UserError, "^process 1: a.txt: is gone$"),
    ],
)
def test_what_another_process_says_interrupts_this_one(stop, monkeypatch, words, cause, message):
    monkeypatch.setattr(processes, "exchange", lambda word, while_waiting: words)
    with pytest.raises(Interrupted, match=message) as ended:
        Watch(stop).agree()
    assert isinstance(ended.value.cause, cause)


def test_a_call_of_another_process_ends_the_wait_for_data(stop, batches_of, monkeypatch):
    go_on, before = hanging(at=0)
    said = []
    monkeypatch.setattr(processes, "called", lambda: "SIGTERM")
    monkeypatch.setattr(
        processes, "exchange", lambda word, while_waiting: said.append(word) or ["", word]
    )
    with pytest.raises(Interrupted):
        Watch(stop).next_batch(batches_of(before))
    assert said == ["SIGTERM"]
    go_on.set()


def test_a_signal_while_others_are_waited_for_is_called_out(stop, monkeypatch):
    calls = []
    monkeypatch.setattr(processes, "call_out", calls.append)

    def exchange(word, while_waiting):
        while_waiting()
        stop.signal = signal.SIGTERM
        while_waiting()
        return [word, ""]

    monkeypatch.setattr(processes, "exchange", exchange)
    Watch(stop).agree()
    assert calls == ["SIGTERM"]
