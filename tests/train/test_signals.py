"""A signal becomes a question between steps; what is ignored, or another thread, is left alone."""

import signal
import threading
import time

import pytest

from lightning_jax.checkpoint import all_steps, checkpoints_dir, read_meta
from lightning_jax.train import signals
from lightning_jax.train.signals import StopRequest
from tests.tiny import write_corpus
from tests.train.launch import end, start, wait_for_step

ORDERS = (signal.SIGTERM, signal.SIGINT)
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
HANDLED = (*ORDERS, *WARNINGS)


def handlers():
    return [signal.getsignal(number) for number in HANDLED]


@pytest.fixture(autouse=True)
def usual(monkeypatch):
    """Python's own handlers, whatever started the tests; a clock that the tests move."""
    # A shell starts what runs in the background with interrupts ignored, and nohup with SIGHUP.
    before = handlers()
    for number in HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(HANDLED, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


# Case F11
@pytest.mark.parametrize("number", HANDLED)
def test_the_first_signal_is_remembered(number):
    before = handlers()
    with StopRequest() as stop:
        assert stop.signal is None and handlers() != before
        signal.raise_signal(number)
        assert stop.signal is number
    assert handlers() == before and stop.signal is number


# Case F11
@pytest.mark.parametrize("number", ORDERS)
def test_a_repeat_within_a_second_is_the_same_order(number, clock):
    with StopRequest() as stop:
        for _ in range(5):
            signal.raise_signal(number)
            clock[0] += 0.2
    assert stop.signal is number


@pytest.mark.parametrize("first", ORDERS)
def test_a_later_second_order_acts_as_usual(first, clock):
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(first)
        clock[0] += 1.1
        signal.raise_signal(signal.SIGINT)
    assert stop.signal is first


def test_a_second_sigterm_is_passed_to_the_handler_before(clock):
    passed = []
    signal.signal(signal.SIGTERM, lambda number, _: passed.append(number))
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        clock[0] += 1.1
        assert not passed
        signal.raise_signal(signal.SIGTERM)
        assert passed == [signal.SIGTERM]


def test_warnings_are_no_orders(clock):
    """SIGUSR1, a minute later SIGTERM, as Slurm sends them: the save goes on."""
    with StopRequest() as stop:
        for number in (*WARNINGS, *WARNINGS, signal.SIGTERM, *WARNINGS):
            signal.raise_signal(number)
            clock[0] += 60
    assert stop.signal is WARNINGS[0]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert stop.signal is None and signal.getsignal(number) is signal.SIG_IGN
    assert signal.getsignal(number) is signal.SIG_IGN


def test_a_handler_of_a_library_in_c_gives_way_to_the_default(monkeypatch):
    monkeypatch.setattr(signals.signal, "getsignal", lambda number: None)
    with StopRequest():
        pass
    monkeypatch.undo()
    assert handlers() == [signal.SIG_DFL] * len(HANDLED)


def test_handlers_come_back_after_an_error():
    before = handlers()
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert handlers() == before


def test_another_thread_changes_no_handlers():
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append((handlers(), stop.signal))

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


# Case F11
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([signal.SIGHUP], signal.SIGHUP),
        ([signal.SIGUSR1], signal.SIGUSR1),
        ([signal.SIGTERM] * 5, signal.SIGTERM),
        ([signal.SIGINT], signal.SIGINT),
    ],
    ids=["closed terminal", "warning", "repeats", "Ctrl-C"],
)
def test_a_process_saves_at_once_and_says_so(corpus, tmp_path, sent, expected):
    started = start(corpus, tmp_path, count=1, faults=["slow"])
    wait_for_step(tmp_path, 2)
    for number in sent:
        started[0].send_signal(number)
        time.sleep(0.005)
    statuses, [errors] = end(started)
    step = max(all_steps(checkpoints_dir(tmp_path)))
    assert statuses == [128 + expected] and 2 <= step < 10, errors
    assert f"{expected.name}: saved step {step}; the same command resumes" in errors
    assert "Traceback" not in errors and "Exception" not in errors
    assert read_meta(tmp_path).step == step and not [*tmp_path.glob("checkpoints/*tmp*")]


# Case F10
@pytest.mark.slow
def test_a_signal_is_heard_by_a_run_that_waits_for_data(corpus, tmp_path):
    started = start(corpus, tmp_path, count=1, faults=["hang"])
    deadline = time.monotonic() + 120
    while not (tmp_path / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3)
    begun = time.monotonic()
    started[0].send_signal(signal.SIGTERM)
    statuses, [errors] = end(started)
    assert statuses == [128 + signal.SIGTERM], errors
    assert "SIGTERM: before the first step" in errors and time.monotonic() < begun + 30
