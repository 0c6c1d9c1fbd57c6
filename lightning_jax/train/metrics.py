"""Output of metrics: `metrics.jsonl` and TensorBoard.

`metrics.jsonl` has one JSON object per logged step: scalars, and one list over layers for each
router metric, so that the number of keys does not grow with depth or experts. A resumed run drops
the lines that it is about to write again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.config import kinds
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import LARGEST_COUNT
from lightning_jax.runtime import output
from lightning_jax.runtime.files import parse_json, plain, write_file
from lightning_jax.train.events import EventFile, drop

# What is not of the train step.
_ROUTER_SCALARS = ("top_p", "bias_max")
# Names of what an evaluation writes.
_EVALUATION = ("eval/", "sample")

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

    Objects stay objects. A number that is not finite becomes `None`, at every depth: JSON has
    no NaN.
    """
    row: dict[str, Any] = {}
    for name, value in metrics.items():
        if name == "router":
            for key, per_layer in value.items():
                array = np.asarray(per_layer)
                row[key] = plain(array.reshape(-1, *array.shape[2:]))
        elif isinstance(value, dict):
            row[name] = plain(value)
        else:
            row[name] = plain(np.asarray(value))
    return row


def pace(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float]:
    """Returns tokens per second and seconds of training, of a run's rows, over all its sessions.

    The speed is the median over logged windows, so that compilation does not count; None if no step
    was logged.
    """
    steps = [row for row in rows if "tokens_per_second" in row]
    windows = np.diff([0, *(row["tokens"] for row in steps)]).tolist()
    speeds = [row["tokens_per_second"] for row in steps]
    seconds = sum(n / speed for n, speed in zip(windows, speeds, strict=True) if speed)
    return (float(np.median(speeds)) if speeds else None), seconds


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and the same values to TensorBoard event files."""

    def __init__(self, workdir: Path, *, resume_step: int, final_step: int | None = None):
        """Opens the files, without what earlier sessions wrote of steps after `resume_step`.

        Args:
          workdir: folder of the run.
          resume_step: steps that earlier sessions took and saved.
          final_step: steps of the whole run, at whose end every session evaluates: TensorBoard
            forgets what earlier sessions have written there.

        Raises:
          UserError: a file is damaged, or is not the kind of file that it must be.
        """
        self._directory = workdir / "tensorboard"
        if self._directory.exists() and not self._directory.is_dir():
            raise UserError(f"{self._directory}: must be a folder")
        self._path = workdir / "metrics.jsonl"
        _drop_rows_after(self._path, resume_step)
        self._file = open(self._path, "a", encoding="utf-8")
        self._resume_step, self._final_step = resume_step, final_step
        self._last_step, self._told = resume_step, False

    @functools.cached_property
    def _events(self) -> EventFile:
        # Opened by the first row: its imports must not delay the first step.
        def is_dropped(step: int, name: str) -> bool:
            evaluated = step == self._final_step and name.startswith(_EVALUATION)
            return step > self._resume_step or evaluated

        drop(self._directory, is_dropped)
        return EventFile(self._directory, first_step=self._resume_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row; it must have a `step`. The line is on disk when this returns.

        Numbers that are not finite are written as null, at every depth. The first row after a loss
        of output to standard error says so, as `output_lost`.
        """
        if output.lost() and not self._told:
            row, self._told = {**row, "output_lost": output.lost()}, True
        row = plain(row)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = row["step"]
        self._show(row)

    def last_evaluation(self, results: dict[str, Any], step: int) -> None:
        """Shows on TensorBoard what `evaluation.json` has."""
        self._show(plain({"step": step, "eval": results}))

    def _show(self, row: dict[str, Any]) -> None:
        for name, value in _scalars(row):
            self._events.scalar(name, value, row["step"])
        self._events.flush()

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
        if output.lost() and not self._told:
            self._file.write(json.dumps({"step": self._last_step, "output_lost": output.lost()}))
            self._file.write("\n")
        self._file.close()
        if "_events" in vars(self):
            self._events.close()


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    """Scalars by TensorBoard's name: `train/`, `router/`, `eval/`, and groups of their own."""
    scalars: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, dict):
            scalars += _nested(value, f"{name}/")
        elif isinstance(value, list) and np.ndim(value) == 1:
            numbers = [entry for entry in value if entry is not None]
            for reduce in (np.mean, np.min, np.max) if numbers else ():
                scalars.append((f"router/{name}/{reduce.__name__}", float(reduce(numbers))))
        elif name != "step":
            group = "router" if name in _ROUTER_SCALARS else "train"
            scalars += _nested({name: value}, f"{group}/")
    return scalars


def _nested(values: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    """Numbers by slash-joined name."""
    scalars: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            scalars += _nested(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
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
