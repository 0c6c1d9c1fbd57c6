"""Timing on a GPU: several passes are queued before the host waits, so dispatch is hidden."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import PROBE, Call, Options, Rounds, interleave, matmul

# Passes of one measured call. Divide its time by this; ratios and shares need no correction.
QUEUED = 5
_PROBE_SIZE = 8192


def queue(call: Call, finish: Callable[[], None] | None = None) -> Call:
    """A call that starts `QUEUED` passes of `call` and returns the last one's result.

    Args:
      call: starts one pass and does not wait for it.
      finish: waits for all passes, where the result is not a jax array that can be waited for.
    """

    def several() -> Any:
        for _ in range(QUEUED - 1):
            call()
        result = call()
        return result if finish is None else finish()

    return several


def timed(calls: dict[str, Call], options: Options) -> Rounds:
    """Measures calls made by `queue` next to as many products of large bfloat16 matrices."""
    product, flops = matmul(jnp.bfloat16, _PROBE_SIZE)
    found = interleave(calls | {PROBE: queue(product)}, rounds=options.rounds)
    return dataclasses.replace(found, probe_flops=flops)


def runnable(builders: dict[str, Callable[[], Call]]) -> tuple[dict[str, Call], dict[str, str]]:
    """Builds calls and runs each once; returns those that ran, and the others' reasons.

    A peer may be missing or refuse a shape, and a tile may need more shared memory than this GPU
    has; none of this may cost the other numbers.
    """
    calls, reasons = {}, {}
    for name, build in builders.items():
        try:
            call = build()
            jax.block_until_ready(call())
        except Exception as error:
            reasons[name] = _reason(error)
        else:
            calls[name] = call
    return calls, reasons


def attempt(table: str, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row made by `make`; if that fails, one with `ok` False and the reason as its note.

    Written to standard error as well: a process that is killed leaves the rows that it had made.
    """
    row = {"table": table, "name": name}
    try:
        row |= make()
    except Exception as error:
        row |= {"ok": False, "note": _reason(error)}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def note(reasons: dict[str, str]) -> dict[str, str]:
    """A row's `note` about calls that did not run, if any."""
    return {"note": "; ".join(f"{k}: {v}" for k, v in reasons.items())} if reasons else {}
