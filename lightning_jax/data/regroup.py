"""The positions of a run that goes on with another number of processes.

Process p of n reads documents p, n + p, 2n + p ... of the order that a source has for the whole run
(`mixture`). Among other processes the same order is dealt out anew: what has been read stays read,
and the rest of opened documents, and those that only some processes had come to, are taken first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

# Beyond every document: `packing` cuts a span to its document.
TO_THE_END = 2**31 - 1


def regroup(states: Sequence[dict[str, Any]], index: int, count: int) -> dict[str, Any]:
    """Returns the state of process `index` of `count`, after the `states` of all processes before.

    No pair is repeated or dropped. Batches are others than they would have been.
    """
    streams = {
        name: _stream([state["streams"][name] for state in states], index, count)
        for name in states[0]["streams"]
    }
    totals = {name: sum(s["tokens"][name] for s in states) for name in states[0]["tokens"]}
    tokens = {name: total // count for name, total in totals.items()}
    return {**states[0], "tokens": tokens, "streams": streams}


def _stream(parts: Sequence[dict[str, Any]], index: int, count: int) -> dict[str, Any]:
    before = len(parts)
    # Of the documents from this one on, none has been opened.
    begun = max(part["next"] * before + process for process, part in enumerate(parts))
    spans = []
    for process, part in enumerate(parts):
        rows = json.loads(part.get("rows", "[]"))
        for document, start, stop in itertools.chain(json.loads(part["spans"]), *rows):
            spans.append((document * before + process, start, stop))
        unopened = range(part["next"] * before + process, begun, before)
        spans += [(document, 0, TO_THE_END) for document in unopened]
    mine = sorted([span[0] // count, *span[1:]] for span in spans if span[0] % count == index)
    given = {
        "pairs": sum(part.get("pairs", 0) for part in parts) // count,
        "documents": sum(part.get("documents", 0.0) for part in parts) / count,
    }
    state = {**parts[0], **given}
    state |= {"next": -(-(begun - index) // count), "spans": json.dumps(mine)}
    return {**state, "rows": "[]"} if "rows" in state else state
