"""A signal becomes a question between steps; a second one, or another thread, is left alone."""

import signal
import threading

import pytest

from lightning_jax.train.signals import StopRequest

HANDLED = (signal.SIGTERM, signal.SIGINT)


def handlers():
    return [signal.getsignal(number) for number in HANDLED]


@pytest.mark.parametrize("number", HANDLED)
def test_the_first_signal_is_remembered(number):
    before = handlers()
    with StopRequest() as stop:
        assert stop.signal is None and handlers() != before
        signal.raise_signal(number)
        assert stop.signal is number
        assert handlers() == before
    assert handlers() == before and stop.signal is number


def test_a_second_signal_acts_as_usual():
    # A shell starts what runs in the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert stop.signal is signal.SIGTERM


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
