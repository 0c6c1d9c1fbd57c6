"""What is silenced of Orbax: the errors of its own threads, and nothing else."""

import asyncio
import functools
import logging
import sys
import types

import pytest

from lightning_jax.checkpoint import library


def closed_loop():
    loop = asyncio.new_event_loop()
    loop.close()
    loop.call_soon_threadsafe(print)


def ours():
    closed_loop()


def other():
    raise RuntimeError("Event loop is closed")


def unraisable(call, *, skip=0, **changes):
    """What the hook gets for the error of `call`, without its outermost `skip` frames."""
    with pytest.raises(RuntimeError) as caught:
        call()
    error = caught.value
    trace = error.__traceback__
    for _ in range(skip):
        trace = trace.tb_next
    given = dict(exc_type=RuntimeError, exc_value=error, exc_traceback=trace)
    return types.SimpleNamespace(**{**given, "err_msg": None, "object": None, **changes})


# Case F3
@pytest.mark.parametrize(
    ("given", "said"),
    [
        # A call from C++: asyncio's frame is the outermost.
        (lambda: unraisable(closed_loop, skip=2), False),
        (lambda: unraisable(ours), True),
        (lambda: unraisable(other, skip=1), True),
        (lambda: unraisable(closed_loop, skip=2, object=ours), True),
        (lambda: unraisable(closed_loop, skip=2, exc_traceback=None), True),
    ],
)
def test_only_the_errors_of_a_closed_loop_are_unsaid(monkeypatch, given, said):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    library.orbax.__wrapped__()
    assert isinstance(sys.unraisablehook, functools.partial)
    sys.unraisablehook(given())
    assert bool(heard) == said


def test_asyncio_speaks_of_other_tasks(caplog):
    library.orbax()
    log = logging.getLogger("asyncio")
    log.error("Task exception was never retrieved: %s", "site-packages/orbax/checkpoint/x.py")
    log.error("Task exception was never retrieved: %s", "lightning_jax/data/x.py")
    assert [record.args for record in caplog.records] == [("lightning_jax/data/x.py",)]
