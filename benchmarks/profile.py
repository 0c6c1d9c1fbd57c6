"""Where the time of a call goes: a trace of its operations, summed by part and kind of work."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import Call, Options

WAITING, REST, UNNAMED = "waiting", "rest", "batched dot_general"
# Calls in a trace.
_TRACED = 5
# A kind of work below this share of a call's time joins the rest.
_SHARE = 0.005
# In the text of a compiled program: the start of a computation, an instruction, the computations
# that it calls, and the path of the operation that it implements.
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = ")
_CALLS = re.compile(r"calls=%([\w.\-]+)")
_PATH = re.compile(r'op_name="([^"]+)"')
# Operations that run others; their time is counted for those others.
_CALLERS = ("while", "call", "conditional")
# Parts of a path that name only jax's own wrappers; an einsum adds its subscripts.
_NO_PART = re.compile(r"while|body|cond|closed_call|branch_\d+_fun|checkpoint|\w*\(.*|.*->.*")

Span = tuple[float, float, str]


def profiles(options: Options, programs: Mapping[str, tuple[Any, Call]]) -> dict[str, Any]:
    """The entry `profile` of a row, if profiles are wanted: `where_time_goes` of each program.

    `programs`: by name, the compiled program and a call that runs it.
    """
    if not options.profile:
        return {}
    return {"profile": {name: where_time_goes(*program) for name, program in programs.items()}}


def where_time_goes(compiled: Any, call: Call) -> dict[str, float]:
    """Milliseconds of one call by part of the program and kind of operation, largest first.

    Elapsed time: operations that run at the same moment on several threads share that moment. A
    product that XLA spreads over cores is one operation. `waiting` is the time in which no
    operation runs, `rest` the sum of all kinds below half a percent.

    Args:
      compiled: the program; its text names the operation behind each instruction.
      call: runs it once; the mean of several is reported.
    """
    asked_for = paths(compiled.as_text())
    moments = elapsed_by_name(_trace(call))
    kinds: collections.Counter[str] = collections.Counter()
    for name, nanoseconds in moments.items():
        kind = WAITING if name == WAITING else kind_of(name, asked_for.get(name, ""))
        kinds[kind] += nanoseconds / 1e6 / _TRACED
    least = _SHARE * kinds.total()
    large = {kind: time for kind, time in kinds.most_common() if time >= least}
    return large | {REST: sum(time for time in kinds.values() if time < least)}


def paths(program: str) -> dict[str, str]:
    """The path of the operation behind each instruction of a compiled program's text.

    XLA drops it from batched products: theirs is `UNNAMED`.
    """
    found: dict[str, str] = {}
    products: set[str] = set()
    calls: dict[str, str] = {}
    computation = ""
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start[1]
        elif instruction := _INSTRUCTION.match(line):
            if path := _PATH.search(line):
                found[instruction[1]] = path[1]
            elif called := _CALLS.search(line):
                calls[instruction[1]] = called[1]
            if " dot(" in line:
                products.add(computation)
    return {name: UNNAMED for name, called in calls.items() if called in products} | found


def kind_of(instruction: str, path: str) -> str:
    """The kind of work of an instruction: pass, part and primitive of its operation.

    `path` is the operation's name, such as "jit(f)/transpose(jvp(experts))/while/body/dot_general":
    "backward experts: dot_general". An instruction without one was added by XLA and keeps its own
    name, without the number.
    """
    if not path:
        return re.sub(r"[.\d]+$", "", instruction)
    *steps, primitive = path.split("/")
    # A differentiated scope is wrapped: jvp(scope), transpose(jvp(scope)).
    names = [re.sub(r"^(?:transpose\(|jvp\()+|\)+$", "", step) for step in steps]
    parts = [name for name in names if name and not _NO_PART.fullmatch(name)]
    backward = "backward " if "transpose(" in path else ""
    return f"{backward}{parts[-1]}: {primitive}" if parts else f"{backward}{primitive}"


def elapsed_by_name(threads: Iterable[list[Span]]) -> dict[str, float]:
    """Elapsed time of each name from spans (start, end, name), one list per thread.

    Spans of a thread nest: the innermost counts. Names that run at once share the time.
    """
    edges = sorted(
        (time, starts, name)
        for spans in threads
        for start, end, name in _innermost(spans)
        for time, starts in ((start, 1), (end, -1))
    )
    running: collections.Counter[str] = collections.Counter()
    found: collections.Counter[str] = collections.Counter()
    before = edges[0][0] if edges else 0.0
    for time, starts, name in edges:
        count = running.total()
        for other, times in running.items():
            found[other] += (time - before) * times / count
        if not count and time > before:
            found[WAITING] += time - before
        running[name] += starts
        if not running[name]:
            del running[name]
        before = time
    return dict(found)


def _innermost(spans: list[Span]) -> Iterable[Span]:
    """The spans of a thread, each cut into the pieces that contain no other span."""
    open_spans: list[tuple[float, str]] = []
    now = 0.0

    def close(until: float) -> Iterable[Span]:
        nonlocal now
        while open_spans and open_spans[-1][0] <= until:
            end, name = open_spans.pop()
            if end > now:
                yield now, end, name
                now = end

    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        yield from close(start)
        if open_spans and start > now:
            yield now, start, open_spans[-1][1]
        now = max(now, start)
        open_spans.append((end, name))
    yield from close(float("inf"))


def _trace(call: Call) -> list[list[Span]]:
    """The operations of `_TRACED` calls as spans in nanoseconds, one list per thread."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(_TRACED):
                jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        lines = [line for plane in data.planes for line in plane.lines]
        return [list(_operations(line)) for line in lines]


def _operations(line: Any) -> Iterable[Span]:
    for event in line.events:
        name = dict(event.stats).get("hlo_op")
        if name and not name.startswith(_CALLERS):
            yield event.start_ns, event.start_ns + event.duration_ns, name
