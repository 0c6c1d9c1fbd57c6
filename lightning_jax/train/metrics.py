"""Output of metrics: `metrics.jsonl` and TensorBoard.

`metrics.jsonl` has one JSON object per logged step: scalars, and one list over layers for each
router metric, so that the number of keys does not grow with depth or experts. A resumed run drops
the lines that it is about to write again.
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.config import kinds
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import LARGEST_COUNT
from lightning_jax.runtime.files import parse_json, plain, write_file

# What readers of `metrics.jsonl` take from a row; a loss that was not finite is null.
_ROW = {
    "step": kinds.integer(0),
    "stage": kinds.TEXT,
    "tokens": kinds.integer(0, LARGEST_COUNT),
    "loss": kinds.or_null(kinds.number()),
    "tokens_per_second": kinds.number(0),
    "eval": kinds.OBJECT,
}


def flatten(metrics: dict[str, Any]) -> dict[str, Any]:
    """Turns one step's metrics (arrays) into JSON values; router metrics `[U, R]` become lists.

    A number that is not finite becomes `None`, at every depth: JSON has no NaN.
    """
    row: dict[str, Any] = {}
    for name, value in metrics.items():
        if name == "router":
            for key, per_layer in value.items():
                array = np.asarray(per_layer)
                row[key] = plain(array.reshape(-1, *array.shape[2:]))
        else:
            row[name] = plain(np.asarray(value))
    return row


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and the same values to TensorBoard event files."""

    def __init__(self, workdir: Path, *, resume_step: int):
        self._path = workdir / "metrics.jsonl"
        _drop_rows_after(self._path, resume_step)
        self._file = open(self._path, "a", encoding="utf-8")
        self._directory, self._purge_step = workdir / "tensorboard", resume_step + 1

    @functools.cached_property
    def _events(self) -> _EventFile:
        # Opened by the first row: its imports must not delay the first step.
        return _EventFile(self._directory, purge_step=self._purge_step)

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row; it must have a `step`. The line is on disk when this returns.

        Numbers that are not finite are written as null, at every depth.
        """
        row = plain(row)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        step = row["step"]
        for name, value in _flat_scalars(row):
            self._events.scalar(name, value, step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Writes a TensorBoard histogram of the numbers of an array; None is left out."""
        found = np.asarray(values, np.float64).reshape(-1)
        if (found := found[np.isfinite(found)]).size:
            self._events.histogram(name, found, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Writes a TensorBoard text, shown as a code block."""
        self._events.text(name, f"```\n{text}\n```", step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Flushes and closes both files."""
        self._file.close()
        if "_events" in vars(self):
            self._events.close()


def _flat_scalars(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Scalars by slash-joined name; lists over layers as their mean and extremes."""
    scalars: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, dict):
            scalars += _flat_scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list) and np.ndim(value) == 1:
            numbers = [entry for entry in value if entry is not None]
            for reduce in (np.mean, np.min, np.max) if numbers else ():
                layers = f"router/{prefix}{name}/{reduce.__name__}"
                scalars.append((layers, float(reduce(numbers))))
        elif isinstance(value, (int, float)) and name != "step":
            scalars.append((prefix + name, float(value)))
    return scalars


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`; a last line cut by a kill is left out.

    Raises:
      UserError: the file cannot be read, or a whole line is not a row with a step; names the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    rows = []
    # What follows the last line end is empty, or what a kill has cut.
    for number, line in enumerate(lines[:-1], 1):
        where = f"{path}: line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be a JSON object, not {type(row).__name__}")
        # Training steps are logged with their speed and place, evaluations with the step alone.
        required = ["step", "tokens"] if "tokens_per_second" in row else ["step"]
        kinds.check(row, _ROW, where, required=required)
        rows.append(row)
    return rows


def _drop_rows_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= step]
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept))


class _EventFile:
    """A TensorBoard event file, written with the tensorboard package alone."""

    def __init__(self, directory: Path, *, purge_step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = event_pb2.Event
        self._writer = EventFileWriter(str(directory))
        # TensorBoard takes the first start event as the start of the run; at each later one it
        # drops the events from that step on.
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        started = self._event(wall_time=time.time(), step=purge_step, session_log=session)
        self._writer.add_event(started)

    def _add(self, summary: Any, step: int) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def scalar(self, name: str, value: float, step: int) -> None:
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        self._add(scalar_pb(name, value), step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self._add(histogram_pb(name, values), step)

    def text(self, name: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(text_pb(name, text), step)

    def close(self) -> None:
        self._writer.close()
