"""Batches made ahead in a thread: exact positions, and an end of the thread is always heard of."""

import itertools
import threading
import time

import grain
import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.data import worker
from lightning_jax.data.worker import WorkerIterator


class PanicException(BaseException):
    """As pyo3 derives it: no Exception."""


class Counter(grain.DatasetIterator):
    """0, 1, 2 ... to `end`; calls `before(n)` before it returns n."""

    def __init__(self, before=lambda number: None, end=10**9):
        super().__init__()
        self.next, self.before, self.end = 0, before, end

    def __next__(self):
        self.before(self.next)
        if self.next == self.end:
            raise StopIteration
        self.next += 1
        return self.next - 1

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


@pytest.fixture
def made():
    """Makes iterators that are closed after the test."""
    iterators = []

    def make(*args, ahead=2, **kwargs):
        iterators.append(WorkerIterator(Counter(*args, **kwargs), ahead=ahead))
        return iterators[-1]

    yield make
    for iterator in iterators:
        iterator.close()


def raising(error, at=3):
    def before(number):
        if number == at:
            raise error

    return before


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_positions_are_those_of_what_was_taken(made, ahead):
    batches = made(ahead=ahead)
    for number in range(5):
        assert batches.get_state() == {"next": number}
        assert next(batches) == number
    batches.set_state({"next": 2})
    assert batches.get_state() == {"next": 2}
    assert [*itertools.islice(batches, 3)] == [2, 3, 4]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_is_made_than_may_be(made, ahead):
    asked = []
    batches = made(asked.append, ahead=ahead)
    for number in range(3):
        next(batches)
        time.sleep(0.05)
        assert asked == [*range(number + 1 + ahead)]


def test_nothing_is_made_before_the_first_is_asked_for(made):
    asked = []
    batches = made(asked.append)
    batches.set_state({"next": 7})
    assert not asked and next(batches) == 7


def test_the_end_of_the_batches_is_an_end(made):
    assert [*made(end=4)] == [0, 1, 2, 3]


ENDS = {
    "an error": (
        ZeroDivisionError("by zero"),
        r"^ZeroDivisionError: by zero .worker.py:\d+.$",
    ),
    "no message": (MemoryError(), r"^MemoryError: no message .worker.py:\d+.$"),
    "bad input": (UserError("a.jsonl, line 3: is not JSON"), r"^a.jsonl, line 3: is not JSON$"),
    "a disk": (
        OSError(5, "Input/output error", "/data/a.txt"),
        "^/data/a.txt: Input/output error$",
    ),
    "a panic": (PanicException("unwrap on None\nmore"), r"^PanicException: unwrap on None .worker"),
    "an exit": (SystemExit(3), "^SystemExit: 3 .worker"),
    "an interrupt": (KeyboardInterrupt(), "^KeyboardInterrupt: no message .worker"),
}


# Case F10
@pytest.mark.parametrize("error,message", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("ahead", [0, 2])
def test_whatever_ends_the_thread_is_raised_after_the_batches_before_it(
    made, error, message, ahead
):
    batches = made(raising(error), ahead=ahead)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        assert batches.ready(10)
        with pytest.raises(UserError, match=message):
            next(batches)
        assert batches.get_state() == {"next": 3}


# Case F10
def test_a_thread_that_dies_without_a_word_is_noticed(made, monkeypatch):
    monkeypatch.setattr(worker._Worker, "_work", lambda self: None)
    with pytest.raises(UserError, match="data worker died without a word"):
        next(made())


# Case F10
def test_waiting_for_a_thread_that_hangs_gives_up_in_time_and_says_where_it_is(made):
    go_on = threading.Event()
    batches = made(lambda number: number < 1 or go_on.wait())
    assert next(batches) == 0
    begun = time.monotonic()
    assert not batches.ready(0.1) and not batches.ready(0.1)
    assert time.monotonic() < begun + 5
    assert batches.where().startswith("worker.py:") and batches.get_state() == {"next": 1}
    go_on.set()
    assert batches.ready(10) and next(batches) == 1


def test_closing_leaves_a_thread_that_hangs_behind(made, monkeypatch):
    monkeypatch.setattr(worker, "_CLOSE_SECONDS", 0.05)
    go_on = threading.Event()
    batches = made(lambda _: go_on.wait())
    assert not batches.ready(0.01)
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        batches.ready(0)
    go_on.set()


def test_closing_twice_and_before_the_first_batch(made):
    before = threading.active_count()
    batches = made()
    batches.close()
    batches.close()
    assert threading.active_count() == before


def test_grains_own_checkpoint_test():
    class Numbers(grain.IterDataset):
        def __iter__(self):
            return WorkerIterator(Counter(end=9), ahead=2)

    grain.experimental.assert_equal_output_after_checkpoint(Numbers())
