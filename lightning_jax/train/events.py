"""TensorBoard event files, written with the tensorboard package alone.

A resumed run writes some steps again. Readers that know of restarts drop what came before them (a
START event says so); others, such as tensorboard's own `EventAccumulator` of tensors, do not, so
`drop` takes those events out of the older files as well.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.runtime.files import write_file

_PREFIX = "events.out.tfevents."
# A record is its length (8 bytes), a checksum (4), the event, and another checksum (4).
_LENGTH, _HEAD, _TAIL = struct.Struct("<Q"), 12, 4


class EventFile:
    """The event file of one session, which begins after `first_step - 1` steps."""

    def __init__(self, directory: Path, *, first_step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        directory.mkdir(exist_ok=True)
        self._file = open(directory / _next_name(directory), "wb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        # TensorBoard takes the first start event as the start of the run; at each later one it
        # drops the events from that step on.
        log: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        session = log(status=log.START)
        self._add(step=first_step, session_log=session)

    def _add(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers by name. They are in the file when this returns: a kill loses none."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        for name, value in values.items():
            self._add(step=step, summary=scalar_pb(name, value))
        self._records.flush()

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Adds a histogram of an array."""
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self._add(step=step, summary=histogram_pb(name, values))

    def text(self, name: str, text: str, step: int) -> None:
        """Adds a text, shown as a code block."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(step=step, summary=text_pb(name, f"```\n{text}\n```"))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()


def _next_name(directory: Path) -> str:
    """Returns a name after those of all files so far: readers go by names.

    They begin with a time in seconds, which may stand still between sessions, or jump back.
    """
    names = (re.match(re.escape(_PREFIX) + r"(\d+)\.", path.name) for path in directory.iterdir())
    moment = max([int(time.time()), *(int(found[1]) + 1 for found in names if found)])
    return f"{_PREFIX}{moment:010d}.{socket.gethostname()}.{os.getpid()}.0"


def drop(directory: Path, is_dropped: Callable[[int, str], bool]) -> None:
    """Takes events out of all event files of a folder.

    Args:
      directory: where the files are; need not exist.
      is_dropped: of the step and the name of an event. A file without such events stays as it is,
        and so does one that is damaged.

    Raises:
      UserError: the disk.
    """
    from google.protobuf.message import DecodeError

    for path in sorted(directory.glob(_PREFIX + "*")):
        content = path.read_bytes()
        try:
            kept = [
                record
                for record, step, names in _records(content)
                if not any(is_dropped(step, name) for name in names)
            ]
        except DecodeError:
            continue
        if sum(map(len, kept)) < len(content):
            write_file(path, b"".join(kept))


def _records(content: bytes) -> Iterator[tuple[bytes, int, list[str]]]:
    """Yields the records of a file with their steps and names, without one that a kill has cut."""
    from tensorboard.compat.proto import event_pb2

    start = 0
    while start + _HEAD <= len(content):
        (size,) = _LENGTH.unpack_from(content, start)
        end = start + _HEAD + size + _TAIL
        if end > len(content):
            return
        kind = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        event = kind.FromString(content[start + _HEAD : end - _TAIL])
        yield content[start:end], event.step, [value.tag for value in event.summary.value]
        start = end
