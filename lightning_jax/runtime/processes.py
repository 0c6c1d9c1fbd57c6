"""Several processes that train one run: who writes, and what they agree on.

Process 0 alone writes files and prints; only the arrays of a checkpoint are written by all. What
one process hears of or fails at, all must know before the next computation, for which each waits
for the others: they exchange words, over jax's coordination service and not over the devices, so
that no device waits. A single process talks to nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.runtime import output

# What tells jax who the processes are.
_CLUSTERS = "TPU pod slice, Slurm's srun, Open MPI's mpirun, Kubernetes"
_ANSWER_SECONDS = 300.0
# A process that does not answer for so long is dead; less than a minute, for its chips cost money.
_HEARTBEAT_SECONDS = 45
# While a process waits for the words of another, Python's signal handlers run this often.
_POLL_MILLISECONDS = 500
# Before the error of a process that takes part in nothing any more.
_LEAVES = "leaves: "
_turns = itertools.count()
_apart = False
_outlook: Callable[[], str] = lambda: "nothing was begun yet"  # noqa: E731


class Left(UserError):
    """Another process has ended with an error: nothing can be computed or saved any more."""


def start(distributed: bool, address: str | None, number: int | None, index: int | None) -> None:
    """Makes this process one of several; what is None comes from the cluster's environment.

    Args:
      distributed: whether it is; without it nothing is done, and nothing else may be given.
      address: `host:port` where process 0 listens.
      number: how many processes there are.
      index: which of them this one is.

    Raises:
      UserError: they do not fit or cannot be found out, or process 0 does not answer.
    """
    given = {"coordinator_address": address, "num_processes": number, "process_id": index}
    for name, value in given.items():
        require(distributed or value is None, f"--{name}", value, "given with --distributed")
    if not distributed:
        return
    _check(address, number, index)
    if address is not None and index:
        _wait_for(address)
    # jax's own handler of SIGTERM would swallow the signals before `train.signals` has its own.
    jax.config.update("jax_enable_preemption_service", False)
    _explain_aborts()
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except Exception as error:
        raise UserError(f"--distributed: {_why_alone(given, error)}") from error
    if not is_writer():
        logging.getLogger("lightning_jax").setLevel(logging.WARNING)
        output.silence()


def _why_alone(given: Mapping[str, Any], error: Exception) -> str:
    missing = [f"--{name}" for name, value in given.items() if value is None]
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if not missing:
        return reason
    # jax's words for a parameter that no cluster has told it, which name its own argument.
    if isinstance(error, ValueError) and reason.endswith(" be defined"):
        reason = f"this process belongs to no cluster that jax knows ({_CLUSTERS})"
    return f"{reason}: give {', '.join(missing)}, or leave --distributed out for one process"


def _check(address: str | None, number: int | None, index: int | None) -> None:
    if address is not None:
        host, _, port = address.rpartition(":")
        require(bool(host) and port.isdecimal(), "--coordinator_address", address, "HOST:PORT")
    if number is not None:
        require(number >= 1, "--num_processes", number, "1 or more")
    if index is not None:
        right = "0 or more" if number is None else f"in 0 to {number - 1}"
        require(0 <= index < (number or index + 1), "--process_id", index, right)


def _wait_for(address: str) -> None:
    """Waits until somebody listens there: jax would end the process from C++, without a line."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + _ANSWER_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end or isinstance(error, socket.gaierror):
                message = f"--coordinator_address={address}: process 0 does not answer ({error})"
                raise UserError(message) from error
            time.sleep(0.5)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end(_signal: int) -> None:
    line = (
        "error: this process was ended by jax, most often because another one has died (see above)"
    )
    with contextlib.suppress(Exception):
        line += f"; {_outlook()}"
    print(line, file=sys.stderr, flush=True)
    os._exit(2)


def _explain_aborts() -> None:
    """Makes an abort of this process end it with a line and status 2.

    When a process dies, the devices of the others wait for it, and nothing can interrupt them. Then
    jax aborts the processes from a thread of C++, after `_HEARTBEAT_SECONDS`, or at once if it was
    process 0. Its handler of lost heartbeats cannot be one of Python in jax 0.10, nor can a handler
    of `signal.signal` run, for the main thread waits. Whatever is being written stays a leftover,
    as after any kill.
    """
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _end)


@contextlib.contextmanager
def if_lost(outlook: Callable[[], str]) -> Iterator[None]:
    """While it is entered, `outlook()` says after the death of another process how to go on."""
    global _outlook
    before, _outlook = _outlook, outlook
    try:
        yield
    finally:
        _outlook = before


def count() -> int:
    """Number of processes."""
    # Without others, to ask for the number would start the devices, and wait for one in use.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_writer() -> bool:
    """Whether this process writes files and prints for all of them."""
    return count() == 1 or jax.process_index() == 0


def exchange(word: str, while_waiting: Callable[[], None] = lambda: None) -> list[str]:
    """Returns the words of all processes, by process. All must call this equally often.

    Args:
      word: what this process says.
      while_waiting: called about twice a second until the others have said theirs.

    Raises:
      Left: another process has ended with an error in `together`.
    """
    global _apart
    if count() == 1 or _apart:
        return [word] * count()
    client, turn, me = _client(), next(_turns), jax.process_index()
    client.key_value_set(f"words/{turn}/{me}", word)
    if me == 0:
        keys = [f"words/{turn}/{process}" for process in range(count())]
        words = [_read(client, key, while_waiting) for key in keys]
        client.key_value_set(f"words/{turn}/all", json.dumps(words))
        # Whoever speaks in this turn has read the words of the last one.
        client.key_value_delete(f"words/{turn - 1}/")
    else:
        words = json.loads(_read(client, f"words/{turn}/all", while_waiting))
    for process, said in enumerate(words):
        if said.startswith(_LEAVES):
            _apart = True
            raise Left(f"process {process}: {said.removeprefix(_LEAVES)}")
    return words


def _read(client: Any, key: str, while_waiting: Callable[[], None]) -> str:
    while True:
        try:
            return client.blocking_key_value_get(key, _POLL_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                message = f"the other processes do not answer: {str(error).splitlines()[0]}"
                raise UserError(message) from error
            while_waiting()


def _client() -> Any:
    # Not public, but what Orbax takes too; the public ways wait for the devices, or hear of SIGTERM
    # alone (`jax.experimental.multihost_utils`).
    from jax._src import distributed

    return distributed.global_state.client


def require_same(values: Mapping[str, str]) -> None:
    """Raises UserError, in all processes, that names the first of `values` of which one has others.

    Processes with different configs or data would wait for each other for ever, or train nonsense.
    """
    said = [json.loads(word) for word in exchange(json.dumps(dict(values)))]
    for name in values:
        for process, others in enumerate(said):
            if others[name] != said[0][name]:
                raise UserError(f"process {process} has another {name} than process 0")


def call_out(word: str) -> None:
    """Says a word that `called` gives to processes that are not ready to exchange."""
    _client().key_value_set("called", word, allow_overwrite=True)


def called() -> str:
    """Returns what a process has called out, else nothing."""
    if count() == 1:
        return ""
    try:
        return _client().key_value_try_get("called")
    except jax.errors.JaxRuntimeError:
        return ""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that succeeds in all processes or in none: an error of one ends the others.

    They raise it as `Left` at their next `exchange` or at the end of the block. From then on this
    process waits for no others.
    """
    try:
        yield
    except Exception as error:
        with contextlib.suppress(UserError):
            exchange(_LEAVES + (str(error) or type(error).__name__))
        raise
    exchange("")
